"""The memory of what a model caches while it samples: keys and values, and the states of layers without attention."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from qalign.errors import UserError

_SHORT, _LONGER = 2, 4  # tokens of the rows that are measured: shorter than any window


@dataclass(frozen=True)
class RowCache:
    """What one row takes in a model's cache. `layers` has for each layer its bytes with `_SHORT` tokens, how many each
    further token adds, and the most tokens that it keeps (None if all)."""

    layers: tuple[tuple[int, int, int | None], ...]

    def bytes(self, tokens: int, *, windows: bool = True) -> int:
        """Bytes of a row of this many tokens; without `windows`, layers with a sliding window keep all of them."""
        kept = [(fixed, each, (windows and most) or tokens) for fixed, each, most in self.layers]
        return sum(fixed + each * (min(tokens, most) - _SHORT) for fixed, each, most in kept)


@torch.no_grad()
def measured_cache(lm: PreTrainedModel) -> RowCache:
    """Measures a model's cache with two short rows, on any device, the meta device too; a `UserError` if it has a cache
    of its own, from which rows can't be taken by their number."""
    found: list[list[tuple[int, int | None]]] = []
    for length in (_SHORT, _LONGER):
        ids, cache = torch.ones(1, length, dtype=torch.int64, device=lm.device), DynamicCache(config=lm.config)
        try:
            lm.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        except (TypeError, ValueError) as error:
            raise _own_cache(lm, str(error)) from None
        found.append([(_bytes(vars(layer)), getattr(layer, "sliding_window", None)) for layer in cache.layers])
    if not sum(size for size, _ in found[0]):
        raise _own_cache(lm, "it left transformers' DynamicCache empty")
    pairs = zip(*found, strict=True)
    return RowCache(tuple((few, (more - few) // (_LONGER - _SHORT), most) for (few, most), (more, _) in pairs))


def _own_cache(lm: PreTrainedModel, reason: str) -> UserError:
    return UserError(f"model.base: {type(lm).__name__} can't be sampled from, as it has a cache of its own ({reason})")


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes if value.is_floating_point() else 0
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_bytes, inner))
