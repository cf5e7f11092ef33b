"""The cache of converted and quantised bases, and of token ids: folders with a manifest, verified each time they are
used. Beside them stands what PyTorch compiles.

A cache that can't be written costs time, never the run. Imports no torch.
"""

import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from qalign.config import manifest
from qalign.config.atomic import new_folder
from qalign.config.paths import expanded
from qalign.errors import UserError

LOCK = ".lock"
LOCK_WAIT = 60  # seconds to wait for another process that writes
SOON = 2  # seconds of waiting after which it is said


def cache_folder() -> Path:
    """Where they are cached: `$XDG_CACHE_HOME/qalign`."""
    cache = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if str(cache).startswith("~"):
        raise UserError("this user has no home folder; set XDG_CACHE_HOME to a folder for what is cached")
    return cache / "qalign"


def compile_caches() -> dict[str, str]:
    """Environment variables that make PyTorch and Triton keep in the cache what they compile, so that only the first
    run waits for FlexAttention. (PyTorch's own place is a temporary folder.) Empty if the cache can't be written."""
    with suppress(UserError, OSError):
        folder = Path(os.path.abspath(cache_folder() / "compiled"))
        there = next(place for place in (folder, *folder.parents) if place.exists())  # PyTorch makes the rest
        if there.is_dir() and os.access(there, os.W_OK):
            return {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    return {}


def is_whole(folder: Path, *, weights: bool = True) -> bool:
    """Whether a folder is in the cache with every file as it was written. Says so if it is there and damaged. Clears
    what killed processes left. Without `weights`, only the size of safetensors files is looked at."""
    with suppress(OSError), alone(folder.parent, wait=0):
        pass
    problem = _damage(folder, weights=weights)
    if problem:
        print(f"note: {folder} is damaged ({problem}); it is made again", flush=True)
    return problem == ""


def keep(folder: Path, write: Callable[[Path], object], wait: float | None = None) -> bool:
    """Keeps a folder that `write` fills, with its hashes, in the place of a damaged one; `wait` as in `alone`. False,
    and one line that says why, if the cache can't be written."""
    try:
        with alone(folder.parent, wait):
            if _damage(folder) == "":  # made by another process meanwhile
                return True
            if folder.is_dir():
                shutil.rmtree(folder)
            with new_folder(folder) as aside:
                write(aside)
                manifest.write(aside)
        return True
    except Exception as error:  # safetensors has errors of its own for a full disk
        reason = " ".join(str(error).split())[:120]
        print(f"note: the cache {folder} can't be written ({reason}); going on without it", flush=True)
        return False


@contextmanager
def alone(folder: Path, wait: float | None = None) -> Generator[None]:
    """Only one process at a time writes into a folder of the cache. So what has a temporary name there when the block
    begins was left by one that was killed, and is deleted. Where locks don't work, or another process takes longer than
    `wait` seconds (`LOCK_WAIT` by default), nothing is deleted.

    Raises:
        OSError: the folder can't be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, wait = FileLock(folder / LOCK), LOCK_WAIT if wait is None else wait
    try:
        try:
            lock.acquire(timeout=min(wait, SOON))
        except Timeout:
            if wait <= SOON:
                raise
            print(f"note: waiting for another process that writes {folder}", flush=True)
            lock.acquire(timeout=wait - SOON)
    except (Timeout, OSError, NotImplementedError):
        yield
        return
    try:
        for left in folder.glob(".*"):
            if left.name != LOCK:
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def _damage(folder: Path, *, weights: bool = True) -> str | None:
    """What is wrong with a folder of the cache; empty if nothing is, None if there is no such folder."""
    if not folder.is_dir():
        return None
    if problem := manifest.damage(folder, weights=weights):
        return problem
    added = set(manifest.names(folder)) - manifest.read(folder)["files"].keys()
    return f"{min(added)} was added" if added else ""
