"""One layer of each kind instead of all layers of a model: what all of them take is worked out from these."""

from collections.abc import Callable
from contextlib import suppress
from itertools import product
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qalign.model.adapters.targets import decoder_layers


class _Skipped(nn.Module):
    """In place of a layer: passes on the hidden states that it is given, in a tuple if layers of its family do."""

    def __init__(self, *, in_tuple: bool):
        super().__init__()
        self.in_tuple = in_tuple

    def forward(self, hidden_states: Any, *_: Any, **__: Any) -> Any:
        return (hidden_states,) if self.in_tuple else hidden_states


def keep_one_of_each_kind(lm: PreTrainedModel, trial: Callable[[], bool]) -> dict[nn.Module, int]:
    """Replaces layers by ones that do nothing, so that one of each kind is left, if the model can run so: `trial` runs
    it and says whether its states have the right shape. Returns the layers that are left, and how many of their kind
    there were."""
    config, layers = lm.config.get_text_config(), decoder_layers(lm)
    if layers is None:
        trial()
        return {}
    count = len(layers)
    types, all_layers, kinds = getattr(config, "layer_types", None) or [None] * count, list(layers), {}
    for number, layer in enumerate(all_layers):
        shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
        kinds.setdefault((types[number], type(layer), shapes), []).append(number)
    # Some layers use the keys of the last ones of other kinds, some those of earlier ones.
    for which, in_tuple in product((-1, 0), (False, True)):
        kept = {numbers[which]: len(numbers) for numbers in kinds.values()}
        for number in range(count):
            layers[number] = all_layers[number] if number in kept else _Skipped(in_tuple=in_tuple)
        with suppress(AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            if trial():
                return {all_layers[number]: many for number, many in kept.items()}
    for number, layer in enumerate(all_layers):
        layers[number] = layer
    trial()
    return dict.fromkeys(all_layers, 1)
