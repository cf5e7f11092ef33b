"""What a user can put right, told in lines that say what, where, and the likely fix."""

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
