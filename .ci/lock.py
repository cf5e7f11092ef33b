"""Writes requirements.lock and requirements-cuda.lock: every version of requirements.txt and requirements-gpu.txt, with
the hashes of their files.

    make lock

pip refuses a file whose hash isn't listed, so nobody can slip another one in. What only PyTorch's CUDA build needs (3
GB), and the fused kernels for it, have a file of their own; `make setup` installs it only where pip took this build.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CUDA = ("nvidia-", "cuda-", "triton", "liger-")
HEAD = "# Written by `make lock` from requirements.txt; do not edit.\n"


def main() -> None:
    options = ["--universal", "--generate-hashes", "--python-version=3.11", "--no-header", "--no-annotate"]
    files = ["requirements.txt", "requirements-gpu.txt"]
    command = [sys.executable, "-m", "uv", "pip", "compile", *files, "--no-emit-index-url", *options]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    entries = re.split(r"^(?=\w)", text, flags=re.M)
    for name, cuda in (("requirements.lock", False), ("requirements-cuda.lock", True)):
        chosen = [entry for entry in entries if entry.startswith(CUDA) == cuda]
        (ROOT / name).write_text(HEAD + "".join(chosen), encoding="utf-8")


if __name__ == "__main__":
    main()
