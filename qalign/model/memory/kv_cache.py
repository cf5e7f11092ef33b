"""What a model caches while it samples: what the model calls it, whether it is exact, and the memory that it takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from qalign.model.logps import backbone, head_logits
from qalign.model.memory.step import LiveBytes
from qalign.model.origin import note

_SHORT, _LONGER = 2, 4  # tokens of the rows that are measured: shorter than any window
_NAMES = ("past_key_values", "cache_params")  # what models call a cache that is given to them


@dataclass(frozen=True)
class RowCache:
    """What one row takes in a model's cache, or without one in a forward pass. `layers` has for each layer its bytes
    with `_SHORT` tokens, how many each further token adds, and the most tokens that it keeps (None if all)."""

    layers: tuple[tuple[int, int, int | None], ...]
    name: str | None  # of the model's argument; None if it must be sampled without a cache

    def bytes(self, tokens: int, *, windows: bool = True) -> int:
        """Bytes of a row of this many tokens; without `windows`, layers with a sliding window keep all of them."""
        kept = [(fixed, each, (windows and most) or tokens) for fixed, each, most in self.layers]
        return sum(fixed + each * (min(tokens, most) - _SHORT) for fixed, each, most in kept)


@torch.no_grad()
def measured_cache(lm: PreTrainedModel) -> RowCache:
    """Measures a model's cache with two short rows, on any device. Where there are numbers, not on the meta device, it
    also tries whether the cache is exact."""
    for name in _NAMES:
        found = [_filled(lm, name, length) for length in (_SHORT, _LONGER)]
        if not sum(size for size, _ in found[0]):
            continue
        if lm.device.type != "meta" and (reason := _wrong(lm, name)):
            return _without(lm, reason)
        pairs = zip(*found, strict=True)
        layers = ((few, (more - few) // (_LONGER - _SHORT), most) for (few, most), (more, _) in pairs)
        return RowCache(tuple(layers), name)
    return _without(lm, "doesn't take transformers' DynamicCache")


def _filled(lm: PreTrainedModel, name: str, length: int) -> list[tuple[int, int | None]]:
    """Of each layer of a cache that the model has filled: its bytes, and the most tokens that it keeps."""
    ids, cache = torch.ones(1, length, dtype=torch.int64, device=lm.device), DynamicCache(config=lm.config)
    try:
        backbone(lm)(input_ids=ids, use_cache=True, **{name: cache})
    except (AttributeError, TypeError, ValueError):
        return [(0, None)]
    return [(_bytes(vars(layer)), getattr(layer, "sliding_window", None)) for layer in cache.layers]


def _wrong(lm: PreTrainedModel, name: str) -> str | None:
    """What is wrong with answers that are sampled with a cache, in words. Tokens behind prompts of two lengths must get
    the hidden states of whole rows, after the rows of the cache were put in another order."""
    model, is_wide = backbone(lm), torch.finfo(lm.dtype).eps < 1e-4
    ids = torch.arange(1, 12, device=lm.device) * (lm.config.get_text_config().vocab_size - 1) // 12
    prompts, more = (ids[:1], ids[1:9]), ids[9:, None]
    inputs = padded_prompts(prompts, 1) | {name: DynamicCache(config=lm.config), "use_cache": True}
    try:
        first = model(**inputs).last_hidden_state[0, -1].float()
        other = model(**padded_prompts(prompts, int(ids[6])), use_cache=False).last_hidden_state[0, -1].float()
        inputs[name].reorder_cache(torch.tensor([1, 0], device=lm.device))
        mask = torch.cat([inputs["attention_mask"].flip(0), torch.ones_like(more)], dim=1)
        positions = inputs["position_ids"].flip(0)[:, -1:] + 1
        inputs |= {"input_ids": more, "attention_mask": mask, "position_ids": positions}
        found = model(**inputs).last_hidden_state[:, -1].float()
    except (AttributeError, TypeError, ValueError, NotImplementedError):
        return "can't pad or reorder the rows of its cache"
    if (first - other).norm() > (1e-3 if is_wide else 0.02) * first.norm():  # what is left out adds no rounding
        return "reads the padding of shorter prompts"
    rows = [torch.cat([prompt, token]) for prompt, token in zip(reversed(prompts), more, strict=True)]
    expected = [model(input_ids=row[None], use_cache=False).last_hidden_state[0, -1].float() for row in rows]
    most = 1e-3 if is_wide else 0.1  # as for packed rows
    is_same = all((a - b).norm() <= most * b.norm() for a, b in zip(found, expected, strict=True))
    return None if is_same else "gives other answers with its cache than without"


def _without(lm: PreTrainedModel, reason: str) -> RowCache:
    """What rows take in a forward pass; a note says why."""
    note(f"note: {type(lm).__name__} is sampled without a cache, slowly, as it {reason}")
    peaks = []
    for length in (_SHORT, _LONGER):
        with LiveBytes() as counted:
            backbone(lm)(input_ids=torch.ones(1, length, dtype=torch.int64, device=lm.device), use_cache=True)
        peaks.append(counted.peak)
    few, more = peaks
    return RowCache(((few, (more - few) // (_LONGER - _SHORT), None),), None)


def padded_prompts(prompts: Sequence[Tensor], pad_id: int) -> dict[str, Any]:
    """Prompts as rows, padded on the left, so that all answers begin in the same column."""
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], True, 0, padding_side="left")
    return {
        "input_ids": pad_sequence(list(prompts), True, pad_id, padding_side="left"),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
    }


def uncached_logits(lm: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """Logits after the last tokens of rows as `padded_prompts` makes them: `(rows, vocabulary)`. Whole rows are run,
    padded on the right instead, where no token sees it."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    padding, place = (1 - mask).sum(dim=1, keepdim=True), torch.arange(ids.shape[1], device=ids.device)
    moved = ids.gather(1, (place + padding) % ids.shape[1])
    states = backbone(lm)(input_ids=moved, use_cache=False).last_hidden_state
    return head_logits(lm, states[torch.arange(len(ids), device=ids.device), -1 - padding[:, 0]])


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes if value.is_floating_point() else 0
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_bytes, inner))
