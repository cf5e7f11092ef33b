"""The layout of a packed row, `[prompt | answer | answer | prompt | answer …]`: prefixes with their branches.

A token of a prefix sees the prefix up to itself; a token of a branch sees its whole prefix and the branch up to itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

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

    groups: tuple[tuple[int, tuple[int, ...]], ...]  # (length of the prefix, lengths of its branches); may be 0
    segments: list[Segment] = field(init=False, repr=False)  # in the order in which they stand in the row
    starts: list[list[int]] = field(init=False, repr=False)  # row indices of a group's prefix and branches
    # The sliding window that each layer asked for in its forward, in tokens; None for full attention.
    windows: list[int | None] = field(init=False, repr=False, default_factory=list[int | None])
    _masks: "dict[int | None, BlockMask]" = field(init=False, repr=False, default_factory=dict)

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
        group, branch, position = (tensor.to(device) for tensor in (group, branch, self.positions()[0]))

        def sees(_batch: Tensor | int, _head: Tensor | int, query: Tensor, key: Tensor) -> Tensor:
            seen = (group[query] == group[key]) & (query >= key)
            seen = seen & ((branch[key] == 0) | (branch[key] == branch[query]))
            return seen if window is None else seen & (position[query] - position[key] < window)

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


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """bool `(rows, blocks)` as FlexAttention wants it: how many blocks each row has, and their indices first."""
    counts = blocks.sum(dim=1, dtype=torch.int32)
    return counts[None, None], blocks.int().argsort(dim=1, descending=True, stable=True).int()[None, None]
