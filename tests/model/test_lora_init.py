"""How an adapter may begin, where the base is not 4-bit all over."""

import bitsandbytes as bnb
import torch
from torch import nn

from qalign.config.recipe import Lora
from qalign.model.base import Role


def test_loftq_leaves_a_layer_that_was_not_rounded_as_lora_begins(tiny_base):
    """bitsandbytes leaves out what a model's config names (`modules_to_not_convert`)."""
    layer = tiny_base.lm.model.layers[0].mlp
    held = layer.up_proj.weight
    whole = bnb.functional.dequantize_4bit(held.data, held.quant_state).float()
    layer.up_proj = nn.Linear(*reversed(whole.shape), bias=False)
    layer.up_proj.weight = nn.Parameter(whole, requires_grad=False)

    tiny_base.add_adapter(Role.POLICY, Lora(r=4, alpha=8, init="loftq"))

    assert isinstance(layer.up_proj.get_base_layer().weight, nn.Parameter)
    assert not layer.up_proj.lora_B["policy"].weight.any()
    assert layer.up_proj.lora_A["policy"].weight.any()
    assert torch.equal(layer.up_proj.get_base_layer().weight, whole)
    assert layer.down_proj.lora_B["policy"].weight.any(), "this one was rounded"
