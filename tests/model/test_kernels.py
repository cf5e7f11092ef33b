"""Fused kernels: which modules get them, and that nothing changes. Kernels of plain PyTorch stand in for Triton's; as
those do, they overwrite their inputs in the backward."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

from qalign.config.recipe import Lora
from qalign.model import kernels
from qalign.model.base import Role
from qalign.model.logps import pair_logps
from tests.families import family, random_pairs


class _Overwriting(torch.autograd.Function):
    """gate · act, whose backward leaves its gradients where its inputs were."""

    @staticmethod
    def forward(ctx, gate, up, act):
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate) * up

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaves = gate.detach().clone().requires_grad_(), up.detach().clone().requires_grad_()
            found = torch.autograd.grad(ctx.act(leaves[0]) * leaves[1], leaves, grad)
        return gate.data.copy_(found[0]), up.data.copy_(found[1]), None


class _Rotation(torch.autograd.Function):
    """Rotates in place, and its gradient too; memory of the projections is written over."""

    @staticmethod
    def forward(ctx, query, key, cos, sin):
        ctx.save_for_backward(cos, sin)
        found = modeling_llama.apply_rotary_pos_emb(query, key, cos, sin)
        return query.data.copy_(found[0]), key.data.copy_(found[1])

    @staticmethod
    def backward(ctx, *grads):
        cos, sin = ctx.saved_tensors
        return *modeling_llama.apply_rotary_pos_emb(*grads, cos, -sin), None, None


def stand_ins(**others) -> tuple[kernels.Kernels, Counter]:
    """Kernels, and how often each was called."""
    calls = Counter()

    def rms_norm(states, weight, eps, offset, casts, in_place):
        assert not in_place, "the gradient of a norm's output may be that of a residual, too"
        wide = states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        if casts == "gemma":
            return (wide * (offset + weight.float())).to(states.dtype)
        return wide.to(states.dtype) * (offset + weight)

    found = {
        "rms_norm": rms_norm,
        "swiglu": lambda gate, up: _Overwriting.apply(gate, up, F.silu),
        "geglu": lambda gate, up: _Overwriting.apply(gate, up, lambda states: F.gelu(states, approximate="tanh")),
        "rope": lambda query, key, cos, sin: _Rotation.apply(query, key, cos, sin),
    } | others

    def counted(name):
        def call(*args):
            calls[name, args[3] if name == "rms_norm" else None] += 1
            return found[name](*args)

        return call

    return kernels.Kernels(*map(counted, kernels.Kernels._fields)), calls


NORM, SHIFTED = ("rms_norm", 0.0), ("rms_norm", 1.0)
SWIGLU, GEGLU, ROPE = (("swiglu", None), ("geglu", None), ("rope", None))
# What one forward of two layers calls; nothing where a family computes something else.
CALLS = {
    "llama": {NORM: 5, SWIGLU: 2, ROPE: 2},
    "qwen3": {NORM: 9, SWIGLU: 2, ROPE: 2},  # norms of queries and keys
    "gemma2": {SHIFTED: 9, GEGLU: 2, ROPE: 2},
    "gpt-oss": {NORM: 5},  # a rotation of its own; experts
    "phi3": {NORM: 5, ROPE: 2},  # gate and up in one product
    "cohere": {SWIGLU: 2},  # layer norms; pairs of neighbours are rotated
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_modules_that_compute_the_same_are_fused_and_no_others(name, dtype):
    lm, ids = family(name, dtype=dtype).requires_grad_(False), torch.arange(1, 30)[None]
    for parameter in lm.parameters():  # norms of weight 1, or 0 where 1 is added, would hide a wrong offset
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = lm(input_ids=ids, use_cache=False).logits
    fused, calls = stand_ins()
    said = kernels.fuse(lm, fused)
    calls.clear()
    found = lm(input_ids=ids, use_cache=False).logits
    assert calls == CALLS[name], said
    off = (found - expected).abs().max() / expected.abs().max()
    assert off <= (1e-6 if dtype == torch.float32 else 2e-2)


def test_other_models_keep_their_own_code():
    lm, other = family("llama"), family("llama")
    before = dict(vars(modeling_llama))
    fused, calls = stand_ins()
    assert "5 norms" in kernels.fuse(lm, fused)
    calls.clear()
    made_later = LlamaForCausalLM(lm.config)
    for each in (other, made_later, made_later.to("meta")):  # the planner's are on the meta device
        each(input_ids=torch.arange(1, 9, device=each.device)[None])
    assert not calls
    assert dict(vars(modeling_llama)) == before


def test_a_kernel_that_computes_something_else_is_left_out():
    lm, ids = family("llama"), torch.arange(1, 30)[None]
    expected = lm(input_ids=ids).logits

    def refuses(*_):
        raise ValueError("no such\nshape")

    def wrong_gradient(gate, up):
        return F.silu(gate) * up.detach()

    fused, calls = stand_ins(rms_norm=refuses, swiglu=wrong_gradient, rope=lambda query, key, cos, sin: (query, key))
    said = kernels.fuse(lm, fused)
    calls.clear()
    assert torch.equal(lm(input_ids=ids).logits, expected)
    assert not calls
    assert "the norm of LlamaRMSNorm (ValueError: no such shape)" in said
    assert "the MLP of LlamaMLP (" in said
    assert "the rotary embedding of LlamaAttention (" in said


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_an_adapter_in_packed_rows(tiny_base, checkpointing):
    """Log-probs, gradients of a 4-bit base's adapter and sampled tokens, fused and not."""
    tiny_base.add_adapter(Role.POLICY, Lora(r=4))
    up = [p for n, p in tiny_base.model.named_parameters() if ".lora_" in n]
    for parameter in up:
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    if checkpointing:
        tiny_base.lm.activation_checkpointing_enable({"use_reentrant": False})
        tiny_base.train()
    pairs = random_pairs(vocabulary=1900)

    def step():
        with tiny_base.packed_attention(), tiny_base.acting_as(Role.POLICY) as lm:
            logps = pair_logps(lm, tiny_base.batch(pairs))
            return logps.detach(), torch.autograd.grad(logps[:, 0].sum() - logps[:, 1].sum(), up)

    expected, expected_grads = step()
    fused, calls = stand_ins()
    kernels.fuse(tiny_base.lm, fused)
    calls.clear()
    found, grads = step()
    assert calls["swiglu", None] == tiny_base.lm.config.num_hidden_layers * (1 + checkpointing)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


def test_a_fused_model_compiles(tiny_base):
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        expected = tiny_base.lm(input_ids=ids, use_cache=False).logits
        plain = {"rope": modeling_llama.apply_rotary_pos_emb, "swiglu": lambda gate, up: F.silu(gate) * up}
        assert "rotary" in kernels.fuse(tiny_base.lm, stand_ins(**plain)[0])
        layer = tiny_base.lm.base_model.layers[0]
        layer.forward = torch.compile(layer.forward, backend="eager", fullgraph=True)
        torch.testing.assert_close(tiny_base.lm(input_ids=ids, use_cache=False).logits, expected)
    torch.compiler.reset()


def test_it_is_for_cuda_and_says_what_is_missing(monkeypatch):
    assert kernels.fuse(family("llama")) is None
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    said = kernels.fuse(SimpleNamespace(device=torch.device("cuda", 0)))
    assert said == "none: liger-kernel isn't installed (pip install -r requirements-gpu.txt)"
