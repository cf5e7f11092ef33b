"""Where what stands in a packed row: `[prompt | answer | answer | prompt | answer …]`, each prompt once.

A token of a prompt sees the prompt up to itself; a token of an answer sees its prompt and the answer up to itself.
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
    """Tokens that are computed in one go, and what they see: all of the trunk before them, and each other causally.

    Places are `(start, end)` in the packed row; positions count from the start of the trunk.
    """

    trunk: tuple[int, int]
    own: tuple[int, int]

    @property
    def first_position(self) -> int:
        """The position of the first own token."""
        return self.trunk[1] - self.trunk[0]

    def places(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The positions from start to end, as places in the row: one or two runs."""
        border = self.first_position
        if start < border:
            yield self.trunk[0] + start, self.trunk[0] + min(end, border)
        if end > border:
            yield self.own[0] + max(start, border) - border, self.own[0] + end - border


@dataclass
class Layout:
    """Groups of one trunk and its branches, packed one after the other into one row without padding.

    Attributes:
        groups: (length of the trunk, lengths of its branches), in tokens; any of them may be 0.
        paths: in the order in which they stand in the row.
        starts: for each group the places where its trunk and each of its branches start.
        windows: what each layer that ran asked for: the length of a sliding window, or None.
    """

    groups: tuple[tuple[int, tuple[int, ...]], ...]
    paths: list[Segment] = field(init=False, repr=False)
    starts: list[list[int]] = field(init=False, repr=False)
    windows: list[int | None] = field(init=False, repr=False, default_factory=list)
    _masks: dict = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self):
        self.paths, self.starts, place = [], [], 0
        for trunk_length, branches in self.groups:
            trunk = (place, place + trunk_length)
            own = [(place, place), trunk]  # the trunk itself is a path that sees nothing before it
            self.paths.append(Segment((place, place), trunk))
            place += trunk_length
            for length in branches:
                own.append((place, place + length))
                self.paths.append(Segment(trunk, own[-1]))
                place += length
            self.starts.append([start for start, _ in own[1:]])
        self.tokens = place

    def positions(self) -> Tensor:
        """Position ids, int64 `(1, tokens)`: those of every branch go on where its trunk ends."""
        runs = [torch.arange(p.first_position, p.first_position + p.own[1] - p.own[0]) for p in self.paths]
        return torch.cat(runs)[None]

    def block_mask(self, window: int | None, device: torch.device) -> "BlockMask":
        """The same for FlexAttention; made once for each window. Its blocks are found a row of them at a time: all by
        all at once would take a hundred times the memory of the mask."""
        if window not in self._masks:
            self._masks[window] = self._block_mask(window, device)
        return self._masks[window]

    def _block_mask(self, window: int | None, device: torch.device) -> "BlockMask":
        from torch.nn.attention.flex_attention import BlockMask  # takes a second, and CPUs do without

        group, branch, position = (tensor.to(device) for tensor in (*self._numbers(), self.positions()[0]))

        def sees(_batch, _head, query, key):
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
        partly, fully = (_listed(blocks) for blocks in (some & ~every, every))
        return BlockMask.from_kv_blocks(
            *partly, *fully, BLOCK_SIZE=_BLOCK, mask_mod=sees, seq_lengths=(self.tokens, self.tokens)
        )

    def _numbers(self) -> tuple[Tensor, Tensor]:
        """The group of each token, and its branch in there: 0 in a trunk."""
        group, branch = torch.zeros(2, self.tokens, dtype=torch.int32)
        for number, starts in enumerate(self.starts):
            for which, start in enumerate(starts):
                group[start:], branch[start:] = number, which
        return group, branch


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix of blocks as FlexAttention wants it: for each row how many there are, and which, those first."""
    counts = blocks.sum(dim=1, dtype=torch.int32)
    return counts[None, None], blocks.int().argsort(dim=1, descending=True, stable=True).int()[None, None]
