"""Log-probs against the plain way: each answer in a row of its own, full logits, log_softmax, gather, in float64."""

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM

from qalign.data.collate import pack, pad
from qalign.data.store.sequences import TokenPair
from qalign.errors import UserError
from qalign.model import logps
from tests.families import alone, family, packed_attention, random_pairs

# How pairs become a batch, and what the model has to be told for it.
WAYS = {"packed": (pack, packed_attention), "padded": (lambda pairs: pad(pairs, 0), lambda lm: nullcontext())}
ways = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def model(tiny_folder):
    lm = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64)
    lm.lm_head.requires_grad_(False)
    return lm


@pytest.fixture
def pairs() -> list[TokenPair]:
    return random_pairs(vocabulary=1900)


def found(lm, pairs: list[TokenPair], way: str) -> torch.Tensor:
    batched, told = WAYS[way]
    with told(lm):
        return logps.pair_logps(lm, batched(pairs))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_in_16_bits_log_probs_are_those_of_what_is_sampled_from(tiny_folder, temperature):
    """Logits in bfloat16, all else in 32 bits, as where tokens are drawn."""
    lm = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    lm.lm_head.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    states = (torch.randn(40, lm.config.hidden_size, generator=generator) * 8).bfloat16().requires_grad_(True)
    targets = torch.randint(lm.config.vocab_size, (40,), generator=generator)
    logits = lm.lm_head(states).float()
    expected = (logits / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    found = logps.state_logps(lm, states, targets, temperature)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    (slope,) = torch.autograd.grad(found.sum(), states)
    (wanted,) = torch.autograd.grad(expected.sum(), states)
    torch.testing.assert_close(slope, wanted, rtol=2e-2, atol=2e-2 * wanted.abs().max().item())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_entropies_and_most_likely_tokens(tiny_folder, dtype, temperature, monkeypatch):
    """Over several chunks. In bfloat16 many logits tie, and of those the first is the most likely one."""
    lm = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=dtype)
    lm.lm_head.requires_grad_(False)
    monkeypatch.setattr(logps, "_CHUNK_ELEMENTS", 7 * lm.config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    states = (torch.randn(40, lm.config.hidden_size, generator=generator) * 8).to(dtype)
    logits = lm.lm_head(states).float()
    last = logits.shape[1] - 1 - logits.flip(1).argmax(dim=1)  # of those that are most likely
    targets = torch.where(torch.arange(40) % 2 == 0, logits.argmax(dim=1), last)
    found = logps.token_scores(lm, states.requires_grad_(True), targets, temperature)
    assert torch.equal(found.logps, logps.state_logps(lm, states, targets, temperature))
    expected = torch.distributions.Categorical(logits=logits / temperature).entropy()
    torch.testing.assert_close(found.entropies, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.is_top, logits.argmax(dim=1) == targets)
    assert found.is_top.sum() < 40 or dtype == torch.float32, "the test would not notice which of two counts"
    assert (found.logps.requires_grad, found.entropies.requires_grad) == (True, False)


@ways
def test_each_token_has_the_log_prob_of_the_full_softmax(model, pairs, way):
    batched, told = WAYS[way]
    batch = batched(pairs)
    with told(model), torch.no_grad():
        each = logps.completion_logps(model, batch)
    assert each.shape == batch.targets.shape
    start = 0
    for pair in pairs:
        for answer in (pair.chosen_ids, pair.rejected_ids):
            row = pair.prompt_ids + answer
            every = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
            wanted = torch.stack([every[place - 1, row[place]] for place in range(len(pair.prompt_ids), len(row))])
            torch.testing.assert_close(each[start : start + len(answer)], wanted, rtol=1e-6, atol=1e-6)
            start += len(answer)
    assert start == len(each)


@ways
def test_sums_and_gradients_equal_the_full_softmax(model, pairs, way, monkeypatch):
    monkeypatch.setattr(logps, "_CHUNK_ELEMENTS", 7 * model.config.vocab_size)  # several chunks, the last one partial
    weights = torch.randn(len(pairs), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values, grads = [], []
    for computed in (lambda: found(model, pairs, way), lambda: alone(model, pairs)):
        model.zero_grad()
        values.append(computed())
        (values[-1] * weights).sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-6)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert (grad - grads[1][name]).norm() <= 1e-5 * grads[1][name].norm(), name


@ways
def test_company_changes_nothing_and_chosen_comes_first(model, pairs, way):
    together = found(model, pairs, way)
    single = torch.cat([found(model, [pair], way) for pair in pairs])
    swapped = [TokenPair(pair.prompt_ids, pair.rejected_ids, pair.chosen_ids, "swapped") for pair in pairs]
    torch.testing.assert_close(together, single, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found(model, swapped, way), together.flip(1), rtol=1e-6, atol=1e-6)


def test_the_pad_token_changes_nothing(model, pairs):
    one, other = (logps.pair_logps(model, pad(pairs, token)) for token in (0, 7))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@ways
def test_full_logits_are_never_held(model, pairs, way, monkeypatch):
    """No tensor of (completion tokens x vocabulary) is made when chunks are small, and none of the prompt's."""
    monkeypatch.setattr(logps, "_CHUNK_ELEMENTS", 4 * model.config.vocab_size)
    seen, real = [], logps.head_logits
    monkeypatch.setattr(logps, "head_logits", lambda lm, hidden: seen.append(len(hidden)) or real(lm, hidden))
    found(model, pairs, way)
    assert max(seen) == 4
    assert sum(seen) == sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)


@ways
@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "mistral", "qwen3"])
def test_families(name, way):
    """Padded in one length: eager Gemma 2 gives no number for rows of padding."""
    lm = family(name)
    logps.check_head(lm)
    draw = torch.Generator().manual_seed(2)
    pairs = [
        TokenPair(*(torch.randint(3, 64, (length,), generator=draw).tolist() for length in (5, 7, 7)), "equal")
        for _ in range(3)
    ]
    torch.testing.assert_close(found(lm, pairs, way), alone(lm, pairs), rtol=1e-6, atol=1e-6)


def test_a_backbone_that_its_class_calls_by_another_name():
    lm = family("llama4")
    assert lm.base_model is lm, "or this tests nothing"
    assert logps.backbone(lm) is lm.model
    logps.check_head(lm)
    pairs = random_pairs()
    torch.testing.assert_close(logps.pair_logps(lm, pad(pairs, 0)), alone(lm, pairs), rtol=1e-5, atol=1e-4)


def test_an_unknown_head_is_noticed():
    lm = family("qwen3")
    original = lm.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        if kwargs.get("input_ids") is not None:  # which the head doesn't know
            output.logits = output.logits * 1.5
        return output

    lm.forward = forward
    with pytest.raises(UserError, match=r"model\.base: Qwen3ForCausalLM computes more"):
        logps.check_head(lm)
