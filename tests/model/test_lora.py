"""LoRA as it is trained, against PEFT's own forward: numbers, gradients, and what is computed for nothing."""

from collections import Counter

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qalign.config.recipe import Lora, Model
from qalign.model.base import Role, load

IDS = torch.arange(1, 41)[None]
VIEWS = {"aten.t", "aten.view", "aten.detach", "aten._unsafe_view", "aten.expand", "aten.alias"}


class Calls(TorchDispatchMode):
    """Counts what is computed, but for views."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).rpartition(".")[0]
        self.found[name] += name not in VIEWS
        return func(*args, **(kwargs or {}))


def adapted(tiny_folder, dtype: str, quantization: str, **lora):
    """A base whose policy isn't a no-op."""
    base = load(Model(base=tiny_folder, compute_dtype=dtype, quantization=quantization))
    base.add_adapter(Role.POLICY, Lora(r=4, alpha=6, **lora))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in base.model.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return base


def outcome(lm, weights: dict, base) -> tuple[torch.Tensor, dict]:
    """(hidden states, gradients by name) of a model under the base's autocast."""
    with torch.autocast("cpu", base.dtype, enabled=base.dtype != torch.float32):
        states = lm(input_ids=IDS, use_cache=False).last_hidden_state
    upstream = torch.linspace(-1, 1, states.numel()).cos().view_as(states).to(states.dtype)
    grads = torch.autograd.grad(states, list(weights.values()), upstream)
    return states.detach(), dict(zip(weights, grads, strict=True))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("bfloat16", 3e-2)])
def test_states_and_gradients_are_pefts(tiny_folder, tmp_path, dtype, limit, quantization):
    base = adapted(tiny_folder, dtype, quantization)
    weights = {n: p for n, p in base.model.named_parameters() if ".lora_" in n}
    with base.acting_as(Role.POLICY) as lm:
        found, grads = outcome(lm.base_model, weights, base)
    base.save_adapter(Role.POLICY, tmp_path)
    plain = peft.PeftModel.from_pretrained(load(base.spec).lm, tmp_path, is_trainable=True)
    theirs = {n.replace(".default.", ".policy."): p for n, p in plain.named_parameters() if ".lora_" in n}
    assert theirs.keys() == weights.keys()
    expected, expected_grads = outcome(plain.get_base_model().base_model, theirs, base)
    assert (found - expected).abs().max() <= limit * expected.abs().max()
    for name, grad in expected_grads.items():
        assert grads[name].dtype == torch.float32
        assert (grads[name] - grad).norm() <= 2 * limit * grad.norm(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_costs_two_products_a_layer_forward_and_four_back(tiny_folder, dtype):
    """No clone, no scaling and no sum of the output's size, as PEFT's own forward has. In 16 bits A and B are cast."""
    base = adapted(tiny_folder, dtype, "nf4")
    layers = sum(name.endswith("lora_A.policy") for name, _ in base.lm.named_modules())
    casts = {"aten._to_copy": 2 * layers} if dtype == "bfloat16" else {}

    def counted(role) -> Counter:
        embeddings = base.lm.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
        with Calls() as calls, base.acting_as(role) as lm:
            states = lm.base_model(input_ids=IDS, use_cache=False).last_hidden_state
            forward, calls.found = calls.found, Counter()
            states.sum().backward()
        embeddings.remove()
        return forward, calls.found

    counted(Role.POLICY)  # gradients are made
    (forward, backward), (plain, plain_backward) = counted(Role.POLICY), counted(Role.BASE)
    assert forward - plain == Counter({"aten.mm": layers, "aten.addmm_": layers} | casts)
    more = backward - plain_backward
    assert more.pop("aten.mm") == 4 * layers
    assert more.pop("aten._to_copy", 0) == sum(casts.values())
    # By rank, the scale of two gradients; then the sums: of A's and B's gradients, and of a layer's two inputs'.
    assert more == {"aten.mul_": 2 * layers, "aten.add_": 2 * layers, "aten.add": more["aten.add"]}
    assert more["aten.add"] <= layers


def test_what_is_more_than_lora_is_left_to_peft(tiny_folder):
    """DoRA, and plain LoRA next to it on the same layers."""
    base = adapted(tiny_folder, "float32", "nf4", dora=True)
    base.add_adapter(Role.REFERENCE, Lora(r=2))
    layer = base.lm.base_model.layers[0].mlp.up_proj
    with base.acting_as(Role.POLICY):
        assert not layer.disable_adapters
    with base.acting_as(Role.REFERENCE):
        assert layer.disable_adapters
    assert not layer.disable_adapters
