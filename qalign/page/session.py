"""The state of one visitor: two models, a dialogue with each, and which model is shown on which side. No model code."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qalign.data.formats import Message
from qalign.errors import UserError
from qalign.page.models import BASE

CUT = ("cut", "stopped")  # states of an answer that hasn't ended by itself


@dataclass(frozen=True)
class Reward:
    """A reward model's score of an answer."""

    score: float
    model: str  # the page's name for the reward model
    above: float | None = None  # share of the held-out answers of its run with a lower score, if it is known


@dataclass(frozen=True)
class Reply:
    """An answer, finished or still growing."""

    model: str  # the page's name for its model
    weights: str | None  # hash of the adapter weights, as in `lineage.json`, and a dial's λ; None for the bare base
    prompt: tuple[Message, ...]  # the dialogue that it answers, with the system turn
    prompt_ids: list[int]  # the same as the model read it, generation prompt included
    seed: int
    ids: tuple[int, ...] = ()  # with the end of turn
    text: str = ""  # without special tokens
    state: str = "growing"  # or `ended` by itself, `cut` at the maximum length, `stopped` by the visitor
    first_token_seconds: float = 0.0
    tokens_per_second: float = 0.0  # after the first token
    dial: float = 1.0  # λ: the share of its model's logits, where they are mixed with another's
    mixed_with: str = ""  # the page's name of that other model; empty if nothing is mixed
    reward: Reward | None = None  # from the run's reward model, once the answer is finished


def aligned_side(names: Sequence[str]) -> int:
    """Which of two models is the aligned one: the second, unless it is the bare base."""
    return 0 if names[-1] == BASE else len(names) - 1


@dataclass
class Session:
    """Two sides: number 0 is the first model chosen and number 1 the second, wherever they are shown."""

    names: tuple[str, str]  # of the two models
    blind: bool = False  # a blind test: the names stay hidden until the vote
    order: tuple[int, int] = (0, 1)  # the numbers of the sides, left to right
    turns: tuple[list[Message], list[Message]] = field(default_factory=lambda: ([], []))  # without system turns
    replies: list[Reply] = field(default_factory=list)  # the last answer of each side
    sampling: dict[str, Any] = field(default_factory=dict)  # the sampling settings of these
    voted: bool = False  # these have been voted on
    round: int = 0  # rises with every change of the dialogues, so that late answers can be recognised
    _before: tuple[Any, ...] = ()  # the dialogues before the last question

    @property
    def titles(self) -> tuple[str, str]:
        """The title of each side, left to right."""
        if self.hides:
            return "A", "B"
        left, right = (self.names[number] for number in self.order)
        return (f"A: {left}", f"B: {right}") if self.blind else (left, right)

    @property
    def hides(self) -> bool:
        """Whether everything that identifies a model must stay hidden."""
        return self.blind and not self.voted

    @property
    def aligned(self) -> int:
        """The number of the side that the tally and the colours are about: the second, unless it is the bare base."""
        return aligned_side(self.names)

    @property
    def can_vote(self) -> bool:
        return self.hides and bool(self.replies)

    def clear(self) -> None:
        """Starts a new dialogue; a blind test shuffles the sides again."""
        self.turns, self.replies, self.voted = ([], []), [], False
        self.round += 1
        self.order = secrets.choice(((0, 1), (1, 0))) if self.blind else (0, 1)

    def choose(self, first: str, second: str, *, blind: bool) -> None:
        """Sets the models and the kind of test. Any change starts a new dialogue."""
        if ((first, second), blind) != (self.names, self.blind):
            self.names, self.blind = (first, second), blind
            self.clear()

    def ask(self, prompt: str) -> list[tuple[str, list[Message]]]:
        """Adds a question to both dialogues; after a vote, when the names are known, it starts new ones. Returns
        (name of the model, its dialogue) of each side."""
        self._before = (tuple(map(list, self.turns)), self.replies, self.voted, self.order)
        if self.blind and self.voted:
            self.clear()
        self.replies = []
        self.round += 1
        for turns in self.turns:
            turns.append({"role": "user", "content": prompt})
        return list(zip(self.names, map(list, self.turns), strict=True))

    def undo(self) -> None:
        """Takes back a question that got no answer; earlier answers can still be voted on."""
        self.turns, self.replies, self.voted, self.order = self._before
        self.round += 1

    def add_replies(self, replies: list[Reply], sampling: dict[str, Any]) -> None:
        """Adds the finished answers to the dialogues."""
        self.replies, self.sampling = list(replies), sampling
        for turns, reply in zip(self.turns, replies, strict=True):
            turns.append({"role": "assistant", "content": reply.text})

    def replace_replies(self, replies: list[Reply], sampling: dict[str, Any]) -> None:
        """Puts longer answers in the place of the last ones."""
        for turns in self.turns:
            turns.pop()
        self.add_replies(replies, sampling)

    @property
    def cut(self) -> list[str]:
        """The titles of the sides whose last answer was cut or stopped, left to right."""
        numbers = [number for number in self.order if self.replies and self.replies[number].state in CUT]
        return [self.titles[self.order.index(number)] for number in numbers]

    def remove_last(self) -> str:
        """Removes the last question with its answers and returns it; an empty text if there is none. After a vote, when
        the names are known, the whole dialogue is removed."""
        last = ""
        for turns in self.turns:
            while turns and (turn := turns.pop()):  # without an answer while it grows
                if turn["role"] == "user":
                    last = turn["content"]
                    break
        self.replies = []
        self.round += 1
        if self.blind and self.voted:
            self.clear()
        return last

    def vote(self) -> tuple[Reply, Reply]:
        """Marks the answers as voted on and returns A (the left one) and B; a `UserError` if there are none."""
        if not self.can_vote:
            raise UserError("there are no two answers to vote on; ask something first")
        self.voted = True
        left, right = (self.replies[number] for number in self.order)
        return left, right
