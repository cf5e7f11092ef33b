"""Runs the notebooks from top to bottom and stores what they print and draw.

python docs/run_notebooks.py [NAME …]     # all of them by default; what they write is in runs/notebooks
"""

import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_output

ROOT = Path(__file__).resolve().parent.parent
ORDER = (
    "dpo_quickstart",
    "one_base_four_roles",
    "compare_chat",
    "reward_hacking",
    "constitution",
)  # the third opens the first one's run


# What libraries say on a CPU, or of this way to run a notebook.
NOISE = re.compile(
    r"^.*(TqdmWarning|import tqdm as notebook_tqdm|Failed to load CPU gemm_4bit_forward).*\n?", re.MULTILINE
)


def stored(text: str) -> str:
    """What a notebook keeps of what a cell printed: of a progress bar its last state, no path of the machine, no
    password, no noise."""
    text = "\n".join(line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n"))
    text = NOISE.sub("", text).replace(f"{ROOT}{os.sep}", "").replace(str(Path.home()), "~")
    return re.sub(r"^(user and password:).*", r"\1 me  (another one each time)", text, flags=re.MULTILINE)


def main() -> None:
    os.environ["QALIGN_NOTEBOOK_TEST"] = "1"  # the page would serve until it is stopped
    for name in sys.argv[1:] or ORDER:
        for left in (ROOT / "runs" / "notebooks").glob("*"):  # so that `qalign init` writes and says what it does first
            if left.is_file():
                left.unlink()
        shutil.rmtree(ROOT / "runs" / "notebooks" / "data", ignore_errors=True)
        file = ROOT / "notebooks" / f"{name}.ipynb"
        notebook = nbformat.read(file, as_version=4)
        NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(file.parent)}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # its times
            if cell.cell_type == "code":
                drawn = [output["data"]["image/png"] for output in cell.outputs if "data" in output]
                said = stored("".join(output.get("text", "") for output in cell.outputs))
                cell.outputs = [new_output("stream", name="stdout", text=said)] if said.strip() else []
                cell.outputs += [new_output("display_data", data={"image/png": picture}) for picture in drawn]
                if "NOTEBOOK_TEST" in cell.source:
                    cell.outputs = []
        nbformat.write(notebook, file)
        print(file.relative_to(ROOT))


if __name__ == "__main__":
    main()
