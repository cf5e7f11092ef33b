"""Runs the notebooks from top to bottom and stores what they print.

python docs/run_notebooks.py
"""

import os
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("dpo_quickstart", "one_base_four_roles", "compare_chat")  # the last one opens the run of the first


def stored(text: str) -> str:
    """What a notebook keeps of an output: no path of the machine, no password, and of a progress bar its last state."""
    text = "\n".join(line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n"))
    text = text.replace(f"{ROOT}{os.sep}", "").replace(str(Path.home()), "~")
    return re.sub(r"^(user and password:).*", r"\1 me  (another one each time)", text, flags=re.MULTILINE)


def main() -> None:
    os.environ["QALIGN_NOTEBOOK_TEST"] = "1"  # the page would serve until it is stopped
    for name in ORDER:
        file = ROOT / "notebooks" / f"{name}.ipynb"
        notebook = nbformat.read(file, as_version=4)
        NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(file.parent)}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # its times
            for output in cell.get("outputs", []):
                output["text"] = "" if "NOTEBOOK_TEST" in cell.source else stored(output["text"])
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.get("outputs", []) if output["text"]]
        nbformat.write(notebook, file)
        print(file.relative_to(ROOT))


if __name__ == "__main__":
    main()
