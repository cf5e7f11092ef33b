"""Expert weights in 4 bits, and the products with them.

transformers 5 keeps all experts of a layer in two tensors, `gate_up_proj` and `down_proj`, of shape (experts, …, …).
bitsandbytes quantises linear layers only, so these would stay in 16 bits: 50 to 97% of such a base. Here each expert is
quantised by itself, and dequantised when tokens have chosen it: once in the forward, once more in the backward, as
bitsandbytes does with linear layers. Only one dequantised expert is in memory at a time, and autograd keeps none.

The products are registered under transformers' public `ExpertsInterface`, so no model's code is touched.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from math import ceil, prod
from typing import Any, Literal, cast

import torch
from bitsandbytes import functional as bnb
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "qalign_4bit"  # in `ExpertsInterface`
BLOCK, SCALES_BLOCK = 64, 256  # bitsandbytes': weights that share a scale, and scales that share one
MXFP4_BLOCK = 32
FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")  # set by `use_experts_implementation`
Kind = Literal["nf4", "fp4", "mxfp4"]
Product = Callable[[Any, str, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Held:
    """How one of a module's tensors is held: the kind of numbers, and its shape before it was quantised."""

    kind: Kind
    shape: tuple[int, ...]  # (experts, rows, columns)


def names_of(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's tensors that have an expert's weights each; none if transformers can't exchange the
    function that multiplies with them."""
    if not all(hasattr(module, flag) for flag in FLAGS):
        return ()
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def held_parameters(model: nn.Module) -> int:
    """The number of expert weights that are held in 4 bits."""
    return sum(prod(held.shape) for module in model.modules() for held in getattr(module, "four_bit", {}).values())


def expert_tensors(lm: nn.Module) -> dict[str, int]:
    """The names of the tensors that hold a weight for each expert, in 4 bits or not, with the number of experts."""
    found = {}
    for name, module in lm.named_modules():
        shapes = (
            {}
            if isinstance(module, nn.Conv1d)
            else {n: p.shape for n, p in module.named_parameters(recurse=False) if p.is_floating_point()}
        )
        shapes |= {part: held.shape for part, held in getattr(module, "four_bit", {}).items()}
        found |= {f"{name}.{part}": s[0] for part, s in shapes.items() if len(s) == 3 and s[0] > 1}
    return found


def experts_in_words(lm: PreTrainedModel) -> str:
    """How the experts of a quantised base are held, where it isn't as its other weights are; for a header."""
    kinds = {held.kind for module in lm.modules() for held in getattr(module, "four_bit", {}).values()}
    if "mxfp4" in kinds:
        return ", experts in mxfp4"
    plain = expert_tensors(lm).keys() & dict(lm.named_parameters()).keys()
    share = sum(lm.get_parameter(name).numel() for name in plain) / (lm.num_parameters() + held_parameters(lm))
    return f", but experts in 16 bits: {share:.0%} of the weights" if plain else ""


def hold(module: nn.Module, name: str, weight: Tensor, kind: Literal["nf4", "fp4"], *, double_quant: bool) -> None:
    """Replaces the tensor `name` of an experts module by `weight`, quantised expert by expert."""
    _make_room(module, name, Held(kind, tuple(weight.shape)))
    found = [
        bnb.quantize_4bit(expert.contiguous(), quant_type=kind, compress_statistics=double_quant) for expert in weight
    ]
    module.register_buffer(f"{name}_blocks", torch.stack([blocks for blocks, _ in found]))
    module.register_buffer(f"{name}_scales", torch.stack([state.absmax for _, state in found]))
    if double_quant:
        module.register_buffer(f"{name}_scale_scales", torch.stack([cast(Any, s.state2).absmax for _, s in found]))
        module.register_buffer(f"{name}_scale_offsets", torch.stack([cast(Tensor, s.offset) for _, s in found]))


def make_room(module: nn.Module, name: str, kind: Kind, *, double_quant: bool) -> None:
    """Replaces the tensor `name` of an experts module on the meta device by empty ones, for quantised weights that are
    read from a file."""
    held = Held(kind, tuple(getattr(module, name).shape))
    shapes = _shapes(held, bool(module.is_transposed), double_quant)
    _make_room(module, name, held)
    for part, (shape, dtype) in shapes.items():
        module.register_buffer(f"{name}_{part}", torch.empty(shape, dtype=dtype, device="meta"))


def _make_room(module: nn.Module, name: str, held: Held) -> None:
    delattr(module, name)
    cast(Any, module).four_bit = {**getattr(module, "four_bit", {}), name: held}
    cast(Any, module)._is_hf_initialized = True  # transformers would fill the missing tensor with random numbers


def _shapes(held: Held, is_transposed: bool, double_quant: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    experts, rows, columns = held.shape
    if held.kind == "mxfp4":  # as published: outputs first, 16 bytes and an exponent for 32 inputs
        outputs, inputs = (columns, rows) if is_transposed else (rows, columns)
        scales = (experts, outputs, inputs // MXFP4_BLOCK)
        return {"blocks": ((*scales, MXFP4_BLOCK // 2), torch.uint8), "scales": (scales, torch.uint8)}
    count = ceil(rows * columns / BLOCK)
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "blocks": ((experts, ceil(rows * columns / 2), 1), torch.uint8),
        "scales": ((experts, count), torch.uint8 if double_quant else torch.float32),
    }
    if double_quant:
        found["scale_scales"] = ((experts, ceil(count / SCALES_BLOCK)), torch.float32)
        found["scale_offsets"] = ((experts,), torch.float32)
    return found


def held_bytes(shape: tuple[int, ...], kind: Kind, *, double_quant: bool) -> int:
    """The memory of a tensor of experts of this shape, with its scales."""
    return sum(prod(size) * dtype.itemsize for size, dtype in _shapes(Held(kind, shape), False, double_quant).values())


def expert_weight(module: Any, name: str, expert: int, dtype: torch.dtype) -> Tensor:
    """One expert's weights, dequantised, `(inputs, outputs)`."""
    held: Held = module.four_bit[name]
    blocks, scales = getattr(module, f"{name}_blocks")[expert], getattr(module, f"{name}_scales")[expert]
    if held.kind == "mxfp4":
        return _from_mxfp4(blocks, scales, dtype).T
    shape = held.shape[1:]
    state = bnb.QuantState(scales, torch.Size([prod(shape)]), None, BLOCK, held.kind, dtype)
    if (offsets := getattr(module, f"{name}_scale_offsets", None)) is not None:
        nested = getattr(module, f"{name}_scale_scales")[expert]
        state.nested, state.offset = True, offsets[expert]
        state.state2 = bnb.QuantState(
            nested, code=_dynamic_code(nested.device), blocksize=SCALES_BLOCK, dtype=torch.float32
        )
    weight = bnb.dequantize_4bit(blocks, state).view(shape)
    return weight if module.is_transposed else weight.T


@cache
def _dynamic_code(device: torch.device) -> Tensor:
    """The 256 values of bitsandbytes' 8-bit scales."""
    return bnb.create_dynamic_map().to(device)


@cache
def _mxfp4_pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two values of each byte, the lower half first: (256, 2)."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=device)
    values, byte = torch.cat([values, -values]).to(dtype), torch.arange(256, device=device)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=1)


def _from_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`(outputs, groups, 16)` bytes and `(outputs, groups)` exponents to `(outputs, inputs)` (OCP Microscaling Formats
    v1.0: 32 numbers of 4 bits, E2M1, share a power of 2)."""
    pairs = embedding(blocks.int(), _mxfp4_pairs(dtype, blocks.device)).flatten(-2)
    return torch.ldexp(pairs, scales.int()[..., None] - 127).flatten(-2)


def release(module: nn.Module, dtype: torch.dtype) -> None:
    """Dequantises all experts of a module, which afterwards is as transformers made it."""
    for name, held in getattr(module, "four_bit", {}).items():
        experts = [expert_weight(module, name, number, dtype) for number in range(held.shape[0])]
        weight = torch.stack([expert if module.is_transposed else expert.T for expert in experts])
        for part in ("blocks", "scales", "scale_scales", "scale_offsets"):
            if hasattr(module, f"{name}_{part}"):
                delattr(module, f"{name}_{part}")
        module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    cast(Any, module).four_bit = {}


class _ProductIn4Bits(torch.autograd.Function):
    """Rows that are sorted by expert, times their expert's weights. The weights are frozen, so the backward needs
    neither the rows nor the dequantised weights."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, module: Any, name: str, ends: list[int]) -> Tensor:
        ctx.weights = module, name, ends
        width = module.four_bit[name].shape[2 if module.is_transposed else 1]
        output = rows.new_zeros(len(rows), width)
        for part, weight in _chosen(module, name, ends, rows.dtype):
            torch.mm(rows[part], weight, out=output[part])
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        (grad,) = grad_outputs
        module, name, ends = ctx.weights
        width = module.four_bit[name].shape[1 if module.is_transposed else 2]
        grad_rows = grad.new_zeros(len(grad), width)
        for part, weight in _chosen(module, name, ends, grad.dtype):
            torch.mm(grad[part], weight.T, out=grad_rows[part])
        return grad_rows, None, None, None


def _chosen(module: Any, name: str, ends: list[int], dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each expert that has any, with its weights."""
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end > start:
            yield slice(start, end), expert_weight(module, name, expert, dtype)


def _product_in_4_bits(module: Any, name: str, rows: Tensor, choices: Tensor) -> Tensor:
    ends = torch.bincount(choices, minlength=module.num_experts).cumsum(0)[: module.num_experts]
    return cast(Tensor, _ProductIn4Bits.apply(rows, module, name, ends.tolist()))


def run_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, product: Product):
    """The forward of an experts module, in the order of operations of transformers' `grouped_mm`.

    Args:
        hidden_states: `(tokens, hidden)`.
        top_k_index, top_k_weights: `(tokens, choices)`: the experts of each token, and how much each one counts.
        product: of rows that are sorted by expert, and the weights of the given name.

    Returns:
        `(tokens, hidden)`.
    """
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if _autocasts(device) else hidden_states.dtype
    order = top_k_index.flatten().argsort(stable=True)
    choices = top_k_index.flatten()[order]

    def linear(name: str, rows: Tensor) -> Tensor:
        output = product(self, name, rows.to(dtype), choices)
        return output + getattr(self, f"{name}_bias").to(dtype)[choices] if self.has_bias else output

    up, down = names_of(self)
    states = linear(up, hidden_states[order // top_k_index.shape[1]])
    states = self._apply_gate(states) if self.has_gate else self.act_fn(states)
    states = linear(down, states)
    if self.has_post_expert_norm:
        states = self.post_expert_norm(states)
    states = states * top_k_weights.flatten()[order, None]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return states[back].view(*top_k_index.shape, -1).sum(dim=1).to(hidden_states.dtype)


def _autocasts(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


ALL_EXPERTS_FUNCTIONS.register(NAME, partial(run_experts, product=_product_in_4_bits))
