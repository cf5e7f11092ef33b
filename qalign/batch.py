"""Token pairs to tensors: packed, with what two answers share computed once, or padded for models that need it."""

from dataclasses import dataclass, fields, replace
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from qalign.layout import Layout
from qalign.tokens import TokenPair


@dataclass(frozen=True)
class PairBatch:
    """Pairs as tensors. Answers are numbered pair by pair, chosen before rejected.

    Attributes:
        input_ids: int64 `(rows, length)`.
        predictors: int64 `(targets,)`, for each token of an answer the place in the flattened `(rows * length)` whose
            hidden state predicts it. Ids are shifted here and nowhere else.
        targets: int64 `(targets,)`, these tokens' ids.
        owners: int64 `(targets,)`, the number of the answer.
        ends: int64 `(2 * pairs,)`, the flattened place of the last token that was computed of each answer.
        lengths: int64 `(pairs, 2)`, tokens of each answer, end of turn included.
        position_ids: int64 `(1, length)` of a packed batch.
        layout: of a packed batch.
        attention_mask: int64 `(rows, length)` of a padded batch, 1 on tokens.
    """

    input_ids: Tensor
    predictors: Tensor
    targets: Tensor
    owners: Tensor
    ends: Tensor
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

    def to(self, device: torch.device) -> "PairBatch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if torch.is_tensor(getattr(self, f.name))}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def pack(pairs: list[TokenPair], *, ends: Literal["dropped", "kept"] = "dropped") -> PairBatch:
    """Pairs one after the other in one row, without padding: what both sequences of a pair begin with, then the rest of
    the chosen one, then the rest of the rejected one.

    Args:
        ends: `dropped` leaves out the last token of each answer, which predicts nothing; a score is read from it.
    """
    groups, ids = [], []
    for pair in pairs:
        chosen, rejected = (_sequence(pair, answer, ends) for answer in (pair.chosen_ids, pair.rejected_ids))
        shared = _shared(chosen, rejected)
        groups.append((shared, (len(chosen) - shared, len(rejected) - shared)))
        ids += [*chosen, *rejected[shared:]]
    layout = Layout(tuple(groups))
    predictors, targets, owners, last = [], [], [], []
    for number, (pair, (shared, _), (trunk, *branches)) in enumerate(
        zip(pairs, layout.groups, layout.starts, strict=True)
    ):
        for side, (answer, branch) in enumerate(zip((pair.chosen_ids, pair.rejected_ids), branches, strict=True)):
            first = len(pair.prompt_ids) - 1  # the prompt's last token predicts the answer's first
            length = len(answer) + (ends == "kept")
            places = [trunk + p if p < shared else branch + p - shared for p in range(first, first + length)]
            predictors += places[: len(answer)]
            last.append(places[-1])
            targets += answer
            owners += [2 * number + side] * len(answer)
    return PairBatch(
        input_ids=torch.tensor([ids]),
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        owners=torch.tensor(owners),
        ends=torch.tensor(last),
        lengths=_lengths(pairs),
        position_ids=layout.positions(),
        layout=layout,
    )


def pad(pairs: list[TokenPair], pad_token_id: int) -> PairBatch:
    """Two rows a pair, chosen before rejected, padded on the right: for models that `pack` can't serve."""
    rows = [(pair.prompt_ids, answer) for pair in pairs for answer in (pair.chosen_ids, pair.rejected_ids)]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.full((len(rows), longest), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    predictors, targets, owners, last = [], [], [], []
    for number, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        input_ids[number, :end] = torch.tensor(prompt + answer)
        attention_mask[number, :end] = 1
        predictors += range(number * longest + len(prompt) - 1, number * longest + end - 1)
        targets += answer
        owners += [number] * len(answer)
        last.append(number * longest + end - 1)
    return PairBatch(
        input_ids=input_ids,
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        owners=torch.tensor(owners),
        ends=torch.tensor(last),
        lengths=_lengths(pairs),
        attention_mask=attention_mask,
    )


@dataclass(frozen=True)
class MicroBatch:
    """How much goes through the model at once: so many pairs, or so many tokens. One of the two is set."""

    pairs: int | None = None
    tokens: int | None = None

    def __str__(self) -> str:
        return f"{self.pairs:,} at a time" if self.pairs else f"up to {self.tokens:,} tokens at a time"


def micro_batches(pairs: list[TokenPair], limit: MicroBatch, *, layout: Literal["packed", "padded"]) -> list:
    """The pairs of an optimiser step in groups of like many tokens, as few as the limit allows. (A pair that alone is
    longer than the limit gets a group.)

    Returns:
        `list[list[TokenPair]]`, the largest group first: if memory is too small, the first one tells.
    """
    if layout == "padded":  # neighbours of like length
        order = sorted(pairs, key=len, reverse=True)
        each = limit.pairs or max(1, limit.tokens // (2 * len(order[0])))
        return [order[start : start + each] for start in range(0, len(order), each)]
    if limit.pairs:
        return _balanced(pairs, ceil(len(pairs) / limit.pairs), limit.pairs)
    sizes = [packed_tokens(pair) for pair in pairs]
    largest = max(limit.tokens, *sizes)
    for count in range(ceil(sum(sizes) / largest), len(pairs) + 1):
        groups = _balanced(pairs, count)
        if sum(map(packed_tokens, groups[0])) <= largest:
            break
    return groups


def packed_tokens(pair: TokenPair) -> int:
    """What a pair takes of a packed row at most, in tokens."""
    return len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def _balanced(pairs: list[TokenPair], count: int, most: float = float("inf")) -> list[list[TokenPair]]:
    """The longest pair left goes to the shortest group that holds fewer than `most` pairs (Graham 1969: at most 4/3 of
    the best split's longest, where `most` is no limit)."""
    groups: list[list[TokenPair]] = [[] for _ in range(count)]
    filled = [0] * count
    for pair in sorted(pairs, key=packed_tokens, reverse=True):
        shortest = min((index for index in range(count) if len(groups[index]) < most), key=filled.__getitem__)
        groups[shortest].append(pair)
        filled[shortest] += packed_tokens(pair)
    return [groups[index] for index in sorted(range(count), key=lambda index: -filled[index])]


def _sequence(pair: TokenPair, answer: list[int], ends: str) -> list[int]:
    ids = pair.prompt_ids + answer
    return ids if ends == "kept" else ids[:-1]


def _shared(one: list[int], other: list[int]) -> int:
    """How many tokens two sequences begin with alike."""
    for number, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return number
    return min(len(one), len(other))


def _lengths(pairs: list[TokenPair]) -> Tensor:
    return torch.tensor([[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in pairs])
