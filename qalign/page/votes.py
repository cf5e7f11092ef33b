"""Votes on two answers to one prompt: an append-only file, a tally, and rows to train on.

The file is a preference data set: `python -m qalign.dpo RECIPE dpo.data=votes.jsonl`. A vote that gives no preference
pair, such as a tie, has the reason under `no_pair` instead of `chosen` and `rejected`; training leaves it out and
counts it.
"""

import errno
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from math import floor
from pathlib import Path
from statistics import NormalDist
from threading import Lock
from typing import Any

from qalign.config.atomic import sync_folder
from qalign.errors import UserError
from qalign.page.session import Reply
from qalign.reports.reward_report import wilson


class Choice(StrEnum):
    """The possible votes on answers A and B."""

    A = "a"
    B = "b"
    TIE = "tie"
    BOTH_BAD = "both_bad"


def row(choice: Choice, a: Reply, b: Reply, base: str, sampling: dict[str, Any], comment: str = "") -> dict[str, Any]:
    """A vote as a row of the file. `base`: its name in the recipe; `sampling`: settings such as the temperature."""
    chosen, rejected = (b, a) if choice is Choice.B else (a, b)
    reason = _why_no_pair(choice, chosen, rejected)
    return {
        "prompt": list(a.prompt),
        **({"no_pair": reason} if reason else {"chosen": chosen.text, "rejected": rejected.text}),
        "vote": str(choice),
        "comment": comment.strip(),
        "a": _answer(a, b),
        "b": _answer(b, a),
        "base": base,
        "sampling": sampling,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _answer(reply: Reply, other: Reply) -> dict[str, Any]:
    """One answer of a row; with its dialogue only if the two differ."""
    prompt = {} if reply.prompt == other.prompt else {"prompt": reply.prompt}
    prompt |= {"dial": reply.dial, "mixed_with": reply.mixed_with} if reply.mixed_with else {}
    facts = {"text": reply.text, "ended": reply.state == "ended", "seed": reply.seed}
    return {"model": reply.model, "weights": reply.weights, **prompt, **facts}


def _why_no_pair(choice: Choice, chosen: Reply, rejected: Reply) -> str | None:
    """Why a vote can't be trained on; None if it can."""
    reasons = {
        f"a vote for '{choice.replace('_', ' ')}'": choice in (Choice.TIE, Choice.BOTH_BAD),
        "the two answers are to different dialogues": chosen.prompt != rejected.prompt,
        # Training on it would teach the model to stop in mid-sentence.
        "the better answer was cut": chosen.state != "ended",
        "an answer is empty": not (chosen.text.strip() and rejected.text.strip()),
        "both answers are the same": chosen.text.strip() == rejected.text.strip(),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


class VoteFile:
    """An append-only file with one vote a line; a vote is on the disk before `append` returns.

    A power cut may leave an incomplete last line, whose vote was never acknowledged. Opening the file moves it to a
    second file, `.torn`, so that every line can be read. A complete last vote that only lacks its newline gets one.
    """

    def __init__(self, path: str | Path):
        """Raises a UserError if votes can't be written there."""
        self._lock = Lock()
        try:
            self.path = Path(path).expanduser()
            if self.path.exists() and not self.path.is_file():
                raise UserError(f"--votes {path}: expected a file, and this is none")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(self.path):
                self.path.open("ab").close()
                self._repair()
            else:
                tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=self.path.name[:99]).close()
        except (OSError, ValueError, RuntimeError) as error:  # such as a NUL in the name, or an unknown ~user
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--votes {path}: votes can't be written there: {reason}") from None

    def append(self, vote: dict[str, Any]) -> None:
        """Writes the whole vote or, with an OSError (such as a full disk), nothing."""
        line = (json.dumps(vote, ensure_ascii=False) + "\n").encode()
        with self._lock:
            is_new = not self.path.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0, opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                size_before = file.tell()
                try:
                    if os.write(file.fileno(), line) != len(line):
                        raise OSError(errno.ENOSPC, "no space for the whole line", str(self.path))
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(size_before)
                    raise
            if is_new:
                sync_folder(self.path.parent)

    def read(self) -> "Votes":
        """All votes, oldest first; lines that are none are counted."""
        lines = self.path.read_bytes().split(b"\n") if self.path.is_file() else []
        read = [(number, _parsed(line)) for number, line in enumerate(lines, 1) if line.strip()]
        return Votes(
            [vote for _, vote in read if vote and _is_vote(vote)],
            [number for number, vote in read if not (vote and _is_vote(vote))],
        )

    def _repair(self) -> None:
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        last_line = content[end:]
        if _parsed(last_line) is not None:
            with self.path.open("ab") as file:
                file.write(b"\n")
        elif last_line:
            with self.path.with_name(self.path.name + ".torn").open("ab") as torn:
                torn.write(last_line + b"\n")
                torn.flush()
                os.fsync(torn.fileno())
            os.truncate(self.path, end)


@dataclass(frozen=True)
class Votes:
    """What a file of votes holds."""

    rows: list[dict[str, Any]]
    unreadable: list[int]  # numbers of the lines that are no votes

    @property
    def left_out(self) -> Counter[str]:
        """How many votes training leaves out, by reason."""
        return Counter(filter(None, map(_why_left_out, self.rows)))


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line of JSON; None if it isn't one object."""
    try:
        parsed = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def _why_left_out(vote: dict[str, Any]) -> str:
    whole = all(isinstance(vote.get(name), str) for name in ("chosen", "rejected"))
    return vote.get("no_pair", "" if whole else "no pair of answers")


def _is_vote(vote: dict[str, Any]) -> bool:
    """Whether an object has what the page reads of a vote, in the right types."""
    answers = [vote.get(side, {}) for side in ("a", "b")]
    names = [answer.get(name) for answer in answers if isinstance(answer, dict) for name in ("model", "weights")]
    return (
        vote.get("vote") in [*Choice]
        and all(isinstance(answer, dict) for answer in answers)
        and all(name is None or isinstance(name, str) for name in names)
        and isinstance(vote.get("no_pair", ""), str)
    )


@dataclass(frozen=True)
class Tally:
    """Numbers of votes between two models; a win is a win of the first."""

    wins: int
    losses: int
    ties: int
    both_bad: int

    @property
    def votes(self) -> int:
        return self.wins + self.losses + self.ties + self.both_bad

    @property
    def win_rate(self) -> float:
        """Share of votes won; ties and `both_bad` count half."""
        return (self.wins + (self.ties + self.both_bad) / 2) / self.votes

    @property
    def interval(self) -> list[float]:
        """95% confidence interval of the win rate (Wilson 1927)."""
        return wilson(self.win_rate, self.votes)

    @property
    def votes_missing(self) -> int | None:
        """How many more votes at the present win rate would move the interval off 50%; 0 if it is off already, None if
        the win rate is even.

        Wilson's interval of a share p of n votes excludes ½ once |p − ½| > z · √(¼ / n).
        """
        lead, z = abs(self.win_rate - 0.5), NormalDist().inv_cdf(0.975)
        return None if lead < 1e-9 else max(0, floor(z**2 / 4 / lead**2) + 1 - self.votes)


def tally(votes: Iterable[dict[str, Any]], first: tuple[str, str | None], second: tuple[str, str | None]) -> Tally:
    """Counts the votes between two models, each given as (name, hash of its weights): a retrained model starts anew."""
    counts: Counter[str] = Counter()
    for vote in votes:
        answers = [vote.get(side, {}) for side in ("a", "b")]
        models = [(answer.get("model"), answer.get("weights")) for answer in answers]
        if sorted(map(str, models)) != sorted(map(str, (first, second))):
            continue
        choice = vote["vote"]
        if choice in ("a", "b"):
            counts["win" if models["ab".index(choice)] == first else "loss"] += 1
        elif choice in ("tie", "both_bad"):
            counts[choice] += 1
    return Tally(*(counts[name] for name in ("win", "loss", "tie", "both_bad")))
