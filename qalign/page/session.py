"""What one visitor has in front of them: two models, a dialogue with each, and who stands where.

Pure bookkeeping: the page asks it what to show, the chat what to answer.
"""

import secrets
from dataclasses import dataclass, field

from qalign.data.formats import Message
from qalign.errors import UserError
from qalign.page.models import BASE
from qalign.page.votes import Answer, Choice


@dataclass
class Session:
    """Two sides. Number 0 is the first model chosen, wherever it stands.

    Attributes:
        names: the contenders'.
        blind: whether names stay hidden until the vote.
        flipped: whether the second one stands on the left.
        turns: each side's dialogue, the system turn left out.
        replies: each side's last answer.
        sampling: what these were drawn with.
        voted: whether they have been judged.
        round: rises whenever the dialogues change, so that an answer to what is gone can be told.
    """

    names: tuple[str, str]
    blind: bool = False
    flipped: bool = False
    turns: tuple[list[Message], list[Message]] = field(default_factory=lambda: ([], []))
    replies: list = field(default_factory=list)
    sampling: dict = field(default_factory=dict)
    voted: bool = False
    round: int = 0
    _before: tuple = field(default=(([], []), [], False, False), repr=False)

    @property
    def order(self) -> tuple[int, int]:
        """The numbers of the sides, left to right."""
        return (1, 0) if self.flipped else (0, 1)

    @property
    def titles(self) -> tuple[str, str]:
        """What stands over each side, left to right."""
        if self.hides:
            return "A", "B"
        left, right = (self.names[number] for number in self.order)
        return (f"A: {left}", f"B: {right}") if self.blind else (left, right)

    @property
    def hides(self) -> bool:
        """Whether anything that tells the sides apart must stay hidden."""
        return self.blind and not self.voted

    @property
    def aligned(self) -> int:
        """The number of the side that tallies and colours are about: the second, unless that is the bare base."""
        return 0 if self.names[1] == BASE else 1

    @property
    def can_vote(self) -> bool:
        return self.blind and bool(self.replies) and not self.voted

    def clear(self) -> None:
        """A new dialogue; in a blind test the sides are shuffled anew."""
        self.turns, self.replies, self.voted = ([], []), [], False
        self.round += 1
        self.flipped = self.blind and secrets.choice((True, False))

    def choose(self, first: str, second: str, *, blind: bool) -> None:
        """Other models, or another kind of comparison: a new dialogue, unless nothing changed."""
        if ((first, second), blind) != (self.names, self.blind):
            self.names, self.blind = (first, second), blind
            self.clear()

    def ask(self, prompt: str) -> list[tuple[str, list[Message]]]:
        """Puts a question to both sides: each contender with its dialogue. After a vote it begins a new one, for the
        names are known by now."""
        self._before = (tuple(map(list, self.turns)), self.replies, self.voted, self.flipped)
        if self.blind and self.voted:
            self.clear()
        self.replies = []
        self.round += 1
        for turns in self.turns:
            turns.append({"role": "user", "content": prompt})
        return list(zip(self.names, map(list, self.turns), strict=True))

    def undo(self) -> None:
        """As it was before the last question, to which there is no answer: what was to be voted on still is."""
        self.turns, self.replies, self.voted, self.flipped = self._before
        self.round += 1

    def take(self, replies: list, sampling: dict) -> None:
        """The finished answers, as `chat.Reply`, and what they were drawn with."""
        self.replies, self.sampling = list(replies), sampling
        for turns, reply in zip(self.turns, replies, strict=True):
            turns.append({"role": "assistant", "content": reply.text})

    def take_back(self) -> str:
        """Removes the last question with its answers, and returns it; an empty text if there is none. After a vote the
        whole dialogue goes, for the names are known by now."""
        last = ""
        for turns in self.turns:
            while turns and (turn := turns.pop()):
                if turn["role"] == "user":
                    last = turn["content"]
                    break
        self.replies = []
        self.round += 1
        if self.blind and self.voted:
            self.clear()
        return last

    def vote(self, choice: Choice, weights: dict[str, str | None]) -> tuple[Answer, Answer]:
        """Marks the answers as judged, and returns A (on the left) and B.

        Args:
            weights: the hash of each contender's weights.

        Raises:
            UserError: there is nothing to judge.
        """
        if not self.can_vote:
            raise UserError("there are no two answers to vote on; ask something first")
        self.voted = True
        a, b = (self.replies[number] for number in self.order)
        return tuple(
            Answer(r.model, weights[r.model], tuple(r.prompt), r.text, r.state == "ended", r.seed) for r in (a, b)
        )
