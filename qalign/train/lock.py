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

from filelock import FileLock, Timeout

from qalign.errors import UserError

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # by some network folders


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Holds the lock of a run folder, which may not exist yet, until the block ends.

    The lock file stays, and names its holder while there is one. A process that was killed leaves its name but no lock:
    the next one takes over, also after a restart or under another host name, and says so. A folder that can't be
    locked, on some network shares, is used all the same, with a warning. Raises a `UserError` if another process holds
    it, an OSError if the lock file can't be written.
    """
    file = folder.with_name(f".{folder.name}.lock")
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
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
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


def _holder(file: Path) -> str | None:
    """Who holds the lock, or was killed while holding it, in words; None if nobody, or it can't be read."""
    try:
        with file.open("rb", buffering=0) as opened:
            opened.seek(1)
            kept = json.loads(opened.read(1000))
        return f"process {int(kept['pid'])} on {str(kept['host'])[:60]} (since {str(kept['since'])[:20]})"
    except (OSError, ValueError, KeyError, TypeError):
        return None
