"""What ends a command early: errors that the user can fix, and requests to stop. Imports no torch."""

import signal
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from types import FrameType


class UserError(Exception):
    """An error that the user can fix: printed line by line without a traceback, exit code 2."""

    def __init__(self, *lines: str):
        super().__init__("\n".join(lines))
        self.lines = lines


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """`"; did you mean 'learning_rate'?"` with the most similar known word; empty if none is similar."""
    close = get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


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
        print("\nstopping after this step (again to stop at once) …", file=sys.stderr, flush=True)
