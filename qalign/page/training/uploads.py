"""Data files that come from the browser, in pieces of plain text: the page has no route for files."""

import base64
import binascii
import re
from pathlib import Path

from qalign.config.paths import DATA_SUFFIXES
from qalign.errors import UserError, short

MAX_BYTES = 200 * 2**20  # of a file; a larger one is named by its path
PIECE_BYTES = 144 * 1024  # of it in one call, as base64 below `security.MAX_BODY_BYTES`
PART = ".part"  # ends the name of a file that isn't whole yet


class Uploads:
    """The folder of uploaded files. They are only ever read as data: other endings are refused."""

    def __init__(self, folder: Path):
        self.folder = folder

    def names(self) -> list[str]:
        """Paths of the files, newest first."""
        found = [file for file in self.folder.glob("*") if file.name.endswith(DATA_SUFFIXES) and file.is_file()]
        return [str(file) for file in sorted(found, key=lambda file: -file.stat().st_mtime)]

    def add(self, name: str, size: int, start: int, piece: str) -> Path | None:
        """Adds the piece of a file that begins at byte `start`. Returns the file once it is whole. A `UserError` if it
        is none that may be uploaded, or the piece is out of place."""
        name = safe_name(name)
        if not 0 < size <= MAX_BYTES:
            why = "is empty" if size <= 0 else f"has more than {MAX_BYTES // 2**20} MiB; give its path instead"
            raise UserError(f"{name} {why}")
        try:
            content = base64.b64decode(piece, validate=True)
        except (binascii.Error, ValueError):
            raise UserError(f"{name}: a piece of it is damaged; upload it again") from None
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{name}{PART}"
        has = part.stat().st_size if start and part.is_file() else 0
        if start != has or not content or start + len(content) > size:
            raise UserError(f"{name}: its pieces came in another order; upload it again")
        with part.open("ab" if start else "wb") as file:
            file.write(content)
        if start + len(content) < size:
            return None
        return part.rename(self._free(name, part))

    def _free(self, name: str, part: Path) -> Path:
        """The name for a whole file: its own, unless another one has it already. A run may read that other one."""
        stem, dot, suffix = name.partition(".")
        for number in range(1, 1000):
            place = self.folder / (name if number == 1 else f"{stem}-{number}{dot}{suffix}")
            if not place.exists() or place.read_bytes() == part.read_bytes():
                return place
        raise UserError(f"{name}: there are too many files of this name in {self.folder}")


def safe_name(name: str) -> str:
    """The last part of a file's name, of plain characters alone; a `UserError` unless it is one of data."""
    last = re.sub(r"[^A-Za-z0-9._-]+", "_", re.split(r"[\\/]", name)[-1])[-100:].lstrip(".-_")
    if not last.endswith(DATA_SUFFIXES) or last in {suffix.lstrip(".") for suffix in DATA_SUFFIXES}:
        raise UserError(f"{short(name)}: expected a file of rows: {', '.join(DATA_SUFFIXES)}")
    return last
