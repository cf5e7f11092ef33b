"""Atomic writes of files and folders: written under a temporary name, flushed to the disk (fsync), then renamed.

After a crash, a full disk or a power cut the old content is still there, never a part of the new one.
"""

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path) -> Generator[Path]:
    """Yields a temporary path to write to, which replaces `file` when the block ends without an error.

    It keeps the suffix of `file` (`report.png` is written as `.report.123.png`), because some writers depend on it.

    Raises:
        OSError: the disk refuses it; the old content is kept.
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
    """Atomically replaces a file's content; text is written as UTF-8. Raises OSError as `replacing` does."""
    with replacing(file) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def new_folder(folder: Path) -> Generator[Path]:
    """Yields a temporary folder, which is renamed to `folder` when the block ends without an error.

    Its files get the user's default permissions. If another process creates `folder` meanwhile, that one stays.

    Raises:
        OSError: the disk refuses it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    around = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    aside = around / folder.name
    try:
        aside.mkdir()  # inside `around`, which only its owner may read
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                file.chmod(aside.stat().st_mode & 0o666)  # safetensors lets only the owner read them
                sync(file)
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(around, ignore_errors=True)


def sync(file: Path) -> None:
    """Waits until a file's content is on the disk."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the file names of a folder are on the disk. Windows has no such call and needs none."""
    if hasattr(os, "O_DIRECTORY"):
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
