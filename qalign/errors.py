"""What ends a command early: mistakes that a user can mend, and requests to stop. Imports no torch."""

import signal
import sys
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake that the user can mend: printed line by line without a traceback, exit code 2."""

    def __init__(self, *lines: str):
        super().__init__("\n".join(lines))
        self.lines = lines


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """`"; did you mean 'learning_rate'?"` for the nearest of the known words, or nothing."""
    close = get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


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
