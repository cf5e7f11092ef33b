"""LoRA adapters as sampling holds them: in the dtype of matrix products, with the scale in B, added to the base's
output in place.

PEFT casts A and B from float32 at every token, clones the base's output, scales and adds: 11 kernels more a layer. With
these copies it is two. Adapters that are more than LoRA on linear layers keep PEFT's own forward.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from typing import cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qalign.model.base import Base, Role
from qalign.model.logps import backbone

Spans = tuple[tuple[str, tuple[int, int] | None], ...]  # (role, its first row and the row after its last: None, all)
Pair = tuple[Tensor, Tensor, Tensor | None]  # A `(in, rank)`, B `(rank, out)` times the scale, the bias times the scale


class HeldAdapters:
    """Copies of the adapters of some roles, for a base in the role `base`."""

    def __init__(self):
        self._pairs: dict[str, dict[nn.Module, Pair]] = {}  # by role and layer of the base
        self._apart: dict[frozenset[nn.Module], bool] = {}
        self._spans: Spans = ()  # of the forward pass that is running; between two of them, the base is as it was

    @property
    def bytes(self) -> int:
        """Memory of the copies."""
        pairs = (pair for layers in self._pairs.values() for pair in layers.values())
        return sum(tensor.nbytes for pair in pairs for tensor in pair if tensor is not None)

    def hold(self, base: Base, roles: Iterable[str]) -> bool:
        """Copies the adapters of these roles as they are now. Copies that are there already are written over, because
        CUDA graphs read them where they lie; returns whether some had to be replaced."""
        replaced = False
        for role in set(roles):
            held = cast(list[LoraLayer], base.adapter_layers(role))
            layers = {layer.get_base_layer(): _copy(layer, role, base.dtype) for layer in held}
            before = self._pairs.get(role)
            if before is not None and _shapes(before) == _shapes(layers):
                pairs = (
                    (old, new) for layer, pair in before.items() for old, new in zip(pair, layers[layer], strict=True)
                )
                for old, new in pairs:
                    if old is not None and new is not None:
                        old.copy_(new)
            else:
                self._pairs[role], replaced = layers, replaced or before is not None
        return replaced

    def drop(self) -> None:
        """Frees the copies."""
        self._pairs.clear()

    @contextmanager
    def on(self) -> Iterator[None]:
        """Puts the held adapters on the base's layers. They do something inside `answering` alone."""
        layers = {layer for held in self._pairs.values() for layer in held}
        with ExitStack() as hooks:
            for layer in layers:
                pairs = {role: held[layer] for role, held in self._pairs.items() if layer in held}
                hooks.callback(layer.register_forward_hook(partial(self._add, pairs)).remove)
            yield

    @contextmanager
    def answering(self, spans: Spans) -> Iterator[None]:
        """Forward passes in it are the roles' of `spans`, each on its rows."""
        self._spans = spans
        try:
            yield
        finally:
            self._spans = ()

    def _add(self, pairs: dict[str, Pair], _layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for role, rows in self._spans:
            if (pair := pairs.get(role)) is None:
                continue
            into, out, bias = pair
            states, part = inputs[0], output
            if rows is not None:
                states, part = states[slice(*rows)], part[slice(*rows)]
            low = torch.mm(states.reshape(-1, len(into)), into)
            if part.dtype == out.dtype and part.is_contiguous():
                part.view(-1, out.shape[1]).addmm_(low, out)
            else:
                part += (low @ out).view_as(part)
            if bias is not None:
                part += bias

    def mixes(self, base: Base, roles: Iterable[str]) -> bool:
        """Whether the rows of one batch may be of all these roles: their adapters are served, and every layer with one
        is given the rows of a batch apart. (Some shared experts are given the tokens of all rows as one row.)"""
        if not all(serves(base, role) for role in roles):
            return False
        layers = frozenset(layer.get_base_layer() for role in roles for layer in base.adapter_layers(role))
        if layers not in self._apart:
            self._apart[layers] = _keeps_rows_apart(base, layers)
        return self._apart[layers]


def serves(base: Base, role: str) -> bool:
    """Whether a role is the bare base, or plain LoRA on linear layers."""
    return is_plain_lora(getattr(base.model, "peft_config", {}).get(role)) and all(
        isinstance(layer, LoraLayer)
        and isinstance(layer.get_base_layer(), nn.Linear | Conv1D)
        and type(layer.lora_A[role]) is type(layer.lora_B[role]) is nn.Linear
        and role not in layer.lora_variant
        for layer in base.adapter_layers(role)
    )


def _keeps_rows_apart(base: Base, layers: Iterable[nn.Module]) -> bool:
    batch, sizes = torch.ones(3, 2, dtype=torch.int64, device=base.lm.device), set[int]()
    with ExitStack() as hooks, torch.no_grad(), base.acting_as(Role.BASE):
        for layer in layers:
            hook = layer.register_forward_pre_hook(lambda _, inputs: sizes.add(len(inputs[0])))
            hooks.callback(hook.remove)
        backbone(base.lm)(input_ids=batch, use_cache=False)
    return sizes <= {len(batch)}


def _copy(layer: LoraLayer, role: str, dtype: torch.dtype) -> Pair:
    into, out = cast(nn.Linear, layer.lora_A[role]), cast(nn.Linear, layer.lora_B[role])
    scale = layer.scaling[role]
    bias = None if out.bias is None else (out.bias.detach() * scale).to(dtype)
    return into.weight.detach().to(dtype).t(), (out.weight.detach() * scale).to(dtype).t(), bias


def _shapes(layers: dict[nn.Module, Pair]) -> dict[nn.Module, list[torch.Size | None]]:
    return {layer: [None if each is None else each.shape for each in pair] for layer, pair in layers.items()}


def is_plain_lora(config: LoraConfig | None) -> bool:
    """Whether an adapter has nothing but LoRA on layers; also without an adapter."""
    return config is None or not (config.use_dora or config.modules_to_save or config.trainable_token_indices)


def spans_of(roles: Sequence[str]) -> Spans:
    """The rows of each role in a batch, by the role of each row."""
    if len(set(roles)) == 1:
        return ((roles[0], None),)
    found, start = [], 0
    for role, rows in groupby(roles):
        found.append((role, (start, start := start + sum(1 for _ in rows))))
    return tuple(found)
