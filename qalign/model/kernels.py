"""Fused kernels on CUDA: liger-kernel's RMS norms, rotary embeddings and gated MLPs in place of a model's own code.

These kernels read and write each tensor once, where PyTorch does it for each operation. There is no list of families: a
model is run on a few tokens, and each module then computes the same again with a kernel in place, which stays if output
and gradient are equal to the rounding of the dtype. Only this one model is changed: others in the process, such as the
planner's on the meta device, keep their own code. Losses are left out, as qalign's head has its own.
"""

import importlib.metadata
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qalign.model.logps import backbone
from qalign.model.memory.shard import gathered

TOKENS = 16  # of the trial
ROTARY = "apply_rotary_pos_emb"  # transformers' name, as a global of the module that defines an attention layer
GATED = ("gate_proj", "up_proj", "down_proj")

Forward = Callable[..., Any]


class Kernels(NamedTuple):
    """Differentiable operations; the gradient may overwrite the gate, and the rotation its inputs."""

    rms_norm: Callable[[Tensor, Tensor, float, float, str, bool], Tensor]  # (states, weight, eps, offset, casts, False)
    swiglu: Callable[[Tensor, Tensor], Tensor]  # (gate, up)
    geglu: Callable[[Tensor, Tensor], Tensor]
    rope: Callable[..., tuple[Tensor, Tensor]]  # (query, key, cos, sin)


def fuse(lm: PreTrainedModel, kernels: Kernels | None = None) -> str | None:
    """Gives a model's modules fused kernels where they compute the same.

    Args:
        kernels: what to use instead of liger-kernel's on CUDA.

    Returns:
        What is fused and what isn't and why, in words. None on a device that has no such kernels.
    """
    if kernels is None and lm.device.type != "cuda":
        return None
    if kernels is None and importlib.util.find_spec("liger_kernel") is None:
        return "none: liger-kernel isn't installed (pip install -r requirements-gpu.txt)"
    try:
        kernels, given = kernels or _liger(), _inputs(lm)
    except Exception as error:
        return f"none: {_short(error)}"
    fused, reasons = Counter[str](), dict[str, str]()
    for module, call in given.items():
        kind = cast(str, _kind(module))
        with gathered(module):
            forward, reason = _tried(lm, module, call, _candidates(module, kind, kernels))
        if forward is None:
            reasons.setdefault(f"the {kind} of {type(module).__name__}", reason)
        else:
            module.forward = MethodType(forward, module)
            fused[kind] += 1
    found = ", ".join(f"{count} {kind}s" for kind, count in sorted(fused.items()))
    left = "; ".join(f"{what} {reason}" for what, reason in reasons.items())
    return f"{found or 'none'} (liger-kernel {_version()}){left and f', but not {left}'}"


def _liger() -> Kernels:
    functional = importlib.import_module("liger_kernel.transformers.functional")
    names = ("rms_norm", "swiglu", "geglu", "rope")
    return Kernels(*(getattr(functional, f"liger_{name}") for name in names))


def _version() -> str:
    try:
        return importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:  # other kernels were given
        return "?"


@torch.no_grad()
def _inputs(lm: PreTrainedModel) -> dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each module was called with first, by a forward of a few tokens."""
    given: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given.setdefault(module, (args, named))

    with ExitStack() as hooks, _autocast(lm):
        for module in lm.modules():
            if _kind(module):
                hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        words = cast(nn.Embedding, lm.get_input_embeddings()).weight.shape[0]
        ids = torch.arange(1, TOKENS + 1, device=lm.device)[None] * 7 % words
        backbone(lm)(input_ids=ids, use_cache=False)
    return given


def _autocast(lm: PreTrainedModel) -> torch.autocast:
    return torch.autocast(lm.device.type, lm.dtype, enabled=lm.dtype.itemsize == 2)


def _kind(module: nn.Module) -> str | None:
    """What a module may be, by how it is built; the trial decides."""
    forward = type(module).forward
    if "forward" in vars(module) or not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return None
    if ROTARY in forward.__code__.co_names and ROTARY in forward.__globals__:
        return "rotary embedding"
    if all(isinstance(getattr(module, name, None), nn.Module) for name in GATED):
        return "MLP"
    parameters = dict(module.named_parameters())
    is_norm = list(parameters) == ["weight"] and parameters["weight"].dim() == 1 and isinstance(_eps(module), float)
    return "norm" if is_norm else None


def _eps(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _candidates(module: nn.Module, kind: str, kernels: Kernels) -> Iterator[Forward]:
    """Forwards, as functions of a module and its arguments, that may compute the same as its own."""
    if kind == "norm":
        # Llama's multiplies by the weight in the dtype of the states, Gemma's in float32, mostly by 1 + weight.
        for offset, casts in ((0.0, "llama"), (0.0, "gemma"), (1.0, "gemma")):
            yield partial(_norm, kernels, offset, casts)
    elif kind == "MLP":
        yield from (partial(_gated, act) for act in (kernels.swiglu, kernels.geglu))
    else:  # its own code, with a kernel under the name of the function
        own: Any = type(module).forward
        names = own.__globals__ | {ROTARY: kernels.rope}
        del names["__name__"]  # torch.compile would look for the names where this module was defined
        forward = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
        forward.__kwdefaults__ = own.__kwdefaults__
        yield forward


def _norm(kernels: Kernels, offset: float, casts: str, module: Any, hidden_states: Tensor) -> Tensor:
    return kernels.rms_norm(hidden_states, module.weight, _eps(module), offset, casts, False)


def _gated(act: Callable[[Tensor, Tensor], Tensor], module: Any, hidden_states: Tensor) -> Tensor:
    return module.down_proj(act(module.gate_proj(hidden_states), module.up_proj(hidden_states)))


def _tried(
    lm: PreTrainedModel, module: nn.Module, given: Any, candidates: Iterator[Forward]
) -> tuple[Forward | None, str]:
    """The forward that is closest to the module's own, or None and why not."""
    limit = max(4 * torch.finfo(lm.dtype).eps, 1e-5)
    errors, problems = dict[float, Forward](), list[str]()
    with _autocast(lm):
        own = _outcome(partial(type(module).forward, module), given)
        for forward in candidates:
            try:
                found = _outcome(partial(forward, module), given)
                error = max(_off(ours, theirs) for ours, theirs in zip(found, own, strict=True))
            except Exception as raised:  # a kernel that refuses these shapes, or a function of other arguments
                problems.append(_short(raised))
            else:
                errors.setdefault(error, forward)
    if not errors:
        return None, f"({problems[0]})"
    best = min(errors)
    return (errors[best], "") if best <= limit else (None, f"({best:.0e} off)")


def _outcome(forward: Forward, given: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """(output, gradient with respect to the hidden states) of a module."""
    args, named = given
    states = args[0] if args else named["hidden_states"]
    leaf = states.detach().clone().requires_grad_()
    with torch.enable_grad():
        output = forward(leaf, *args[1:], **named) if args else forward(**named | {"hidden_states": leaf})
        output = output[0] if isinstance(output, tuple) else output
        upstream = torch.linspace(-1, 1, output.numel(), device=output.device).cos().view_as(output).to(output.dtype)
        return output.detach(), torch.autograd.grad(output, leaf, upstream)[0]


def _off(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value; infinite for another shape, dtype or what isn't finite."""
    if found.shape != expected.shape or found.dtype != expected.dtype or not bool(found.isfinite().all()):
        return float("inf")
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-30))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
