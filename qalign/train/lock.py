"""One process at a time in a run folder: a lock on `<output>/.<stage>.lock`. The system frees it when its process ends,
in whatever way. Imports no torch."""

import errno
import json
import os
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from qalign.errors import UserError

SINCE = "%Y-%m-%d %H:%M:%S"
STARTED_LATER = 2.0  # seconds by which the clocks of a lock file and of the system may differ

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # by some network folders


def lock_file(folder: Path) -> Path:
    """The lock file of a run folder."""
    home = Path(os.path.realpath(folder))
    return home.with_name(f".{home.name}.lock")


def folder_of(lock: Path) -> Path:
    """The run folder of a lock file."""
    return lock.with_name(lock.name.removeprefix(".").removesuffix(".lock"))


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Holds the lock of a run folder, which may not exist yet, until the block ends.

    The lock file stays, and names its holder while there is one. A process that was killed leaves its name but no lock:
    the next one takes over, also after a restart or under another host name, and says so. A folder that can't be
    locked, on some network shares, is used all the same, with a warning. Raises a `UserError` if another process holds
    it, an OSError if the lock file can't be written.
    """
    file = lock_file(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        holder = _holder(file) or "another process"
        fix = "wait for it, stop it, or choose another `output`"
        raise UserError(f"{folder}: {holder} is using this run folder; {fix}") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in UNSUPPORTED:
            raise
        print(f"warning: {folder} can't be locked here ({error}): start no second run with this `output`", flush=True)
        yield
        return
    try:
        if gone := _holder(file):
            print(f"{folder}: {gone} ended without freeing this run folder; it is taken over", flush=True)
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime(SINCE)}
        _write(file, json.dumps(me))
        yield
    finally:
        _write(file, "")
        lock.release()


def _write(file: Path, holder: str) -> None:
    """Names the holder, from the second byte on: Windows lets nobody else read the first one, which is locked."""
    with suppress(OSError), file.open("r+b", buffering=0) as opened:  # the lock counts, the name is for people
        opened.seek(1)
        opened.write(holder.encode())
        opened.truncate()


class Holder(NamedTuple):
    """Who holds the lock, or was killed while holding it."""

    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"


def at_work(folder: Path) -> Holder | None:
    """The process that works in a run folder; None if none does. One on another computer can't be looked at: it counts
    until it frees the folder. It is asked for by its number, because taking the lock would keep out a run that
    begins."""
    holder = _holder(lock_file(folder))
    if holder is None or holder.host != socket.gethostname()[:60]:
        return holder
    import psutil

    try:
        process = psutil.Process(holder.pid)
        began = time.mktime(time.strptime(holder.since, SINCE))
        lives = process.status() != psutil.STATUS_ZOMBIE and process.create_time() < began + STARTED_LATER
    except (psutil.Error, ValueError, OverflowError):
        return None
    return holder if lives else None


def _holder(file: Path) -> Holder | None:
    """Who holds the lock, or was killed while holding it; None if nobody, or it can't be read."""
    try:
        with file.open("rb", buffering=0) as opened:
            opened.seek(1)
            kept = json.loads(opened.read(1000))
        return Holder(int(kept["pid"]), str(kept["host"])[:60], str(kept["since"])[:20])
    except (OSError, ValueError, KeyError, TypeError):
        return None
