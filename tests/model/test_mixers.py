"""Layers that mix tokens without attention: found by trial, and exact inside packed rows."""

import pytest
import torch
from torch import nn

from qalign.data.collate import Layout, pack
from qalign.model.logps import pair_logps
from qalign.model.packing.packing import Packing, packing_of
from tests.families import HYBRIDS, alone, family, random_pairs

hybrids = pytest.mark.parametrize("name", HYBRIDS)


def gradients(lm, found: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a sum in which every answer has another weight."""
    lm.zero_grad()
    (found * torch.randn(found.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None and p.grad.norm() > 1e-4}


@hybrids
def test_hybrids_are_packed_exactly(name):
    lm, pairs = family(name), random_pairs()
    packing = packing_of(lm)
    assert packing.reason is None
    assert str(packing.mixers) == HYBRIDS[name][1]
    apart = alone(lm, pairs)
    expected = gradients(lm, apart)
    assert len(expected) > 8
    for checkpointing in (False, True):
        if checkpointing:
            lm.train()
            lm.activation_checkpointing_enable({"use_reentrant": False})
        with packing.open(lm):
            found = pair_logps(lm, pack(pairs))
            own = gradients(lm, found)
        torch.testing.assert_close(found, apart, rtol=0, atol=1e-4)
        for weight, grad in expected.items():
            assert (own[weight] - grad).norm() < 1e-4 * grad.norm(), weight


@hybrids
def test_without_rows_of_their_own_sequences_would_see_each_other(name):
    lm, pairs = family(name), random_pairs()
    with torch.no_grad(), Packing().open(lm):
        found = pair_logps(lm, pack(pairs))
    assert (found - alone(lm, pairs)).abs().max() > 0.1


def test_layers_computed_again_use_the_layout_of_their_own_batch():
    """As when a second batch is run before the backward of the first."""
    lm, pairs = family("lfm2"), random_pairs()
    expected = gradients(lm, alone(lm, pairs[:3]))
    lm.train()
    lm.activation_checkpointing_enable({"use_reentrant": False})
    with packing_of(lm).open(lm):
        found = pair_logps(lm, pack(pairs[:3]))
        with torch.no_grad():
            pair_logps(lm, pack(pairs[3:]))
        own = gradients(lm, found)
    assert all((own[name] - grad).norm() < 1e-4 * grad.norm() for name, grad in expected.items())


def test_a_token_whose_embedding_is_zero_hides_nothing():
    lm = family("qwen3_5_text")
    lm.get_input_embeddings().weight.data[[0, 2]] = 0.0  # the first of 30 ids spread over 64 are 0 and 2
    assert str(packing_of(lm).mixers) == "Qwen3_5GatedDeltaNet"


class Shifted(nn.Module):
    """Adds a part of the token before: it mixes, around a module that does too."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.inner(states + 0.5 * states.roll(1, dims=1).index_fill(1, torch.tensor([0]), 0.0), **kwargs)


def test_a_module_that_mixes_around_another_one_takes_its_place():
    lm, pairs = family("mamba2"), random_pairs()
    for layer in lm.base_model.layers:
        layer.mixer = Shifted(layer.mixer)
    packing = packing_of(lm)
    assert packing.reason is None
    assert str(packing.mixers) == "Shifted"
    with torch.no_grad(), packing.open(lm):
        torch.testing.assert_close(pair_logps(lm, pack(pairs)), alone(lm, pairs), rtol=0, atol=1e-4)


def test_models_with_attention_alone_are_run_without_hooks():
    lm = family("llama")
    with packing_of(lm).open(lm):
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in lm.modules())


def test_hooks_are_gone_afterwards():
    lm = family("lfm2")
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = lm(input_ids=ids).logits
    packing = packing_of(lm)
    with pytest.raises(ValueError, match=r"^Lfm2ShortConv needs a packed batch"), packing.open(lm):
        lm(input_ids=ids)
    assert torch.equal(lm(input_ids=ids).logits, expected)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in lm.modules())


def test_whole_sequences_of_a_layout():
    """Of a prefix of 2 with branches of 3 and 0 tokens, then a dialogue of 2, then branches without a prefix."""
    rows, places = Layout(((2, (3, 0)), (2, ()), (0, (1, 2)))).sequences(torch.device("cpu"))
    assert rows.tolist() == [[0, 1, 2, 3, 4], [0, 1, 1, 1, 1], [5, 6, 6, 6, 6], [7] * 5, [8, 9, 9, 9, 9]]
    assert rows.flatten()[places].tolist() == list(range(10))
