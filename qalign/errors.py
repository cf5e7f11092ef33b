"""What ends a command early: errors that the user can fix, and requests to stop. Imports no torch."""

import errno
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

MAX_LINE, MAX_VALUE = 300, 80  # characters of a printed line, and of a value of the user's in it
PLACE = re.compile(r" *(\S{0,40} )?\S*")  # of a problem: a key and its value, or a file
LONGEST_WORD = 60  # in characters: no key or file name that could be meant is longer
# What the disk or a path may answer, with the likely fix. (Some of these don't exist on Windows.)
DISK_FIXES = {
    "ENOSPC": "free some space",
    "EDQUOT": "free some space: your quota is used up",
    "EFBIG": "allow larger files there (ulimit -f), or choose another place",
    "EROFS": "choose a folder that can be written to",
    "EACCES": "choose a folder that you may write to",
    "EPERM": "choose a folder that you may write to",
    "ENAMETOOLONG": "choose a shorter name",
    "ELOOP": "mend the symbolic link",
    "ENOTDIR": "choose another place: a part of this path is a file",
}
OTHERS = "EIO EMFILE ENFILE EISDIR EEXIST ENOTEMPTY ENXIO ENODEV EXDEV EBUSY ESTALE ENOTCONN"
DISK_FIXES |= dict.fromkeys(OTHERS.split(), "check this path and its disk")


def program(name: str = "") -> str:
    """A command as the user can type it, for usage lines and hints: `qalign dpo` where the console script was called
    (with uvx there is no other way), else `python -m qalign.dpo`."""
    if Path(sys.argv[0]).stem == "qalign":
        return f"qalign {name}".rstrip()
    return f"python -m qalign.{name}".rstrip(".")


def one_line(text: object, limit: int | None = MAX_LINE) -> str:
    """A text as one line that is safe to print: control characters are escaped, so that a recipe or a row can't write
    to the terminal. In a line that is too long, long words after the place are cut first (usually paths), then its
    middle, so that place and likely fix stay."""
    line = str(text)
    if limit and len(line) > 2 * limit:  # before it is escaped, which takes time for megabytes
        line = f"{line[:limit]} … {line[-limit:]}"
    line = "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in line)
    place = PLACE.match(line)[0]  # pyright: ignore[reportOptionalSubscript]
    rest = line[len(place) :]
    while limit and len(place + rest) > limit and len(word := max(rest.split(), key=len, default="")) > LONGEST_WORD:
        rest = rest.replace(word, f"{word[: LONGEST_WORD // 3]}…{word[-LONGEST_WORD // 2 :]}")
    line = place + rest
    if limit and len(line) > limit:
        end = 2 * limit // 5
        line = f"{line[: limit - end - 3]} … {line[len(line) - end :]}"
    return line


def short(value: object) -> str:
    """The repr of a value from a recipe or a row, short enough for an error; half a surrogate pair is escaped too."""
    with suppress(Exception):  # nested too deeply, or its own `__repr__` fails
        return one_line(repr(value), MAX_VALUE)
    return f"an object of {type(value).__name__}"


class UserError(Exception):
    """An error that the user can fix: printed line by line without a traceback, exit code 2. Each line is made safe to
    print by `one_line`."""

    def __init__(self, *lines: str):
        self.lines = tuple(map(one_line, lines))
        super().__init__("\n".join(self.lines))


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """`"; did you mean 'learning_rate'?"` with the most similar known word, in whatever case; empty if none is."""
    words = {name.lower(): name for name in known}
    close = get_close_matches(str(word)[:LONGEST_WORD].lower(), words, n=1, cutoff=0.6)
    return f"; did you mean '{words[close[0]]}'?" if close else ""


def disk_problem(error: BaseException, folder: Path | None = None) -> str | None:
    """What the disk refused, in words with the likely fix; None if the error is of another kind.

    Args:
        folder: what was written to, for errors that don't say, as PyTorch's, safetensors' and tokenizers' don't.
    """
    number, place = getattr(error, "errno", None), getattr(error, "filename", None) or folder or "disk"
    if not isinstance(error, OSError) or number is None:
        if _of_torch_save(error):
            number = next((e.errno for e in (error.__cause__, error.__context__) if isinstance(e, OSError)), None)
            number = number or (errno.EIO if _free_bytes(folder or Path()) else errno.ENOSPC)
        elif said := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors, tokenizers
            number = int(said[1])
        else:
            return None
    fix = DISK_FIXES.get(errno.errorcode.get(number, ""))
    reason = getattr(error, "strerror", None) or os.strerror(number)
    return fix and f"{place}: {reason}; {fix}"


def _of_torch_save(error: BaseException) -> bool:
    """Whether `torch.save` failed to write: it raises a RuntimeError in many words, which name no reason."""
    frames = (frame for frame, _ in walk_tb(error.__traceback__))
    names = ((frame.f_globals.get("__name__"), frame.f_code.co_name) for frame in frames)
    return isinstance(error, RuntimeError) and ("torch.serialization", "save") in names


def _free_bytes(folder: Path) -> int:
    """Room on the disk of a folder, less a margin of 1 MiB."""
    try:
        return max(0, shutil.disk_usage(folder).free - 2**20)
    except OSError:
        return 0


def out_of_memory(error: BaseException, fix: str, doing: str = "") -> UserError:
    """The error for PyTorch's `OutOfMemoryError`: what was asked for, and what would take less."""
    return UserError(f"out of GPU memory{doing} ({str(error).partition('. ')[0]}). Try {fix}")


def not_finite(
    step: str, what: str, rows: Sequence[str] = (), kept: str = "", dtypes: str = "bfloat16 or float32"
) -> UserError:
    """The error for a NaN or an infinity, such as `not_finite("step 5", "the loss is", ["rows.jsonl:3"])`. `rows` are
    the rows to blame, `kept` says what was not changed, `dtypes` what may help."""
    where = f" on {', '.join(dict.fromkeys(rows))}" if rows else ""
    return UserError(
        f"{step}: {what} not finite{where}; {kept}the last checkpoint, if there is one, is kept. "
        f"Try a lower learning_rate, or compute_dtype: {dtypes}"
    )


def gradients_not_finite(step: str) -> UserError:
    """The same for gradients: the loss was finite, so only a wider dtype can help."""
    return not_finite(step, "the gradients are", kept="nothing was updated, and ", dtypes="float32")


def scores_not_finite(precision: str) -> UserError:
    """The error for scores of a reward model that are NaN or infinite; `precision` says what they were computed in."""
    return UserError(
        f"model.compute_dtype: the reward model's scores are not finite, computed in {precision}; use bfloat16 or "
        "float32, or train it again with a lower learning_rate"
    )


class Stopped(BaseException):
    """The user or the system asked to stop; `number` is the signal. Like `KeyboardInterrupt` it is no `Exception`, so
    that no `except Exception` in a library or in the user's own function swallows it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """The handler of Ctrl-C and SIGTERM. While `patient` is True, the first signal only sets `number`, and the training
    loop stops after its step; otherwise, or at the second signal, the process stops at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.patient = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.patient or self.number is not None:
            raise Stopped(number)
        self.number = number
        with suppress(OSError):  # `print` may not be called in a handler: it may have interrupted a print
            os.write(2, "\nstopping after this step (again to stop at once) …\n".encode())


def within(seconds: float, late: str, work: Callable[[], T]) -> T:
    """What `work` returns, or a `UserError` with the line `late` if it takes longer. It may never end, so it runs in a
    thread that doesn't keep the process alive."""
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise UserError(late)
    return done[0]
