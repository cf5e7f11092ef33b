"""How every command begins, ends and fails.

Imports no torch: a bad recipe or a typo on the command line answers at once.
"""

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable

from qalign.errors import UserError


class Stopped(BaseException):
    """The user or the system asked to stop; `number` is the signal. As `KeyboardInterrupt`, no `except Exception`
    around somebody's function may swallow it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """Ctrl-C and SIGTERM. While `patient`, the first one only leaves its number here, for the loop to stop cleanly."""

    def __init__(self):
        self.number: int | None = None
        self.patient = False

    def __call__(self, number: int, frame) -> None:
        if not self.patient or self.number is not None:
            raise Stopped(number)
        self.number = number
        print("\nstopping after this step (again to stop at once) …", file=sys.stderr, flush=True)


def exit_code(work: Callable[[], None]) -> int:
    """Runs it: 0, or 2 with a line a mistake, or 128 + the signal that stopped it."""
    # One process, one GPU: with several visible, Trainer would split batches over them behind qalign's back.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console that has no arrows must not stop a run
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it suggests an optional package at import
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("qalign trains on one GPU in one process; start it with `python -m`, not with a launcher")
        work()
    except UserError as error:
        for line in error.lines:
            print(line, file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; torch may not even be imported
            raise
        reason = str(error).partition(". ")[0]
        print(f"out of GPU memory ({reason}). Try nf4, a smaller model or model.max_length", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"{error.filename or 'disk'}: {error.strerror}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"stopped by {stop}", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0
