"""For a base that is larger than the card: the weights of its layers are held outside of the device, and copied there
layer by layer, while the layer before is at work.

The device has two slots. Layer i always comes into slot i % 2, and its tensors are views of that slot for good. So
nothing is ever moved or repacked, and whatever autograd or bitsandbytes keeps of a layer's weights is right again as
soon as the layer is back in its slot: forward and backward compute what they would with all weights in memory.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import psutil
import torch
from bitsandbytes.nn.modules import Linear8bitLt
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from qalign.errors import UserError
from qalign.model.adapters.targets import decoder_layers
from qalign.model.memory.first_step import free_unused, is_out_of_memory

SLOTS = 2
_ALIGNED = 256  # bytes: where a tensor may begin in a slot, as in PyTorch's own allocator for CUDA
_PIECE = 2**26  # bytes: PyTorch rounds pinned memory up to powers of two, so a layer is held in pieces
_STREAMS: WeakKeyDictionary[nn.Module, "LayerStream"] = WeakKeyDictionary()


def scales_of(tensor: Tensor) -> list[Tensor]:
    """The scales of a 4-bit weight, and the values that its numbers stand for; none of another tensor."""
    if (state := getattr(tensor, "quant_state", None)) is None:
        return []
    nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    return [state.absmax, state.code, *nested]


class LayerStream:
    """The layers of a model, two of which are on the device at a time.

    Attributes:
        count: the number of layers.
        layer_bytes: the weights of all layers, which a visit of all layers copies.
        slot_bytes: what the device holds of them at any time.
        copies, copied_bytes: layers copied to the device so far, and their bytes.
        source: where the weights are held, in words.
    """

    def __init__(self, lm: PreTrainedModel, device: torch.device):
        if (layers := decoder_layers(lm)) is None:
            raise UserError(f"model.stream: the layers of {type(lm).__name__} don't stand in one list; set it to never")
        # A tensor that several layers share, such as the values of 4-bit numbers, stays on the device.
        owned = [by_address(layer) for layer in layers]
        owners = Counter(address for tensors in owned for address in tensors)
        streamed = [{a: t for a, t in tensors.items() if owners[a] == 1} for tensors in owned]
        sizes = [_size(tensors) for tensors in streamed]
        self.count, self.layer_bytes, self.slot_bytes = len(layers), sum(sizes), SLOTS * max(sizes)
        self.copies = self.copied_bytes = 0
        self._sizes, self._device, on_cuda = sizes, device, device.type == "cuda"
        self._slots = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._inside: list[int | None] = [None] * SLOTS  # the layer that each slot has
        is_pinned = on_cuda and self.layer_bytes <= psutil.virtual_memory().available * 3 // 4
        self.source = "pinned memory" if is_pinned else "memory" if not on_cuda else "disk, as memory is short"
        moved = {address for tensors in streamed for address in tensors}
        put_on(device, (t for a, same in by_address(lm).items() if a not in moved for t in same))
        cast(Any, lm).hf_device_map = {"": device}  # where Accelerate looks for the device of a quantised model
        self._held = [
            _hold(tensors, self._slots[number % SLOTS], pinned=is_pinned) for number, tensors in enumerate(streamed)
        ]
        if on_cuda:
            self._copying, self._there = torch.cuda.Stream(device), [torch.cuda.Event() for _ in range(SLOTS)]
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._enter, number), prepend=True)
            layer.register_forward_hook(partial(self._leave, number))
        _STREAMS[lm] = self

    @property
    def saved_bytes(self) -> int:
        """How much less the device holds than with all layers on it."""
        return self.layer_bytes - self.slot_bytes

    def __str__(self) -> str:
        return (
            f"{self.count} layers from {self.source}, of which the device holds {SLOTS} at a time "
            f"({self.slot_bytes / 2**30:.2f} of {self.layer_bytes / 2**30:.2f} GiB); a forward and its backward copy "
            f"{2 * self.saved_bytes / 2**30:.2f} GiB"
        )

    def _enter(self, number: int, _layer: nn.Module, _inputs: Any) -> None:
        # Nothing follows the last layer: its backward may, which needs the two that are there.
        self._visit(number, number + 1 if number < self.count - 1 else None)

    def _leave(self, number: int, _layer: nn.Module, _inputs: Any, output: Any) -> None:
        """The gradient of what a layer gives is the first that its backward needs. Layers with gradient checkpointing
        are computed again behind it."""

        def backward(_: Tensor) -> None:
            self._visit(number, number - 1 if number else None)

        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(backward)

    def _visit(self, number: int, following: int | None) -> None:
        """Has a layer in its slot before the next kernel runs, and the following one on its way to the other slot: what
        was in there has been at work before, in the order of the device's stream."""
        slot = number % SLOTS
        if self._inside[slot] != number:
            self._copy(number)
        if self._device.type == "cuda":
            torch.cuda.current_stream().wait_event(self._there[slot])
        if following is not None and following % SLOTS != slot and self._inside[following % SLOTS] != following:
            self._copy(following)

    def _copy(self, number: int) -> None:
        slot = number % SLOTS
        self._inside[slot] = None  # if an error comes in between
        if self._device.type == "cuda":
            self._copying.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._copying):
                self._fill(number)
            self._there[slot].record(self._copying)
        else:
            self._fill(number)
        self._inside[slot] = number
        self.copies += 1
        self.copied_bytes += self._sizes[number]

    def _fill(self, number: int) -> None:
        for place, held in self._held[number]:
            place.copy_(held, non_blocking=True)


def placed(load: Callable[[torch.device], Any], device: torch.device, when: str) -> Any:
    """A model on a device, which `load` reads: all of it, or with its layers streamed. `when` is the recipe's
    `model.stream`; `auto` streams where memory runs out. A `UserError` for what can't be streamed."""
    if when != "always":
        try:
            return load(device)
        except RuntimeError as error:
            if when == "never" or not is_out_of_memory(error):
                raise
        free_unused()  # out here the traceback is gone, whose frames hold weights
    lm = load(torch.device("cpu"))
    if any(isinstance(module, Linear8bitLt) for module in lm.modules()):
        raise UserError("model.stream: weights in int8 can't be streamed, as bitsandbytes moves them itself; use nf4")
    LayerStream(lm, device)
    return lm


def stream_of(lm: nn.Module) -> LayerStream | None:
    """What streams the layers of a model; None if all of them are on the device."""
    return _STREAMS.get(lm)


def by_address(module: nn.Module) -> dict[int, list[Tensor]]:
    """A module's weights, buffers and scales, by where they begin in memory. (Those read from one file share a
    storage.)"""
    found: dict[int, list[Tensor]] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        for part in (tensor, *scales_of(tensor)):
            if part.numel():
                found.setdefault(part.data_ptr(), []).append(part)
    return found


def put_on(device: torch.device, tensors: Iterator[Tensor]) -> None:
    known: dict[int, Tensor] = {}
    for tensor in tensors:
        address = tensor.data_ptr()
        tensor.data = known.setdefault(address, tensor.data.to(device)).view(tensor.shape)


def _size(tensors: dict[int, list[Tensor]]) -> int:
    return sum(-(-same[0].nbytes // _ALIGNED) * _ALIGNED for same in tensors.values())


def _hold(tensors: dict[int, list[Tensor]], slot: Tensor, *, pinned: bool) -> list[tuple[Tensor, Tensor]]:
    """Makes a layer's tensors views of its slot. Returns parts of the slot, each with what is copied into it: `pinned`
    memory, else the tensors as they were read, which the system can read from their file again."""
    start, parts = 0, []
    for same in tensors.values():
        size, kept = same[0].nbytes, same[0].data
        place = slot[start : start + size].view(kept.dtype).view(kept.shape)
        parts.append((place, kept))
        for tensor in same:
            tensor.data = place
        start += -(-size // _ALIGNED) * _ALIGNED
    if not pinned:
        return parts
    whole = torch.empty(start, dtype=torch.uint8)
    for place, kept in parts:
        at = place.data_ptr() - slot.data_ptr()
        whole[at : at + kept.nbytes] = kept.contiguous().view(-1).view(torch.uint8)
    return [
        (place, held.pin_memory()) for place, held in zip(slot[:start].split(_PIECE), whole.split(_PIECE), strict=True)
    ]
