"""Prompts and their answers as tensors: packed, with shared tokens computed once, or padded for models that need it.

A pair has two answers, the chosen one first; a prompt for PPO has as many answers as were sampled.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, takewhile
from math import ceil, inf
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qalign.data.store.sequences import TokenAnswers, TokenLabelled, TokenPair

if TYPE_CHECKING:
    from torch import nn
    from torch.nn.attention.flex_attention import BlockMask

AnsweredPrompt = TokenPair | TokenLabelled | TokenAnswers  # within a batch, each has the same number of answers
Row = TypeVar("Row", bound=AnsweredPrompt)

ROWS_PACKED_TOGETHER = 64  # by `in_groups`


# --- the layout of a packed row: [prompt | answer | answer | prompt | answer …], prefixes with their branches. ---
# A token of a prefix sees the prefix up to itself; a token of a branch its whole prefix, and the branch up to itself.

_BLOCK = 128  # tokens in a block of FlexAttention


@dataclass(frozen=True)
class Segment:
    """A run of tokens of the packed row that attend to all of `prefix`, and to each other causally.

    `prefix` and `own` are index ranges `(start, end)` in the packed row; positions count from the start of the prefix.
    """

    prefix: tuple[int, int]
    own: tuple[int, int]

    @property
    def first_position(self) -> int:
        """The position of the first own token."""
        return self.prefix[1] - self.prefix[0]

    def row_ranges(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The index ranges in the packed row that hold positions `start` to `end`: one or two of them."""
        border = self.first_position
        if start < border:
            yield self.prefix[0] + start, self.prefix[0] + min(end, border)
        if end > border:
            yield self.own[0] + max(start, border) - border, self.own[0] + end - border


@dataclass
class Layout:
    """Groups of one prefix and its branches, packed one after the other into one row without padding."""

    # (length of the prefix, lengths of its branches); may be 0. A dialogue of SFT is a prefix without branches.
    groups: tuple[tuple[int, tuple[int, ...]], ...]
    segments: list[Segment] = field(init=False, repr=False)  # in the order in which they stand in the row
    starts: list[list[int]] = field(init=False, repr=False)  # row indices of a group's prefix and branches
    # Of each call of the attention: the module, and its sliding window in tokens; None for full attention.
    calls: "list[tuple[nn.Module, int | None]]" = field(init=False, repr=False, default_factory=list)
    _masks: "dict[int | None, BlockMask]" = field(init=False, repr=False, default_factory=dict)
    _sequences: dict[torch.device, tuple[Tensor, Tensor]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self):
        self.segments, self.starts, end = [], [], 0
        for prefix_length, branches in self.groups:
            prefix = (end, end + prefix_length)
            own = [prefix]
            for length in branches:
                own.append((own[-1][1], own[-1][1] + length))
            self.segments.append(Segment((end, end), prefix))  # the prefix itself has nothing before it
            self.segments += [Segment(prefix, branch) for branch in own[1:]]
            self.starts.append([start for start, _ in own])
            end = own[-1][1]
        self.tokens = end

    def positions(self) -> Tensor:
        """Position ids, int64 `(1, tokens)`: each branch continues the positions of its prefix."""
        runs = [torch.arange(s.first_position, s.first_position + s.own[1] - s.own[0]) for s in self.segments]
        return torch.cat(runs)[None]

    def places(self) -> list[list[int]]:
        """Where the tokens of each whole sequence, a prefix with one of its branches, stand in the packed row."""
        found: list[list[int]] = []
        for (prefix_length, branches), (prefix, *starts) in zip(self.groups, self.starts, strict=True):
            trunk = [*range(prefix, prefix + prefix_length)]
            found += [[*trunk, *range(s, s + n)] for s, n in zip(starts, branches, strict=True)] or [trunk]
        return found

    def sequences(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Whole sequences as rows: where their tokens stand in the packed row, int64 `(sequences, longest)`, short ones
        padded with their last token, and where each token of the packed row stands in these rows, flattened: int64
        `(tokens,)`."""
        if device not in self._sequences:
            rows = [torch.tensor(places) for places in self.places() if places]
            longest, home = max(map(len, rows)), torch.empty(self.tokens, dtype=torch.int64)
            for number, row in enumerate(rows):
                home[row] = number * longest + torch.arange(len(row))
            padded = [torch.cat([row, row[-1:].expand(longest - len(row))]) for row in rows]
            self._sequences[device] = on_device(torch.stack(padded), device), on_device(home, device)
        return self._sequences[device]

    def block_mask(self, window: int | None, device: torch.device) -> "BlockMask":
        """FlexAttention's mask of this layout, computed once per sliding `window` (in tokens; None is full attention).

        Its blocks are found one row of blocks at a time: all at once would take a hundred times the mask's memory.
        """
        if window in self._masks:
            return self._masks[window]
        from torch.nn.attention.flex_attention import BlockMask  # takes a second, and CPUs don't need it

        group, branch = torch.zeros(2, self.tokens, dtype=torch.int32)  # of each token; the prefix is branch 0
        for number, starts in enumerate(self.starts):
            for which, start in enumerate(starts):
                group[start:], branch[start:] = number, which
        # The window as a tensor: a number would be compiled in, once for each window and for none.
        reach = torch.tensor(self.tokens if window is None else window)
        found = (group, branch, self.positions()[0], reach)
        group, branch, position, reach = (on_device(tensor, device) for tensor in found)

        def sees(_batch: Tensor | int, _head: Tensor | int, query: Tensor, key: Tensor) -> Tensor:
            seen = (group[query] == group[key]) & (query >= key)
            seen = seen & ((branch[key] == 0) | (branch[key] == branch[query]))
            return seen & (position[query] - position[key] < reach)

        count = -(-self.tokens // _BLOCK)
        keys = torch.arange(self.tokens, device=device)
        some, every = torch.zeros(2, count, count, dtype=torch.bool, device=device)
        for row in range(count):
            queries = keys[row * _BLOCK : (row + 1) * _BLOCK]
            seen = sees(0, 0, queries[:, None], keys[None])
            seen = torch.nn.functional.pad(seen, (0, count * _BLOCK - self.tokens)).view(len(queries), count, _BLOCK)
            some[row], every[row] = seen.any(dim=2).any(dim=0), seen.all(dim=2).all(dim=0) & (len(queries) == _BLOCK)
        partial, full = (_listed(blocks) for blocks in (some & ~every, every))
        self._masks[window] = BlockMask.from_kv_blocks(
            *partial, *full, BLOCK_SIZE=_BLOCK, mask_mod=sees, seq_lengths=(self.tokens, self.tokens)
        )
        return self._masks[window]


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. On GPUs from pinned memory, from which a copy doesn't wait until the GPU is done."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """bool `(rows, blocks)` as FlexAttention wants it: how many blocks each row has, and their indices first."""
    counts = blocks.sum(dim=1, dtype=torch.int32)
    return counts[None, None], blocks.int().argsort(dim=1, descending=True, stable=True).int()[None, None]


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerBatch:
    """Answers as int64 tensors, numbered prompt by prompt, and in a pair chosen before rejected."""

    input_ids: Tensor  # (rows, length)
    # (targets,), for each token of an answer the index in the flattened (rows * length) whose hidden state predicts it:
    predictors: Tensor  # ids are shifted here and nowhere else
    targets: Tensor  # (targets,), the ids of these tokens
    owners: Tensor  # (targets,), the number of the answer that each token belongs to
    last_tokens: Tensor  # (answers,), the flattened index of the last token in input_ids of each answer
    lengths: Tensor  # (prompts, answers per prompt), tokens of each answer, end of turn included; (pairs, 2)
    position_ids: Tensor | None = None  # (1, length), of a packed batch
    layout: Layout | None = None  # of a packed batch
    attention_mask: Tensor | None = None  # (rows, length), of a padded batch; 1 on tokens

    @property
    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of the backbone's forward."""
        names = ("input_ids", *(("attention_mask",) if self.layout is None else ("position_ids", "layout")))
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device) -> "AnswerBatch":
        tensors = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **{name: on_device(tensor, device) for name, tensor in tensors.items()})


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
    return _batch(rows, torch.tensor([ids]), layout.places(), position_ids=layout.positions(), layout=layout)


def pad(rows: Sequence[AnsweredPrompt], pad_token_id: int) -> AnswerBatch:
    """A row for each answer, padded on the right: for models that `pack` can't serve."""
    sequences = [torch.tensor(row.prompt_ids + answer) for row in rows for answer in row.answers]
    input_ids = pad_sequence(sequences, batch_first=True, padding_value=pad_token_id)
    attention_mask = pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True)
    starts = range(0, input_ids.numel(), input_ids.shape[1])
    indices = [range(start, start + len(ids)) for start, ids in zip(starts, sequences, strict=True)]
    return _batch(rows, input_ids, indices, attention_mask=attention_mask)


def _batch(
    rows: Sequence[AnsweredPrompt], input_ids: Tensor, indices: Sequence[Sequence[int]], **of_layout: Any
) -> AnswerBatch:
    """`indices`: for each answer, where its sequence (prompt, then answer) stands in the flattened `input_ids`."""
    lengths = torch.tensor([[len(answer) for answer in row.answers] for row in rows])
    # The prompt's last token predicts the answer's first.
    answers = [(len(row.prompt_ids) - 1, answer) for row in rows for answer in row.answers]
    predictors = [own[first : first + len(answer)] for (first, answer), own in zip(answers, indices, strict=True)]
    return AnswerBatch(
        input_ids=input_ids,
        predictors=torch.tensor([*chain.from_iterable(predictors)]),
        targets=torch.tensor([token for _, answer in answers for token in answer]),
        owners=torch.arange(len(answers)).repeat_interleave(lengths.flatten()),
        last_tokens=torch.tensor([own[-1] for own in indices]),
        lengths=lengths,
        **of_layout,
    )


@dataclass
class MicroBatchLimit:
    """The largest micro-batch, in pairs (or rows) or in tokens. One of the two is set. All parts of a run share one
    limit, so that what is halved for one is halved for all."""

    pairs: int = 0
    tokens: int = 0
    longest: int = field(default=0, compare=False)  # tokens of the longest row

    def __str__(self) -> str:
        return f"{self.pairs:,} at a time" if self.pairs else f"up to {self.tokens:,} tokens at a time"

    def among(self, processes: int, sizes: Sequence[int]) -> "MicroBatchLimit":
        """The limit for a number of processes that share rows of these sizes, in tokens. Where the recipe leaves it
        open, each process gets as many micro-batches as any other. (With one more, all would wait for one process.)"""
        if processes == 1 or self.pairs:
            return self
        rounds = ceil(sum(sizes) / (processes * self.tokens))
        while (largest := _largest(sizes, processes * rounds)) > max(self.tokens, *sizes):
            rounds += 1
        return MicroBatchLimit(tokens=min(self.tokens, largest), longest=self.longest)

    def halve(self, sizes: Sequence[int]) -> bool:
        """Halves what a step with rows of these sizes takes at once, in tokens not below the longest row; False if it
        can't take less."""
        if self.pairs:
            most = min(self.pairs, len(sizes))
            self.pairs = max(1, most // 2)
            return most > 1
        most, longest = min(self.tokens, sum(sizes)), max(self.longest, *sizes)
        if most <= longest:
            return False
        self.tokens = max(most // 2, longest)
        return True


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


def in_groups(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Many rows in groups of similar length, for `micro_batches`, whose time is longer than linear in their number."""
    order = sorted(rows, key=len) if len(rows) > ROWS_PACKED_TOGETHER else rows
    for start in range(0, len(order), ROWS_PACKED_TOGETHER):
        yield order[start : start + ROWS_PACKED_TOGETHER]


def packed_tokens(row: AnsweredPrompt) -> int:
    """The most tokens that a prompt and its answers take in a packed row (fewer if answers begin alike)."""
    return len(row.prompt_ids) + sum(map(len, row.answers))


def split_evenly(sizes: Sequence[int], count: int, most: float = inf) -> list[list[int]]:
    """The numbers of things of these sizes in `count` groups: the largest one left goes to the smallest group with
    fewer than `most` things (Graham 1969: without `most`, the largest group is at most 4/3 of the best split's)."""
    groups: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        smallest = min((index for index in range(count) if len(groups[index]) < most), key=filled.__getitem__)
        groups[smallest].append(number)
        filled[smallest] += sizes[number]
    return groups


def _largest(sizes: Sequence[int], count: int) -> int:
    """The size of the largest of `count` groups."""
    return max(sum(sizes[number] for number in numbers) for numbers in split_evenly(sizes, count))


def _balanced(rows: Sequence[Row], count: int, most: float = inf) -> list[list[Row]]:
    """The rows in `count` groups of roughly equal token counts, at most `most` rows in each, the longest first."""
    split = split_evenly([*map(packed_tokens, rows)], count, most)
    groups = [[rows[number] for number in numbers] for numbers in split]
    return sorted(groups, key=lambda group: -sum(map(packed_tokens, group)))
