"""Files and folders that are written whole or not at all: aside first, then flushed to the disk, then renamed.

A crash, a full disk or a power cut leaves what was there before, never half of something new.
"""

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path) -> Generator[Path]:
    """Yields a path beside `file` to write to, which replaces `file` once the block has ended without an error.

    The path keeps the ending of `file` (`report.png` is written as `.report.123.png`), as some writers look at it.

    Raises:
        OSError: the disk refuses it; what was there before is kept.
    """
    aside = file.with_name(f".{file.stem}.{os.getpid()}{file.suffix}")
    try:
        yield aside
        sync(aside)
        aside.replace(file)
        sync_folder(file.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_whole(file: Path, content: str | bytes) -> None:
    """Replaces a file with this content; text is written as UTF-8.

    Raises:
        OSError: the disk refuses it; what was there before is kept.
    """
    with replacing(file) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def new_folder(folder: Path) -> Generator[Path]:
    """Yields a temporary folder that takes its final name once the block has ended without an error.

    Its files get the permissions of any file that the user makes. If another process made the folder meanwhile, that
    one stays.

    Raises:
        OSError: the disk refuses it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    around = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    aside = around / folder.name
    try:
        aside.mkdir()  # inside the other, whose permissions are its owner's alone
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                file.chmod(aside.stat().st_mode & 0o666)  # safetensors makes them its owner's alone too
                sync(file)
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(around, ignore_errors=True)


def sync(file: Path) -> None:
    """Waits until what was written to a file is on the disk."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk; Windows has no such call and needs none."""
    if hasattr(os, "O_DIRECTORY"):
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
