"""For rows that fit in no other way: what a forward pass keeps for its backward is held in the computer's memory, and
the widest part of each layer runs some tokens at a time."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qalign.model.adapters.targets import decoder_layers
from qalign.model.logps import backbone

TILE = 2048  # tokens
_SMALLEST = 2**20  # bytes: copies of less cost more time than they are worth
_PIECE = 2**26  # bytes: PyTorch rounds pinned memory up to powers of two, so larger tensors are held in pieces


class _Held:
    """A tensor in the computer's memory. On the meta device nothing is held."""

    def __init__(self, tensor: Tensor):
        self.shape, self.like = tensor.shape, tensor.new_empty(0)
        self.pieces: list[Tensor] = []
        for piece in tensor.reshape(-1).split(_PIECE // tensor.itemsize) if not tensor.is_meta else ():
            held = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=piece.is_cuda)
            # The host doesn't wait. Both copies are in the order of the stream that computes, and PyTorch reuses pinned
            # memory only once they are done.
            self.pieces.append(held.copy_(piece, non_blocking=True))

    def tensor(self) -> Tensor:
        """It on its own device, with the same bits."""
        found = self.like.new_empty(self.shape)
        for place, held in zip(found.view(-1).split(_PIECE // found.itemsize), self.pieces, strict=False):
            place.copy_(held, non_blocking=True)
        return found


class Offload:
    """Whatever the backbone of a model keeps for its backward pass, except weights, is held in the computer's memory
    until the backward pass asks for it. With checkpointed layers these are the inputs of the layers. And `wide`
    modules, which work on each token by itself, run on tiles of tokens, checkpointed. The copies have the same bits;
    tiles change no more than another micro-batch does.

    Attributes:
        bytes: held of the last forward pass.
    """

    def __init__(self, lm: PreTrainedModel, wide: Iterable[nn.Module], *, tile: int = TILE, smallest: int = _SMALLEST):
        self.lm, self.wide, self.tile, self.smallest, self.bytes = lm, list(wide), tile, smallest, 0
        self._open: list[saved_tensors_hooks] = []
        self._hooks = [backbone(lm).register_forward_pre_hook(self._begin)]
        # Also for each layer: where several roles visit a layer together, it runs in another thread than the model.
        for module in (backbone(lm), *(decoder_layers(lm) or ())):
            self._hooks.append(module.register_forward_pre_hook(self._enter))
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))
        self._own = [vars(module).get("forward") for module in self.wide]  # of those with fused kernels
        for module in self.wide:
            module.forward = partial(self._in_tiles, module.forward)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for module, own in zip(self.wide, self._own, strict=True):
            del module.forward  # what is left is that of its class
            if own is not None:
                module.forward = own

    def _in_tiles(self, forward: Callable[..., Tensor], states: Tensor) -> Tensor:
        if states.shape[1] <= self.tile:
            return forward(states)
        run = forward
        if torch.is_grad_enabled():
            run = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=not states.is_meta)
        return torch.cat([run(piece) for piece in states.split(self.tile, dim=1)], dim=1)

    def _begin(self, *_: Any) -> None:
        if not torch.is_grad_enabled():
            return
        self.bytes = 0
        known: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # storages, with what of them is held
        for tensor in (*self.lm.parameters(), *self.lm.buffers()):
            known[tensor.untyped_storage()] = None

        def pack(tensor: Tensor) -> Tensor | _Held:
            views = known.setdefault(tensor.untyped_storage(), {}) if tensor.nbytes >= self.smallest else None
            if views is None:
                return tensor
            view = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
            if view not in views:
                views[view] = _Held(tensor)
                self.bytes += tensor.nbytes
            return views[view]

        self._pack = pack

    def _enter(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            unpack: Callable[[Any], Tensor] = lambda kept: kept.tensor() if isinstance(kept, _Held) else kept  # noqa: E731
            self._open.append(saved_tensors_hooks(self._pack, unpack))
            self._open[-1].__enter__()

    def _leave(self, *_: Any) -> None:
        if torch.is_grad_enabled() and self._open:
            self._open.pop().__exit__()


def offload(lm: PreTrainedModel) -> Offload:
    """Offloads what the layers of a loaded model keep, all of which are to be checkpointed."""
    layers = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    ids = torch.arange(1, 9, device=lm.device)[None]
    return Offload(lm, wide_modules(layers, lambda: backbone(lm)(input_ids=ids, use_cache=False)))


def wide_modules(layers: Iterable[nn.Module], run: Callable[[], object]) -> list[nn.Module]:
    """The largest module of each layer that works on each token by itself; `run` runs the model on a few tokens. It is
    called with hidden states `(1, tokens, width)` alone and returns the like, and halves give what the whole gives. On
    the meta device, where numbers don't tell, it isn't looked for in layers without attention."""
    seen: dict[nn.Module, tuple[Any, Any]] = {}
    children = {layer: list(layer.children()) for layer in layers}

    def note(child: nn.Module, given: Any, found: Any) -> None:
        seen[child] = given, found

    hooks = [child.register_forward_hook(note) for each in children.values() for child in each]
    with torch.no_grad():
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        found = []
        for each in children.values():
            fit = [child for child in each if child in seen and _works_on_tokens(child, *seen[child])]
            found += [max(fit, key=_size)] if fit else []
    return found


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _works_on_tokens(module: nn.Module, given: tuple[Any, ...], found: Any) -> bool:
    if len(given) != 1 or not isinstance(found, Tensor) or found.shape != given[0].shape or found.dim() != 3:
        return False
    if sum(parameter.dim() > 1 for parameter in module.parameters()) < 2:  # a norm, or a single projection
        return False
    if found.is_meta:
        return True
    half = found.shape[1] // 2
    parts = torch.cat([module(piece) for piece in given[0].split([half, found.shape[1] - half], dim=1)], dim=1)
    return torch.allclose(parts, found, rtol=0, atol=1e-2 * found.abs().max().item())
