"""Answers from two models at once: at each token their logits are mixed, and both read the token that was sampled.

Decoding-time realignment (Liu et al. 2024, arXiv:2402.02992): λ · aligned + (1 − λ) · other. If the aligned model was
trained with KL price β from the other, the mixture approximates one that was trained with β / λ. Beyond 1 it is aligned
further than it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """What the logits of a request's role are mixed with."""

    other: str  # a role, as in a request
    weight: float  # λ, of the request's own role


def mixed(aligned: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """λ · aligned + (1 − λ) · other in float32, for logits `(rows, vocabulary)` and λ `(rows, 1)`: at 0 and 1 the very
    logits of one side. Where both are the same, the mixture is too (so −inf stays)."""
    a, b = aligned.float(), other.float()
    between = torch.where(a == b, a, weight * a + (1 - weight) * b)
    return torch.where(weight == 1, a, torch.where(weight == 0, b, between))


class RowPlan:
    """Which rows of a batch make up each answer: one, or two whose logits are mixed.

    Args:
        answers: of each answer, the number of its prompt's first row, and its mixture. (A mixture has two rows of its
            prompt, its own role's and then the other's.)
    """

    def __init__(self, answers: Sequence[tuple[int, Mixture | None]]):
        self._answers = tuple(answers)
        self.prompts: list[int] = []  # of each row, the prompt's row that it goes on from
        self._first: list[int] = []  # rows of the answers
        self._owners: list[int] = []  # of each row, its answer
        for number, (prompt, mixture) in enumerate(answers):
            self._first.append(len(self.prompts))
            rows = [prompt] if mixture is None else [prompt, prompt + 1]
            self.prompts += rows
            self._owners += [number] * len(rows)
        self._mixes = [number for number, (_, mixture) in enumerate(answers) if mixture]

    def logits(self, rows: Tensor) -> Tensor:
        """The logits of each answer, from those of each row."""
        if not self._mixes:
            return rows
        found = rows[self._first].float()
        first = torch.tensor([self._first[number] for number in self._mixes], device=rows.device)
        weights = [mixture.weight for _, mixture in self._answers if mixture]
        found[self._mixes] = mixed(rows[first], rows[first + 1], found.new_tensor(weights)[:, None])
        return found

    def tokens(self, of_answers: Tensor) -> Tensor:
        """The token that each row reads next, from those of the answers."""
        return of_answers[self._owners] if self._mixes else of_answers

    def keep(self, answers: Sequence[int]) -> tuple["RowPlan", list[int]]:
        """(The plan of these answers alone, the rows that stay.)"""
        kept = set(answers)
        rows = [row for row, owner in enumerate(self._owners) if owner in kept]
        return RowPlan([self._answers[number] for number in answers]), rows
