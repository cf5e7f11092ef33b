"""Prompts and their answers as tensors: packed, with shared tokens computed once, or padded for models that need it.

A pair has two answers, the chosen one first; a prompt for PPO has as many answers as were sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import takewhile
from math import ceil, inf
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from qalign.data.packing import Layout
from qalign.data.tokenize import TokenAnswers, TokenPair

AnsweredPrompt = TokenPair | TokenAnswers  # within a batch, each has the same number of answers
Row = TypeVar("Row", bound=AnsweredPrompt)


@dataclass(frozen=True)
class AnswerBatch:
    """Answers as tensors, numbered prompt by prompt, and in a pair chosen before rejected.

    Attributes:
        input_ids: int64 `(rows, length)`.
        predictors: int64 `(targets,)`, for each token of an answer the index in the flattened `(rows * length)` whose
            hidden state predicts it. Ids are shifted here and nowhere else.
        targets: int64 `(targets,)`, the ids of these tokens.
        owners: int64 `(targets,)`, the number of the answer that each token belongs to.
        last_tokens: int64 `(answers,)`, the flattened index of the last token in `input_ids` of each answer.
        lengths: int64 `(prompts, answers per prompt)`, tokens of each answer, end of turn included; `(pairs, 2)`.
        position_ids: int64 `(1, length)`, of a packed batch.
        layout: of a packed batch.
        attention_mask: int64 `(rows, length)`, of a padded batch; 1 on tokens.
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
    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of the backbone's forward."""
        names = ("input_ids", *(("attention_mask",) if self.layout is None else ("position_ids", "layout")))
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device) -> "AnswerBatch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if torch.is_tensor(getattr(self, f.name))}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def pack(rows: Sequence[AnsweredPrompt], *, last_token: Literal["dropped", "kept"] = "dropped") -> AnswerBatch:
    """All prompts in one row without padding: the prefix that the sequences of a prompt share, then the rest of each.

    Args:
        last_token: `dropped` leaves out the last token of each answer, which predicts nothing; a score is read from it.
    """
    groups: list[tuple[int, tuple[int, ...]]] = []
    ids: list[int] = []
    for row in rows:
        sequences = [(row.prompt_ids + answer)[: None if last_token == "kept" else -1] for answer in row.answers]
        alike = (len(set(tokens)) == 1 for tokens in zip(*sequences, strict=False))
        shared = sum(takewhile(bool, alike))
        groups.append((shared, tuple(len(sequence) - shared for sequence in sequences)))
        ids += sequences[0][:shared]
        for sequence in sequences:
            ids += sequence[shared:]
    layout = Layout(tuple(groups))
    indices = [
        [*range(prefix, prefix + shared), *range(branch, branch + length)]
        for (shared, lengths), (prefix, *branches) in zip(layout.groups, layout.starts, strict=True)
        for length, branch in zip(lengths, branches, strict=True)
    ]
    return _batch(rows, torch.tensor([ids]), indices, position_ids=layout.positions(), layout=layout)


def pad(rows: Sequence[AnsweredPrompt], pad_token_id: int) -> AnswerBatch:
    """A row for each answer, padded on the right: for models that `pack` can't serve."""
    sequences = [row.prompt_ids + answer for row in rows for answer in row.answers]
    longest = max(map(len, sequences))
    input_ids = torch.full((len(sequences), longest), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for number, sequence in enumerate(sequences):
        input_ids[number, : len(sequence)] = torch.tensor(sequence)
        attention_mask[number, : len(sequence)] = 1
    indices = [range(number * longest, number * longest + len(s)) for number, s in enumerate(sequences)]
    return _batch(rows, input_ids, indices, attention_mask=attention_mask)


def _batch(
    rows: Sequence[AnsweredPrompt], input_ids: Tensor, indices: Sequence[Sequence[int]], **of_layout: Any
) -> AnswerBatch:
    """`indices`: for each answer, where its sequence (prompt, then answer) stands in the flattened `input_ids`."""
    predictors: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    answers = [(len(row.prompt_ids), answer) for row in rows for answer in row.answers]
    for number, ((prompt_length, answer), own) in enumerate(zip(answers, indices, strict=True)):
        first = prompt_length - 1  # the prompt's last token predicts the answer's first
        predictors += own[first : first + len(answer)]
        targets += answer
        owners += [number] * len(answer)
    return AnswerBatch(
        input_ids=input_ids,
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        owners=torch.tensor(owners),
        last_tokens=torch.tensor([own[-1] for own in indices]),
        lengths=torch.tensor([[len(answer) for answer in row.answers] for row in rows]),
        **of_layout,
    )


@dataclass(frozen=True)
class MicroBatchLimit:
    """The largest micro-batch, in pairs or in tokens. One of the two is set."""

    pairs: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        return f"{self.pairs:,} at a time" if self.pairs else f"up to {self.tokens:,} tokens at a time"


def micro_batches(
    rows: Sequence[Row], limit: MicroBatchLimit, *, layout: Literal["packed", "padded"]
) -> list[list[Row]]:
    """Splits one optimiser step into as few micro-batches as `limit` allows, with roughly equal token counts.

    A row longer than the limit gets its own. The largest micro-batch comes first, to run out of memory early if at all.
    """
    if layout == "padded":  # neighbours in length, for little padding
        order = sorted(rows, key=len, reverse=True)
        size = limit.pairs or max(1, limit.tokens // (len(order[0].answers) * len(order[0])))
        return [order[start : start + size] for start in range(0, len(order), size)]
    if limit.pairs:
        return _balanced(rows, ceil(len(rows) / limit.pairs), limit.pairs)
    sizes = [packed_tokens(row) for row in rows]
    largest = max(limit.tokens, *sizes)
    groups: list[list[Row]] = []
    for count in range(ceil(sum(sizes) / largest), len(rows) + 1):
        groups = _balanced(rows, count)
        if sum(map(packed_tokens, groups[0])) <= largest:
            break
    return groups


def packed_tokens(row: AnsweredPrompt) -> int:
    """The most tokens that a prompt and its answers take in a packed row (fewer if answers begin alike)."""
    return len(row.prompt_ids) + sum(map(len, row.answers))


def _balanced(rows: Sequence[Row], count: int, most: float = inf) -> list[list[Row]]:
    """Gives the longest row left to the shortest group with fewer than `most` rows (Graham 1969: without `most`, the
    longest group is at most 4/3 of the best split's)."""
    groups: list[list[Row]] = [[] for _ in range(count)]
    filled = [0] * count
    for row in sorted(rows, key=packed_tokens, reverse=True):
        shortest = min((index for index in range(count) if len(groups[index]) < most), key=filled.__getitem__)
        groups[shortest].append(row)
        filled[shortest] += packed_tokens(row)
    return [groups[index] for index in sorted(range(count), key=lambda index: -filled[index])]
