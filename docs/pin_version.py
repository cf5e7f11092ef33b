"""Writes the version of `qalign/__init__.py` wherever a notebook, a badge or the citation names it (`make docs`).

python docs/pin_version.py
"""

import re
from pathlib import Path

from qalign import __version__
from qalign.config.atomic import write_whole

ROOT = Path(__file__).resolve().parents[1]
FILES = (ROOT / "README.md", ROOT / "CITATION.cff", *sorted((ROOT / "notebooks").glob("*.ipynb")))
PIN = re.compile(
    r"(qalign/qalign(?:/(?:blob|raw|tree)/|@)v|qalign(?:\[\w+\])?==|^version: )[0-9][0-9a-z.]*", re.MULTILINE
)


def pinned(version: str) -> dict[Path, str]:
    """The text of each file with every link to the repository, install line and citation at this version."""
    return {file: PIN.sub(rf"\g<1>{version}", file.read_text(encoding="utf-8")) for file in FILES}


if __name__ == "__main__":
    for file, text in pinned(__version__).items():
        write_whole(file, text)
