"""For a base that is larger than each of several cards: every process holds a part of each weight of the base.

A layer is gathered from all processes before it is at work, in the forward and again in the backward, and freed behind
it, by PyTorch's FSDP2 (`fully_shard`). It deals out frozen weights alone: adapters are put on later, and each process
has all of them. Gathering waits for all processes, so each must enter the layers as often as any other, in one order.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from qalign.errors import UserError
from qalign.model.adapters.targets import decoder_layers
from qalign.model.experts.weights import held_parameters
from qalign.model.memory.stream import by_address, put_on, scales_of

InTurn = Callable[[Callable[[], Any]], Any]  # does some work in one process after the other; returns this one's result
_SHARDS: WeakKeyDictionary[nn.Module, "Shards"] = WeakKeyDictionary()
_HOLDERS: WeakKeyDictionary[nn.Module, ref[Any]] = WeakKeyDictionary()  # modules, and what gathers their weights


class Shards:
    """What this process holds of a model. All processes make one at the same time.

    Attributes:
        parameters: the number of the model's weights, 4-bit ones counted one by one.
        count, processes: the number of layers, and of processes that hold a part of each.
        layer_bytes, whole_bytes: the weights of all layers, and all that is dealt out, in all processes together.
        own_bytes: what this process holds of them.
    """

    def __init__(self, lm: PreTrainedModel, device: torch.device):
        if (layers := decoder_layers(lm)) is None:
            raise UserError(f"model.shard: the layers of {type(lm).__name__} don't stand in one list; set it to false")
        if any(isinstance(module, Linear8bitLt) for module in lm.modules()):
            raise UserError("model.shard: weights in int8 can't be dealt out; use nf4")
        self.parameters, self.count, self.processes = parameter_count(lm), len(layers), dist.get_world_size()
        mesh = init_device_mesh(device.type, (self.processes,))
        vocabulary = _vocabulary(lm)
        apart = {*vocabulary, *(tensor for layer in layers for same in by_address(layer).values() for tensor in same)}
        put_on(device, (t for same in by_address(lm).values() for t in same if t not in apart))
        self.whole_bytes = sum(weight.nbytes for weight in vocabulary)
        held: list[nn.Module] = [_Vocabulary(weight, users, device, mesh) for weight, users in vocabulary.items()]
        cast(Any, lm).hf_device_map = {"": device}  # where Accelerate looks for the device of a quantised model
        self.layer_bytes = 0
        for layer in layers:
            self.layer_bytes += _deal_out(layer, device, mesh)
        self.whole_bytes += self.layer_bytes
        self.own_bytes = sum(_own_part(p).nbytes for module in (*held, *layers) for p in module.parameters())
        decoder = lm.get_decoder()  # so that a layer is gathered while the one before is at work
        fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()))
        _SHARDS[lm] = self

    def __str__(self) -> str:
        received = 2 * self.layer_bytes * (self.processes - 1) / self.processes
        return (
            f"{self.count} layers and the vocabulary's weights over {self.processes} processes, of which this one "
            f"holds {self.own_bytes / 2**30:.2f} of {self.whole_bytes / 2**30:.2f} GiB; a forward and its backward "
            f"receive {received / 2**30:.2f} GiB"
        )


class _Vocabulary(nn.Module):
    """The weight of the embeddings, of the output layer, or of both where they share it: whole while one of them is at
    work, or within `gathered`."""

    def __init__(self, weight: nn.Parameter, users: Sequence[nn.Module], device: torch.device, mesh: DeviceMesh):
        super().__init__()
        self.weight, self._users, self._depth = nn.Parameter(weight.data.to(device), requires_grad=False), users, 0
        fully_shard(self, mesh=mesh)
        self._hand_out()
        for user in users:
            user.register_forward_pre_hook(lambda *_: self.gather(), prepend=True)
            user.register_forward_hook(lambda *_: self.free(), always_call=True)
            _HOLDERS[user] = ref(self)

    def gather(self) -> None:
        if not self._depth:
            cast(FSDPModule, self).unshard()
            self._hand_out()
        self._depth += 1

    def free(self) -> None:
        self._depth -= 1
        if not self._depth:
            cast(FSDPModule, self).reshard()
            self._hand_out()

    def _hand_out(self) -> None:
        for user in self._users:
            user.weight = self.weight


def sharded(load: Callable[[torch.device], Any], device: torch.device, in_turn: InTurn) -> Any:
    """A model that `load` reads into the computer's memory, `in_turn`, dealt out over the devices of all processes,
    which call this together."""
    lm = in_turn(lambda: load(torch.device("cpu")))
    Shards(lm, device)
    return lm


def shards_of(lm: nn.Module) -> Shards | None:
    """What this process holds of a model that is dealt out; None if it holds all of it."""
    return _SHARDS.get(lm)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within the block, the weights of a module are whole, for those who use them past its layer's forward. All
    processes enter it. Nothing is done for a model that isn't dealt out."""
    holder = found() if (found := _HOLDERS.get(module)) else None
    if isinstance(holder, _Vocabulary):
        gather, free = holder.gather, holder.free
    elif isinstance(holder, FSDPModule):
        gather, free = holder.unshard, holder.reshard
    else:
        yield
        return
    gather()
    try:
        yield
    finally:
        free()


def restart(lm: PreTrainedModel) -> None:
    """After an error inside a forward pass, which all processes ran into: the model can be run again."""
    if shards_of(lm):
        cast(FSDPModule, lm.get_decoder()).reset_iter_state()


def anywhere(lm: nn.Module, flag: bool) -> bool:
    """Whether a flag is set in any of the processes that a model is dealt out to, which all ask at the same time."""
    if shards_of(lm) is None:
        return flag
    found = torch.tensor(int(flag))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def tensor_bytes(tensor: Tensor) -> int:
    """The memory that a tensor takes in this process; of a 4-bit one including its scales."""
    return sum(part.nbytes for part in (_own_part(tensor), *scales_of(tensor)))


def parameter_count(lm: PreTrainedModel) -> int:
    """The number of a model's weights; 4-bit ones are counted one by one."""
    if shards := shards_of(lm):
        return shards.parameters
    return lm.num_parameters() + held_parameters(lm)


def _own_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _vocabulary(lm: PreTrainedModel) -> dict[nn.Parameter, list[nn.Module]]:
    """The weights of the embeddings and of the output layer, with the modules that use each."""
    found: dict[nn.Parameter, list[nn.Module]] = {}
    for module in (lm.get_input_embeddings(), lm.get_output_embeddings()):
        if isinstance(module, nn.Embedding | nn.Linear) and module.weight.is_floating_point():
            found.setdefault(cast(nn.Parameter, module.weight), []).append(module)
    return found


def _deal_out(layer: nn.Module, device: torch.device, mesh: DeviceMesh) -> int:
    """Deals out the weights of a layer, and returns their bytes."""
    states = {module: _plain(module, device) for module in layer.modules() if isinstance(module, Linear4bit)}
    for module in layer.modules():
        if getattr(module, "four_bit", None):  # experts, whose tensors are buffers
            for name, tensor in [*module.named_buffers(recurse=False)]:
                delattr(module, name)
                module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    size = sum(parameter.nbytes for parameter in layer.parameters())
    fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    for module, (state, kind, is_nested) in states.items():  # which PEFT asks for, and whoever counts bytes
        weight = cast(Any, module.weight)
        weight.quant_state, weight.quant_type, weight.compress_statistics = state, kind, is_nested
    for module in layer.modules():
        _HOLDERS[module] = ref(layer)
    return size


def _plain(module: Linear4bit, device: torch.device) -> tuple[Any, str, bool]:
    """Makes a 4-bit weight a plain tensor of bytes, as FSDP keeps no subclass of it; returns its scales, and how it is
    quantised. bitsandbytes makes a 4-bit weight of what was gathered, with the scales that the layer itself has."""
    weight = cast(Any, module.weight)
    weight.quant_state.to(device)
    module.quant_state = weight.quant_state
    module.weight = cast(Any, nn.Parameter(weight.data.as_subclass(Tensor), requires_grad=False))
    return weight.quant_state, weight.quant_type, weight.compress_statistics
