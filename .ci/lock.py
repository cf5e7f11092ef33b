"""Writes requirements.lock and requirements-cuda.lock: every version of requirements.txt, with the hashes of its files.

    make lock

pip refuses a file whose hash isn't listed, so nobody can slip another one in. What only PyTorch's CUDA build needs (3
GB) has a file of its own; `make setup` installs that file only where pip took this build.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CUDA = ("nvidia-", "cuda-", "triton")
HEAD = "# Written by `make lock` from requirements.txt; do not edit.\n"


def main() -> None:
    options = ["--universal", "--generate-hashes", "--python-version=3.11", "--no-header", "--no-annotate"]
    command = [sys.executable, "-m", "uv", "pip", "compile", "requirements.txt", "--no-emit-index-url", *options]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    entries = re.split(r"^(?=\w)", text, flags=re.M)
    for name, cuda in (("requirements.lock", False), ("requirements-cuda.lock", True)):
        chosen = [entry for entry in entries if entry.startswith(CUDA) == cuda]
        (ROOT / name).write_text(HEAD + "".join(chosen), encoding="utf-8")


if __name__ == "__main__":
    main()
