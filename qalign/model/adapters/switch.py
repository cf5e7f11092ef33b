"""Which adapter a model computes with, and what its modules and weights are flagged as.

What can change is found once for a set of adapters. PEFT's and PyTorch's own switches visit every module at every call,
which takes 40 ms for 32 layers.
"""

from typing import Any, cast

import peft
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qalign.model.adapters.lora import AddedLora

Flags = tuple[list[nn.Parameter], list[nn.Module]]  # what requires gradients, what is in training mode


class AdapterSwitch:
    """The switch of a model with the adapters that are in it now; make a new one after one is added or deleted."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._modules = list(model.modules())
        self._parameters = [p for p in model.parameters() if p.is_floating_point()]  # 4-bit weights have no gradients
        self._wrappers = [module for module in self._modules if isinstance(module, AuxiliaryTrainingWrapper)]
        wrapped = {inner for wrapper in self._wrappers for inner in wrapper.modules()}  # they switch what is in them
        self._tuned = [module for module in self._modules if isinstance(module, BaseTunerLayer)]
        self._tuned_by: dict[str, list[BaseTunerLayer]] = {}  # an adapter
        tuned = dict.fromkeys(module for module in self._tuned if module not in wrapped)
        self._layers = cast(list[BaseTunerLayer], list(tuned))
        self._places = [  # the outermost, where one layer is inside another
            (parent, name, layer, cast(BaseTunerLayer, layer).get_base_layer())
            for parent in self._modules
            if parent not in tuned
            for name, layer in parent.named_children()
            if layer in tuned
        ]
        self._in_place: bool | None = True
        self.added = AddedLora(tuned)
        self._active: list[str] = []
        self._recomputed = [module for module in self._modules if isinstance(module, GradientCheckpointingLayer)]
        dropouts = [layer.lora_dropout.values() for layer in self._layers if isinstance(layer, LoraLayer)]
        self._dropouts = [part for parts in dropouts for part in parts if isinstance(part, nn.Dropout)]

    def layers_of(self, adapter: str) -> list[BaseTunerLayer]:
        """The layers that hold something of an adapter."""
        if adapter not in self._tuned_by:
            self._tuned_by[adapter] = [
                layer
                for layer in self._tuned
                if any(adapter in getattr(layer, name, ()) for name in layer.adapter_layer_names)
            ]
        return self._tuned_by[adapter]

    def activate(self, adapter: str | None) -> None:
        """Computes with an adapter, or with the base alone; call it again after an error. PEFT changes flags here."""
        self.put_adapters_in_place(adapter is not None)
        self.added.activate(None)  # if an error comes in between
        for wrapper in self._wrappers:
            wrapper.enable_adapters(adapter is not None)
        if adapter is None:
            return
        self._active[:] = [adapter]
        for layer in self._layers:
            if layer.active_adapters is not self._active:  # PEFT keeps the list that it is given: once is enough
                layer.set_adapter(self._active, inference_mode=True)
        for wrapper in self._wrappers:
            wrapper.set_adapter(wrapper.check_set_adapter([adapter]) or [], inference_mode=True)
        self.added.activate(adapter)
        model = cast(peft.PeftModel, self._model)
        model.active_adapter = cast(Any, model.base_model).active_adapter = adapter

    def close(self) -> None:
        """Leaves the adapters to PEFT, as before one is added or deleted."""
        self.put_adapters_in_place()
        self.added.close()

    def put_adapters_in_place(self, wanted: bool = True) -> None:
        """Puts the layers with adapters into the model, as PEFT expects them, or the base's own layers, which compute
        the same as layers with adapters that are disabled."""
        if self._in_place is not wanted:
            self._in_place = None  # if an error comes in between
            for parent, name, layer, own in self._places:
                setattr(parent, name, layer if wanted else own)
            self._in_place = wanted

    def flags(self) -> Flags:
        """What requires gradients, and what is in training mode."""
        return [p for p in self._parameters if p.requires_grad], [m for m in self._modules if m.training]

    def restore(self, flags: Flags) -> None:
        """Makes the flags what they were."""
        trainable, training = flags
        kept = {id(parameter) for parameter in trainable}
        for parameter in self._parameters:
            if parameter.requires_grad and id(parameter) not in kept:
                parameter.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)
        self._set_training(training)

    def train(self) -> None:
        """Puts the adapters' dropout into training mode, and leaves the base in evaluation mode: no role has dropout of
        the base's own, which some families call as a function. Layers with gradient checkpointing ask for the flag too,
        and TRL asks the outermost module."""
        outermost = [self._model] if isinstance(self._model, peft.PeftModel) else []
        recomputed = (layer for layer in self._recomputed if layer.gradient_checkpointing)
        self._set_training([*outermost, *recomputed, *self._dropouts])

    def _set_training(self, wanted: list[nn.Module]) -> None:
        kept = set(wanted)
        for module in self._modules:
            if module.training and module not in kept:
                object.__setattr__(module, "training", False)  # ten times as fast as a module does it
        for module in wanted:
            if not module.training:
                object.__setattr__(module, "training", True)
