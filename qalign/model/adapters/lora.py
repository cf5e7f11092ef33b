"""LoRA on linear layers as it is trained: added to what the base's layer gives, in one product.

PEFT's own forward clones what a 4-bit layer gives, multiplies by the scale and adds: three passes over memory that this
does without. On a CPU it also casts inputs to float32 and back. PEFT still owns the weights; its layers stay where they
are, switched off, and hooks on the base's layers add the active adapter.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


class AddedLora:
    """What adds the active adapter to the linear layers that have one, wherever it is plain LoRA."""

    def __init__(self, layers: Iterable[nn.Module]):
        self._active: str | None = None
        self._together: tuple[str, ...] = ()
        found = [cast(LoraLayer, layer) for layer in layers if isinstance(layer, LoraLayer)]
        self._layers = [layer for layer in found if isinstance(layer.get_base_layer(), nn.Linear)]
        self._plain: dict[str, set[LoraLayer]] = {}  # by adapter, the layers where it is plain LoRA
        self._off: set[LoraLayer] = set()
        self._hooks = [
            layer.get_base_layer().register_forward_hook(partial(self._add, layer)) for layer in self._layers
        ]

    def activate(self, adapter: str | None) -> None:
        """Adds this adapter from now on, and switches PEFT's layers off where it does."""
        self._active = adapter
        if adapter is None:
            return
        if adapter not in self._plain:
            self._plain[adapter] = {layer for layer in self._layers if is_plain(layer, adapter)}
        for layer in self._off ^ self._plain[adapter]:
            layer.enable_adapters(layer in self._off)
            self._off ^= {layer}

    def route(self, adapters: Sequence[str]) -> None:
        """From now on the layers that have these adapters give each an equal part of their tokens, in this order; none
        ends it. The first of them must be active, and all plain in every layer that has one (`routes`)."""
        self._together = tuple(adapters)

    def routes(self, adapters: Sequence[str]) -> list[nn.Module] | None:
        """The base's layers that have these adapters; None where `route` can't serve them."""
        found = [layer for layer in self._layers if adapters[0] in layer.lora_A]
        for layer in found:
            if not all(name in layer.lora_A and is_plain(layer, name) for name in adapters):
                return None
            if len({(cast(nn.Linear, layer.lora_A[name]).weight.shape, layer.scaling[name]) for name in adapters}) > 1:
                return None
        return [layer.get_base_layer() for layer in found]

    def close(self) -> None:
        """Leaves the layers to PEFT."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._off:
            layer.enable_adapters(True)

    def _add(self, layer: LoraLayer, own: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self._active is None or layer not in self._off or self._active not in layer.lora_A:
            return None
        names = self._together or (self._active,)
        weights = [[cast(nn.Linear, part[name]).weight for name in names] for part in (layer.lora_A, layer.lora_B)]
        (into, *_), (out, *_) = weights
        kind = output.device.type
        dtype = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else into.dtype
        states = cast(nn.Module, layer.lora_dropout[self._active])(inputs[0])
        if self._together:
            into, out = (torch.stack(each).to(dtype) for each in weights)
            return _added_to_parts(output, states.to(dtype), into, out, layer.scaling[self._active])
        # A 4-bit layer's output is its own and new, but with a bias it is a view, as that of others may be. (The meta
        # device stands for all kinds.)
        is_new = isinstance(own, Linear4bit) or output.is_meta
        in_place = is_new and getattr(own, "bias", None) is None and output.is_contiguous()
        given = (output, states.to(dtype), into.to(dtype), out.to(dtype), layer.scaling[self._active], in_place)
        return cast(Tensor, _AddLowRank.apply(*given))


def is_plain(layer: LoraLayer, adapter: str) -> bool:
    """Whether an adapter is in this layer what LoRA is by itself: two matrices and a scale. Also where it has none."""
    if adapter not in layer.lora_A:
        return True
    linear = type(layer.lora_A[adapter]) is type(layer.lora_B[adapter]) is nn.Linear
    return linear and layer.lora_B[adapter].bias is None and adapter not in layer.lora_variant


def _added_to_parts(output: Tensor, states: Tensor, into: Tensor, out: Tensor, scale: float) -> Tensor:
    """output + scale · states Aᵀ Bᵀ, with matrices for each of as many equal parts of the tokens: A `(parts, rank, in)`
    and B `(parts, out, rank)`."""
    low = torch.bmm(states.reshape(len(into), -1, states.shape[-1]), into.mT)
    parts = output.reshape(len(into), -1, output.shape[-1])
    return torch.baddbmm(parts, low.to(output.dtype), out.mT.to(output.dtype), alpha=scale).view_as(output)


class _AddLowRank(torch.autograd.Function):
    """output + scale · states Aᵀ Bᵀ, of `output` `(…, out)`, `states` `(…, in)`, A `(rank, in)` and B `(out, rank)`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, states: Tensor, into: Tensor, out: Tensor, scale: float, in_place: bool):
        low = states.flatten(0, -2) @ into.t()
        ctx.save_for_backward(states, low, into, out)
        ctx.scale = scale
        if output.dtype != low.dtype:
            return output + (low @ out.t()).mul_(scale).view_as(output).to(output.dtype)
        if in_place:
            ctx.mark_dirty(output)
        else:
            output = output.clone(memory_format=torch.contiguous_format)
        output.view(-1, len(out)).addmm_(low, out.t(), alpha=scale)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        states, low, into, out = ctx.saved_tensors
        slope = grad_outputs[0].flatten(0, -2).to(low.dtype)
        low_slope = (slope @ out).mul_(ctx.scale)
        needs = ctx.needs_input_grad
        return (
            grad_outputs[0],
            (low_slope @ into).view_as(states) if needs[1] else None,
            low_slope.t() @ states.flatten(0, -2) if needs[2] else None,
            (slope.t() @ low).mul_(ctx.scale) if needs[3] else None,
            None,
            None,
        )
