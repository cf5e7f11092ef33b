"""bitsandbytes' 4 bits for linear layers, and ours for experts, as one quantiser of transformers: `from_pretrained`
quantises every weight as soon as it is read, so never more than one layer's experts are in memory in 16 bits.
"""

from functools import cache
from typing import Any, TypeGuard, cast

import torch
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from qalign.model.experts import weights
from qalign.model.experts.weights import NAME, Kind


class FourBitConfig(BitsAndBytesConfig):
    """bitsandbytes' settings, and the kind of numbers that experts are held in.

    Args:
        experts: `nf4` or `fp4`, quantised here; `mxfp4`, read as they are published.
    """

    def __init__(self, experts: Kind = "nf4", **settings: Any):
        super().__init__(load_in_4bit=True, **settings)
        self.quant_method = cast(Any, NAME)
        self.experts: Kind = experts

    def to_dict(self) -> dict[str, Any]:
        """Without what transformers takes for a model that bitsandbytes alone has quantised."""
        found = super().to_dict()
        return {key: value for key, value in found.items() if "load_in_" not in key}


register_quantization_config(NAME)(FourBitConfig)


def experts_kind(config: PretrainedConfig, quantization: str) -> Kind | None:
    """How the experts of a base are held if a recipe asks for `quantization`; None in 16 bits."""
    stored = getattr(config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else vars(stored)
    if quantization not in ("nf4", "fp4"):
        return None
    if "mxfp4" in (stored.get("quant_method"), stored.get("experts")):
        return "mxfp4"
    # A base that bitsandbytes has quantised already is used as it is.
    return cast(Kind, quantization) if stored.get("quant_method") in (None, NAME) else None


@cache
def _computes_as_linear(kind: type[nn.Linear]) -> bool:
    """Whether a subclass of `nn.Linear` computes the same, as Falcon's does; routers don't."""
    with torch.device("cpu"), torch.no_grad():
        plain, rows = nn.Linear(3, 2), torch.eye(3)
        plain.weight.copy_(torch.arange(6).view(2, 3))
        try:
            return bool(torch.allclose(kind.forward(plain, rows), plain(rows)))
        except (AttributeError, RuntimeError, TypeError):
            return False


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer that can be held in 4 bits."""
    return isinstance(module, nn.Linear) and (type(module) is nn.Linear or _computes_as_linear(type(module)))


class _Quantize(Bnb4bitQuantize):
    """Quantises a weight that has just been read, in the place where it belongs."""

    def convert(self, input_dict, full_layer_name=None, model=None, missing_keys=None, **kwargs):
        config = cast(FourBitConfig, self.hf_quantizer.quantization_config)
        left = {}
        for full_name, value in input_dict.items():
            module, name = get_module_from_name(model, full_name)
            if name not in weights.names_of(module):
                left[full_name] = value
                continue
            weight = value[0] if isinstance(value, list) else value
            double = config.bnb_4bit_use_double_quant
            weights.hold(module, name, weight, cast(Any, config.experts), double_quant=double)
            cast(set, missing_keys).discard(full_name)
        return super().convert(left, full_layer_name=full_layer_name, model=model, **kwargs)


class FourBitQuantizer(Bnb4BitHfQuantizer):
    """transformers asks it what to do with each weight."""

    def param_needs_quantization(self, model, param_name, **kwargs) -> bool:
        module, name = get_module_from_name(model, param_name)
        return name in weights.names_of(module) or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self):
        return _Quantize(self)

    def _process_model_before_weight_loading(self, model, device_map, **kwargs):
        for name, module in list(model.named_modules()):
            if is_linear(module) and type(module) is not nn.Linear:  # bitsandbytes asks for the class itself
                with torch.device("meta"):
                    sizes = module.in_features, module.out_features
                    plain = nn.Linear(*sizes, bias=module.bias is not None, dtype=module.weight.dtype)
                model.set_submodule(name, plain)
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        config = cast(FourBitConfig, self.quantization_config)
        model.set_experts_implementation(NAME)
        if self.pre_quantized or config.experts == "mxfp4":
            for module in model.modules():
                for name in weights.names_of(module):
                    weights.make_room(module, name, config.experts, double_quant=config.bnb_4bit_use_double_quant)

    def _dequantize(self, model, dtype=None):
        model = super()._dequantize(model, dtype=dtype)
        dequantize_experts(model, dtype or model.dtype)
        return model


register_quantizer(NAME)(FourBitQuantizer)


def dequantize_experts(model: Any, dtype: torch.dtype) -> None:
    """Makes the experts of a model what transformers made them, with the weights that they were computing with."""
    for module in cast(nn.Module, model).modules():
        if getattr(module, "four_bit", None):
            weights.release(module, dtype)
    model.set_experts_implementation("eager")


def guard_4bit(lm: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights in place at the first forward without gradients on a CPU with
    AVX512-BF16, after which all gradients would be wrong without an error. Raises if that has happened already, or if
    weights are not quantised as the config says."""
    for module in lm.modules():
        is_quantised = not isinstance(module, Linear8bitLt) or isinstance(module.weight, Int8Params)
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            state = getattr(module.weight, "quant_state", None)
            is_quantised = state is not None and state.shape == (module.out_features, module.in_features)
            if getattr(state, "packing_format_for_cpu", False):
                raise RuntimeError(
                    "bitsandbytes has repacked the 4-bit weights, so gradients would be wrong; reload them"
                )
        if not is_quantised:
            raise ValueError("its weights are not quantised, or of other shapes, than its config.json says")
