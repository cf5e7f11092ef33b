"""Votes on two answers to one prompt: a file that only grows, a tally, and rows to train on.

The file is itself a preference data set: `python -m qalign.dpo RECIPE dpo.data=votes.jsonl`. A vote that makes no pair
(a tie, say) gives its reason under `no_pair` instead of a chosen and a rejected answer; training leaves it out and
counts it.
"""

import errno
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from math import floor
from pathlib import Path
from threading import Lock

import numpy as np

from qalign.data.formats import Message
from qalign.reports.reward_report import Z_95, wilson


class Choice(StrEnum):
    """What a person may say of answers A and B."""

    A = "a"
    B = "b"
    TIE = "tie"
    BOTH_BAD = "both_bad"


@dataclass(frozen=True)
class Answer:
    """One of the two answers that a vote is about."""

    model: str
    """What the page calls the model that gave it, such as `base` or `demo/dpo`."""
    weights: str | None
    """The hash of its adapter's weights, as in `lineage.json`; None for the bare base."""
    prompt: tuple[Message, ...]
    """The dialogue that it answers, system turn included."""
    text: str
    ended: bool
    """Whether it came to its own end, rather than being cut or stopped."""
    seed: int


def row(choice: Choice, a: Answer, b: Answer, base: str, sampling: dict, comment: str = "") -> dict:
    """A vote as a row of the file.

    Args:
        base: what both adapters are on, as the recipe names it.
        sampling: temperature, top-p and the like.
    """
    better, worse = (b, a) if choice is Choice.B else (a, b)
    reason = _why_no_pair(choice, better, worse)
    pair = {"no_pair": reason} if reason else {"chosen": better.text, "rejected": worse.text}
    return {
        "prompt": list(a.prompt),
        **pair,
        "vote": str(choice),
        "comment": comment.strip(),
        "a": _kept(a, b),
        "b": _kept(b, a),
        "base": base,
        "sampling": sampling,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _why_no_pair(choice: Choice, better: Answer, worse: Answer) -> str | None:
    """Why there is nothing to learn from a vote, in words; None if there is."""
    if choice in (Choice.TIE, Choice.BOTH_BAD):
        return f"a vote for '{choice.replace('_', ' ')}'"
    if better.prompt != worse.prompt:
        return "the two answers are to different dialogues"
    if not better.ended:  # learned from, it would teach to break off
        return "the better answer was cut"
    if not worse.text.strip() or not better.text.strip():
        return "an answer is empty"
    if better.text.strip() == worse.text.strip():
        return "both answers are the same"
    return None


def _kept(answer: Answer, other: Answer) -> dict:
    """An answer for the file; its dialogue only where that is not the row's own."""
    kept = asdict(answer)
    if answer.prompt == other.prompt:
        del kept["prompt"]
    return kept


class VoteFile:
    """An append-only file, a vote a line, on the disk before `append` returns.

    What a power cut left of a line that was never acknowledged is moved to a file beside it, `.torn`, when the file is
    opened, so that every line can be read. A whole vote that only lacks its line's end gets one.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self._lock = Lock()
        self._mend()

    def append(self, vote: dict) -> None:
        """Writes a vote; all of it or, where the disk is full, nothing.

        Raises:
            OSError: the disk refuses it.
        """
        line = (json.dumps(vote, ensure_ascii=False) + "\n").encode()
        with self._lock:
            is_new = not self.path.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            opened = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                before = os.fstat(opened).st_size
                try:
                    if os.write(opened, line) != len(line):
                        raise OSError(errno.ENOSPC, "no space for the whole line", str(self.path))
                    os.fsync(opened)
                except OSError:
                    os.ftruncate(opened, before)
                    raise
            finally:
                os.close(opened)
            if is_new:
                _sync_folder(self.path.parent)

    def read(self) -> Iterator[dict]:
        """The votes in it, oldest first; lines that are none are passed over."""
        if not self.path.is_file():
            return
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    vote = json.loads(line)
                except ValueError:
                    continue
                if isinstance(vote, dict) and "vote" in vote:
                    yield vote

    def _mend(self) -> None:
        if not self.path.is_file():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        torn = content[whole:]
        if _is_json(torn):
            with self.path.open("ab") as file:
                file.write(b"\n")
        elif torn:
            with self.path.with_name(self.path.name + ".torn").open("ab") as beside:
                beside.write(torn + b"\n")
                beside.flush()
                os.fsync(beside.fileno())
            os.truncate(self.path, whole)


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _sync_folder(folder: Path) -> None:
    """Makes a new file's name last; Windows can't, and needs not."""
    if hasattr(os, "O_DIRECTORY"):
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@dataclass(frozen=True)
class Tally:
    """Votes between two models, seen from the first."""

    wins: int
    losses: int
    ties: int
    both_bad: int

    @property
    def votes(self) -> int:
        return self.wins + self.losses + self.ties + self.both_bad

    @property
    def points(self) -> np.ndarray:
        """1 a win, 0 a loss, ½ anything else: `(votes,)`."""
        return np.repeat([1.0, 0.0, 0.5], [self.wins, self.losses, self.ties + self.both_bad])

    @property
    def share(self) -> float:
        """The win rate, ties of either kind counting half."""
        return self.points.mean().item()

    @property
    def interval(self) -> list[float]:
        """95% interval of the win rate (Wilson 1927)."""
        return wilson(self.points)

    @property
    def votes_missing(self) -> int | None:
        """How many more votes it would take for the interval to leave 50% out, if they fell as those so far did; 0 if
        it does already, None if the win rate is even.

        Wilson's interval of a share p of n leaves ½ out once |p − ½| > z · √(¼ / n).
        """
        lead = abs(self.share - 0.5)
        return None if lead < 1e-9 else max(0, floor(Z_95**2 / 4 / lead**2) + 1 - self.votes)


def tally(votes: Iterator[dict], first: tuple[str, str | None], second: tuple[str, str | None]) -> Tally:
    """Counts the votes between two models, each given as (name, hash of its weights): trained again is another one."""
    counts: Counter[str] = Counter()
    for vote in votes:
        sides = [(vote.get(side) or {}) for side in ("a", "b")]
        names = [(side.get("model"), side.get("weights")) for side in sides]
        if sorted(map(str, names)) != sorted(map(str, (first, second))):
            continue
        choice = vote["vote"]
        if choice in ("a", "b"):
            counts["wins" if names["ab".index(choice)] == first else "losses"] += 1
        elif choice in ("tie", "both_bad"):
            counts["ties" if choice == "tie" else choice] += 1
    return Tally(*(counts[name] for name in ("wins", "losses", "ties", "both_bad")))
