"""A cache of fixed size, for CUDA graphs: rows are filled, masked and moved, but its tensors stay where they are.

Every layer that attends has all columns, and a sliding window is in the mask alone. So the next token's column is the
same in all layers: one number on the device, which a graph counts up by itself.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

# Others hold more than these classes know of.
_SERVED = {
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
}
_STATES = ("conv_states", "recurrent_states")
_FLAGS = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size")


class UnservedError(Exception):
    """Why a model can't be run with a static cache, in words."""


class _Keys(CacheLayerMixin):
    """The keys and values of a layer, `(rows, heads, columns, size)` each. A token is written at `column`, which
    `Steps` counts up."""

    is_compileable = True  # so transformers makes the masks without asking the device
    is_sliding = False

    def __init__(self, tensors: tuple[Tensor, ...], column: Tensor):
        super().__init__()
        self.hold(tensors, column)

    def hold(self, tensors: tuple[Tensor, ...], column: Tensor) -> None:
        self.keys, self.values = tensors
        self.column, self.length = column, column.view(())
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is left to do: it was made with its tensors."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.keys, self.values
        if keys is None or values is None or key_states.shape[2] != 1:
            raise UnservedError("a layer writes other than one token at a time")
        keys.index_copy_(2, self.column, key_states)
        values.index_copy_(2, self.column, value_states)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_max_length(), 0

    def get_seq_length(self) -> Any:
        return self.length

    def get_max_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]


class _KeysAndStates(LinearAttentionLayer, _Keys):
    """A layer that has both."""

    def __init__(self, tensors: tuple[Tensor, ...], column: Tensor):
        LinearAttentionLayer.__init__(self)
        self.hold(tensors, column)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is left to do: it was made with its tensors."""

    def get_max_length(self) -> int:
        return _Keys.get_max_length(self)


class _Layer:
    """The tensors of one layer for the most rows and columns, made for a layer of a cache that has read prompts."""

    def __init__(self, like: Any, rows: int, columns: int):
        if type(like) not in _SERVED:
            raise UnservedError(f"the model has a {type(like).__name__} in its cache")
        self._flags: dict[str, Any] = {}
        self.keys = [each.new_zeros(rows, each.shape[1], columns, each.shape[3]) for each in _keys(like)]
        self.states = {place: each.new_zeros(rows, *each.shape[1:]) for place, each in _states(like).items()}
        if self.states:
            self._flags = {name: dict(getattr(like, name)) for name in _FLAGS}
            self._flags |= {"dtype": like.dtype, "device": like.device, "number_of_states": like.number_of_states}

    def fill(self, layer: Any, rows: Tensor, columns: int) -> None:
        """Takes these rows of a layer that has read `columns` tokens; a sliding window has the last of them alone."""
        for place, found in _states(layer).items():
            self.states[place][: len(rows)] = found[rows]
        for mine, found in zip(self.keys, _keys(layer), strict=True):
            mine[: len(rows), :, columns - found.shape[2] : columns] = found[rows]

    def keep(self, rows: Tensor, columns: int) -> None:
        """Keeps these rows, as the first ones."""
        for mine in self.states.values():
            mine[: len(rows)] = mine[rows]
        for mine in self.keys:
            mine[: len(rows), :, :columns] = mine[rows, :, :columns]

    def view(self, rows: int, columns: int, column: Tensor) -> Any:
        """A layer of a cache that holds the first rows and columns."""
        keys = tuple(mine[:rows, :, :columns] for mine in self.keys)
        if not self.states:
            return _Keys(keys, column) if keys else DummyLayer()
        states: dict[str, dict[int, Tensor | None]] = {
            name: dict.fromkeys(range(self._flags["number_of_states"])) for name in _STATES
        }
        for (name, number), mine in self.states.items():
            states[name][number] = mine[:rows]
        layer = _KeysAndStates(keys, column) if keys else LinearAttentionLayer()
        vars(layer).update(self._flags | states)
        return layer


class StaticCache:
    """What the rows of a batch have read, and what their next step reads; all of it stays where it is.

    Attributes:
        rows, columns: the most of each.
        tokens, positions: int64 `(rows, 1)`, of the next step.
        mask: int64 `(rows, columns)`, 0 for padding and for columns that aren't written yet.
        column: int64 `(1,)`, where the next token goes.
    """

    def __init__(self, cache: DynamicCache, rows: int, columns: int, device: torch.device):
        self.rows, self.columns = rows, columns
        self._layers = [_Layer(layer, rows, columns) for layer in cache.layers]
        self.tokens, self.positions, self.mask, self.column = (
            torch.zeros(shape, dtype=torch.int64, device=device) for shape in ((rows, 1), (rows, 1), (rows, columns), 1)
        )

    @property
    def bytes(self) -> int:
        """Memory of the keys, values and states."""
        return sum(mine.nbytes for layer in self._layers for mine in (*layer.keys, *layer.states.values()))

    def fill(self, cache: DynamicCache, mask: Tensor, positions: Tensor, rows: Tensor) -> None:
        """Takes these rows of a cache that has read prompts; a row may be named several times.

        Args:
            mask: int64 `(prompts, tokens)`, 0 for padding.
            positions: int64 `(prompts, tokens)`.
            rows: int64 `(rows,)`, the number of each row's prompt.
        """
        read = mask.shape[1]
        for mine in (self.mask, self.positions, self.tokens):
            mine.zero_()
        self.mask[: len(rows), :read] = mask[rows]
        self.positions[: len(rows)] = positions[rows, -1:] + 1
        self.column.fill_(read)
        for mine, layer in zip(self._layers, cache.layers, strict=True):
            mine.fill(layer, rows, read)

    def keep(self, rows: Tensor, columns: int) -> None:
        """Keeps these rows, as the first ones, of which `columns` are written."""
        for layer in self._layers:
            layer.keep(rows, columns)
        for mine in (self.mask, self.positions):
            mine[: len(rows)] = mine[rows]

    def inputs(self, rows: int, columns: int) -> dict[str, Any]:
        """What the language model reads in a step of the first rows and columns."""
        return {
            "input_ids": self.tokens[:rows],
            "attention_mask": self.mask[:rows, :columns],
            "position_ids": self.positions[:rows],
            "past_key_values": Cache(layers=[layer.view(rows, columns, self.column) for layer in self._layers]),
            "use_cache": True,
        }


def _keys(layer: Any) -> list[Tensor]:
    """Keys and values; nothing of a layer that reads another one's."""
    return [layer.keys, layer.values] if getattr(layer, "keys", None) is not None and layer.keys.numel() else []


def _states(layer: Any) -> dict[tuple[str, int], Tensor]:
    return {
        (name, number): state
        for name in _STATES
        for number, state in getattr(layer, name, {}).items()
        if state is not None
    }
