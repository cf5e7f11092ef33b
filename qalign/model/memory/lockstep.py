"""Several passes that go through the layers together: each layer runs for every pass before the next one does, forward
and backward. So layers that are streamed are copied once for all roles of a step, and not once for each.

A model's own forward can't be stopped between its layers, so each pass has a thread, which waits at every layer. Only
one thread runs at a time, and the layers themselves run in the calling thread, one pass after another: with the same
calls, in the same shapes as each pass alone, and so with the same bits.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from qalign.data.collate import AnswerBatch
from qalign.model.adapters.targets import decoder_layers
from qalign.model.logps import answer_states, state_logps, summed
from qalign.model.memory.stream import stream_of

if TYPE_CHECKING:
    from qalign.model.base import Base

Given = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]  # a layer, and what it is called with


@dataclass(frozen=True)
class Reading:
    """A batch that a role reads, with gradients or not."""

    role: str
    batch: AnswerBatch
    gradients: bool = False

    @contextmanager
    def on(self, base: "Base") -> Iterator[PreTrainedModel]:
        """Plays the role, with gradients or not."""
        with torch.set_grad_enabled(self.gradients), base.acting_as(self.role) as lm:
            yield lm


def read_together(base: "Base", readings: Sequence[Reading]) -> Iterator[Tensor]:
    """The hidden states that predict the answers' tokens (`answer_states`), of each reading. Layers that are streamed
    are visited once for all of them; otherwise one reading comes after the other. Call it inside `packed_attention`."""
    if stream_of(base.lm) is None:
        for reading in readings:
            with reading.on(base) as lm:
                states = answer_states(lm, reading.batch)
            yield states
        return
    passes = [_Pass(base, reading) for reading in readings]
    with _gates(base.lm):
        try:
            at: dict[_Pass, Given | None] = {}
            for each in passes:
                with each.reading.on(base):
                    at[each] = each.go()
            while waiting := {each: given for each, given in at.items() if given}:
                given = [(args, kwargs) for _, args, kwargs in waiting.values()]
                if sum(each.reading.gradients for each in waiting) > 1:
                    given = _entering_together(given)
                for (each, (layer, *_)), (args, kwargs) in zip(waiting.items(), given, strict=True):
                    with each.reading.on(base):
                        at[each] = each.go(layer(*args, **kwargs))
        finally:
            for each in passes:
                each.end()
    yield from (each.found for each in passes)


def learn_together(
    base: "Base",
    readings: Sequence[Reading],
    loss_of: Callable[[Reading, PreTrainedModel, Tensor], Tensor],
    backward: Callable[[Tensor], object],
) -> None:
    """Forward and backward of readings with gradients, each with a loss of its own: `loss_of` is given the reading, the
    model in its role, and its states as from `read_together`. Layers that are streamed are visited once forward and
    once backward; otherwise what one reading keeps for its backward is freed before the next one begins. Checkpointed
    layers need `in_this_role`."""
    found, is_streamed = list[Tensor](), stream_of(base.lm) is not None
    for reading, states in zip(readings, read_together(base, readings), strict=True):
        with reading.on(base) as lm:
            loss = loss_of(reading, lm, states)
            if is_streamed:
                found.append(loss)
            else:
                backward(loss)
    if found:
        backward(torch.stack(found).sum())


def in_this_role(base: "Base") -> AbstractContextManager[None]:
    """For checkpointed layers: the role of now, to be played again when they are computed again."""
    return _playing(base, base.role)


@contextmanager
def _playing(base: "Base", role: str) -> Iterator[None]:
    if base.role == role:  # `acting_as` would look at the flags of all modules, for each layer
        yield
    else:
        with base.acting_as(role):
            yield


def pair_logps_together(base: "Base", readings: Sequence[Reading]) -> list[Tensor]:
    """`pair_logps` of each reading, read as `read_together` does."""
    found = []
    for reading, states in zip(readings, read_together(base, readings), strict=True):
        with reading.on(base) as lm:
            found.append(summed(reading.batch, state_logps(lm, states, reading.batch.targets)))
    return found


def _entering_together(given: list[Any]) -> list[Any]:
    """What passes give to a layer, so that in the backward pass, too, all of them leave it before any enters the layer
    below."""
    leaves, structure = tree_flatten(given)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if places:  # none where a layer below has no adapter
        for place, tensor in zip(places, _Together.apply(*(leaves[place] for place in places)), strict=True):
            leaves[place] = tensor
    return tree_unflatten(leaves, structure)


class _Together(torch.autograd.Function):
    """Passes tensors on as they are, and their gradients once all of them are there."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor):
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None):
        return grad_outputs


class _Ended(BaseException):
    """Ends the thread of a pass, where another pass failed."""


class _Pass(Thread):
    """A forward pass, which stops in front of every layer.

    Attributes:
        found: its hidden states, once it is done.
    """

    found: Tensor

    def __init__(self, base: "Base", reading: Reading):
        super().__init__(daemon=True)
        self.base, self.reading = base, reading
        self._outputs, self._events = SimpleQueue[Any](), SimpleQueue[Given | BaseException | None]()
        self._stream = torch.cuda.current_stream(base.device) if base.device.type == "cuda" else None

    def go(self, output: Any = None) -> Given | None:
        """Goes on to the next layer, with what the last one gave; None once the pass is done. Call it in its role, as
        what is around the layers may have adapters too."""
        if self.ident is None:
            self.start()
        else:
            self._outputs.put(output)
        event = self._events.get()
        if isinstance(event, BaseException):
            raise event
        return event

    def at(self, given: Given) -> Any:
        """In its own thread: waits for what a layer gives."""
        self._events.put(given)
        output = self._outputs.get()
        if isinstance(output, _Ended):
            raise output
        return output

    def end(self) -> None:
        if self.is_alive():
            self._outputs.put(_Ended())
            self.join()

    def run(self) -> None:
        base, reading, event = self.base, self.reading, None
        try:
            # Gradients, autocast and the stream are each thread's own.
            with (
                torch.cuda.stream(self._stream),
                torch.set_grad_enabled(reading.gradients),
                torch.autocast(base.device.type, base.dtype, enabled=base.dtype != torch.float32),
            ):
                self.found = answer_states(base.lm, reading.batch)
        except _Ended:
            return
        except BaseException as error:  # raised again by `go`
            event = error
        self._events.put(event)


class _Gate(nn.Module):
    """Stands in for a layer, and is asked for its attributes by some families."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return cast(_Pass, current_thread()).at((self.layer, args, kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


@contextmanager
def _gates(lm: PreTrainedModel) -> Iterator[None]:
    layers = cast(nn.ModuleList, decoder_layers(lm))
    own = list(layers)
    try:
        for number, layer in enumerate(own):
            layers[number] = _Gate(layer)
        yield
    finally:
        for number, layer in enumerate(own):
            layers[number] = layer
