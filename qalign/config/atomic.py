"""Atomic writes of files and folders: written under a temporary name, flushed to the disk (fsync), then renamed.

After a crash, a full disk or a power cut the old content is still there, never a part of the new one.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qalign.errors import UserError, disk_problem

# The temporary names that a killed process leaves: `.report.qalign-123.png` of a file, `.adapter.qalign-x1y2z3w4` of a
# folder. The mark keeps them apart from hidden files of the user's.
MARK = ".qalign-"
LEFTOVER = re.compile(rf"\.(?P<name>.+){re.escape(MARK)}\w+(\.\w+)?")


@contextmanager
def replacing(file: Path) -> Generator[Path]:
    """Yields a temporary path to write to, which replaces `file` when the block ends without an error. It keeps the
    suffix of `file` (`report.png` is written as `.report.qalign-123.png`): some writers depend on it. Raises an OSError
    if the disk refuses it; the old content is kept."""
    aside = file.with_name(f".{file.stem}{MARK}{os.getpid()}{file.suffix}")
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


def write_rows(file: Path, rows: Iterable[Any]) -> None:
    """Atomically replaces a file's content by rows, each as a line of JSON. Raises OSError as `replacing` does."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(file, text.encode(errors="backslashreplace"))  # half a surrogate pair as JSON escapes it


def check_writable(target: Path) -> None:
    """A `UserError` if a file or folder can't be made at `target`, tried in the nearest of its folders that exists."""
    try:
        folder = next(each for each in Path(os.path.abspath(target)).parents if each.exists())
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{target.name}{MARK}"):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        problem = disk_problem(OSError(error.errno, reason), target)
        raise UserError(problem or f"{target}: can't be made there ({reason}); choose another place") from None


@contextmanager
def new_folder(folder: Path) -> Generator[Path]:
    """Yields a temporary folder, which is renamed to `folder` when the block ends without an error. Its files get the
    user's default permissions. If another process creates `folder` meanwhile, that one stays."""
    with _written_aside(folder) as aside:
        yield aside
        sync_tree(aside)
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        sync_folder(folder.parent)


@contextmanager
def replacing_folder(folder: Path) -> Generator[Path]:
    """Like `new_folder`, but what is in `folder` is replaced, as a whole: no file of the old one stays. If the disk
    refuses it, which raises an OSError, the old folder is kept."""
    with _written_aside(folder) as aside:
        yield aside
        sync_tree(aside)
        old = aside.with_name("old")  # a folder that isn't empty can't be replaced by one rename
        try:
            if folder.exists():
                folder.rename(old)
            aside.rename(folder)
        except BaseException:  # Ctrl-C between the two as well
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise
        sync_folder(folder.parent)


@contextmanager
def _written_aside(folder: Path) -> Generator[Path]:
    """Yields an empty folder next to `folder`, in one that only its owner may read and that is deleted at the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    around = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}{MARK}"))
    try:
        aside = around / "new"
        aside.mkdir()
        yield aside
    finally:
        shutil.rmtree(around, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Deletes the temporary files and folders that a killed process left in a folder and those inside it. What a kill
    between the two renames of `replacing_folder` left without its name gets it back."""
    for path in sorted(folder.rglob(".*")):
        if (found := LEFTOVER.fullmatch(path.name)) is None:
            continue
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            continue
        original = path.with_name(found["name"])
        old = path / "old"
        if old.is_dir() and not original.exists():
            old.rename(original)
        shutil.rmtree(path, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Waits until all files of a folder are on the disk, with their names and the user's default permissions."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            sync_folder(path)
        else:
            path.chmod(folder.stat().st_mode & 0o666)  # safetensors lets only the owner read its files
            sync(path)


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
