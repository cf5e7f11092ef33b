"""Prompts and their answers to tensors: packed, with what answers share computed once, or padded for models that need
it.

Pairs have two answers, the chosen one first; sampled answers are as many a prompt as were drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from qalign.data.packing import Layout
from qalign.data.tokenize import TokenAnswers, TokenPair

AnsweredPrompt = TokenPair | TokenAnswers  # a prompt with answers; those of one batch have equally many each


@dataclass(frozen=True)
class AnswerBatch:
    """Answers as tensors, numbered prompt by prompt; of a pair chosen before rejected.

    Attributes:
        input_ids: int64 `(rows, length)`.
        predictors: int64 `(targets,)`, for each token of an answer the place in the flattened `(rows * length)` whose
            hidden state predicts it. Ids are shifted here and nowhere else.
        targets: int64 `(targets,)`, these tokens' ids.
        owners: int64 `(targets,)`, the number of the answer.
        last_tokens: int64 `(answers,)`, the flattened place of the last token that was computed of each answer.
        lengths: int64 `(prompts, answers each)`, tokens of each answer, end of turn included: of pairs `(pairs, 2)`.
        position_ids: int64 `(1, length)` of a packed batch.
        layout: of a packed batch.
        attention_mask: int64 `(rows, length)` of a padded batch, 1 on tokens.
    """

    input_ids: Tensor
    predictors: Tensor
    targets: Tensor
    owners: Tensor
    last_tokens: Tensor
    lengths: Tensor
    position_ids: Tensor | None = None
    layout: Layout | None = None
    attention_mask: Tensor | None = None

    @property
    def inputs(self) -> dict:
        """What the backbone is called with."""
        if self.layout is None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "layout": self.layout}

    def to(self, device: torch.device) -> "AnswerBatch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if torch.is_tensor(getattr(self, f.name))}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def pack(rows: Sequence[AnsweredPrompt], *, last_token: Literal["dropped", "kept"] = "dropped") -> AnswerBatch:
    """Prompts one after the other in one row, without padding: what all sequences of a prompt begin with, then the rest
    of each (of a pair, the chosen one's first).

    Args:
        last_token: `dropped` leaves out the last token of each answer, which predicts nothing; a score is read from it.
    """
    groups, ids = [], []
    for row in rows:
        first, *others = (_sequence(row, answer, last_token) for answer in row.answers)
        shared = _shared([first, *others])
        groups.append((shared, tuple(len(sequence) - shared for sequence in (first, *others))))
        ids += first
        for sequence in others:
            ids += sequence[shared:]
    layout = Layout(tuple(groups))
    predictors, targets, owners, last = [], [], [], []
    for row, (shared, _), (prefix, *branches) in zip(rows, layout.groups, layout.starts, strict=True):
        for answer, branch in zip(row.answers, branches, strict=True):
            first = len(row.prompt_ids) - 1  # the prompt's last token predicts the answer's first
            length = len(answer) + (last_token == "kept")
            places = [prefix + p if p < shared else branch + p - shared for p in range(first, first + length)]
            predictors += places[: len(answer)]
            owners += [len(last)] * len(answer)
            last.append(places[-1])
            targets += answer
    return AnswerBatch(
        input_ids=torch.tensor([ids]),
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        owners=torch.tensor(owners),
        last_tokens=torch.tensor(last),
        lengths=_lengths(rows),
        position_ids=layout.positions(),
        layout=layout,
    )


def pad(rows: Sequence[AnsweredPrompt], pad_token_id: int) -> AnswerBatch:
    """A row for each answer, padded on the right: for models that `pack` can't serve."""
    sequences = [(row.prompt_ids, answer) for row in rows for answer in row.answers]
    longest = max(len(prompt) + len(answer) for prompt, answer in sequences)
    input_ids = torch.full((len(sequences), longest), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    predictors, targets, owners, last = [], [], [], []
    for number, (prompt, answer) in enumerate(sequences):
        end = len(prompt) + len(answer)
        input_ids[number, :end] = torch.tensor(prompt + answer)
        attention_mask[number, :end] = 1
        predictors += range(number * longest + len(prompt) - 1, number * longest + end - 1)
        targets += answer
        owners += [number] * len(answer)
        last.append(number * longest + end - 1)
    return AnswerBatch(
        input_ids=input_ids,
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        owners=torch.tensor(owners),
        last_tokens=torch.tensor(last),
        lengths=_lengths(rows),
        attention_mask=attention_mask,
    )


@dataclass(frozen=True)
class MicroBatchLimit:
    """How much goes through the model at once: so many pairs, or so many tokens. One of the two is set."""

    pairs: int | None = None
    tokens: int | None = None

    def __str__(self) -> str:
        return f"{self.pairs:,} at a time" if self.pairs else f"up to {self.tokens:,} tokens at a time"


def micro_batches(
    rows: Sequence[AnsweredPrompt], limit: MicroBatchLimit, *, layout: Literal["packed", "padded"]
) -> list:
    """The pairs (or prompts with their answers) of an optimiser step in groups of like many tokens, as few as the limit
    allows. (One that alone is longer than the limit gets a group.)

    Returns:
        a list of lists of rows, the largest group first: if memory is too small, the first one tells.
    """
    if layout == "padded":  # neighbours of like length
        order = sorted(rows, key=len, reverse=True)
        each = limit.pairs or max(1, limit.tokens // (len(order[0].answers) * len(order[0])))
        return [order[start : start + each] for start in range(0, len(order), each)]
    if limit.pairs:
        return _balanced(rows, ceil(len(rows) / limit.pairs), limit.pairs)
    sizes = [packed_tokens(row) for row in rows]
    largest = max(limit.tokens, *sizes)
    for count in range(ceil(sum(sizes) / largest), len(rows) + 1):
        groups = _balanced(rows, count)
        if sum(map(packed_tokens, groups[0])) <= largest:
            break
    return groups


def packed_tokens(row: AnsweredPrompt) -> int:
    """What a prompt and its answers take of a packed row at most, in tokens."""
    return len(row.prompt_ids) + sum(map(len, row.answers))


def _balanced(rows: Sequence[AnsweredPrompt], count: int, most: float = float("inf")) -> list[list[AnsweredPrompt]]:
    """The longest one left goes to the shortest group that holds fewer than `most` (Graham 1969: at most 4/3 of the
    best split's longest, where `most` is no limit)."""
    groups: list[list[AnsweredPrompt]] = [[] for _ in range(count)]
    filled = [0] * count
    for row in sorted(rows, key=packed_tokens, reverse=True):
        shortest = min((index for index in range(count) if len(groups[index]) < most), key=filled.__getitem__)
        groups[shortest].append(row)
        filled[shortest] += packed_tokens(row)
    return [groups[index] for index in sorted(range(count), key=lambda index: -filled[index])]


def _sequence(row: AnsweredPrompt, answer: list[int], last_token: str) -> list[int]:
    ids = row.prompt_ids + answer
    return ids if last_token == "kept" else ids[:-1]


def _shared(sequences: list[list[int]]) -> int:
    """How many tokens all sequences begin with alike."""
    for number, tokens in enumerate(zip(*sequences, strict=False)):
        if len(set(tokens)) > 1:
            return number
    return min(map(len, sequences))


def _lengths(rows: Sequence[AnsweredPrompt]) -> Tensor:
    return torch.tensor([[len(answer) for answer in row.answers] for row in rows])
