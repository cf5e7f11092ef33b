"""What a step of decoding costs with an adapter, what is kept from one call to the next, and what is freed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from benchmarks.random_models import as_base, fixture_tokenizer, random_lm
from qalign.config.recipe import Lora
from qalign.model.decoding import decoder, rows
from qalign.model.decoding.adapters import HeldAdapters, serves, spans_of
from qalign.model.decoding.static import StaticCache
from qalign.model.generation import Sampling, TransformersEngine
from tests.helpers import scramble

PROMPTS = [[5, 6, 7, 8], [9, 10]]


class Calls(TorchDispatchMode):
    """Counts the calls of ATen."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def small(dtype: torch.dtype = torch.float32):
    """Four layers in NF4, with a policy that does something."""
    config = LlamaConfig(vocab_size=2006, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    base = as_base(random_lm(config, dtype, std=0.2), fixture_tokenizer())
    base.add_adapter("policy", Lora(r=4))
    scramble(base, scale=0.2)
    return base


def sample(base, role: str = "policy", num_samples: int = 3):
    return TransformersEngine().generate(base, role, PROMPTS, Sampling(6, 1.0, ()), num_samples=num_samples, seed=4)


@pytest.mark.parametrize("devices", [(), ("cpu",)], ids=["growing", "static"])
def test_a_step_with_an_adapter_calls_aten_at_most_half_again_as_often(devices, monkeypatch):
    monkeypatch.setattr(decoder, "DEVICES", devices)
    base, counts = small(torch.bfloat16), {}
    for role in ("base", "policy"):
        sample(base, role)
        modes, hooks = [], []
        hooks.append(base.lm.register_forward_pre_hook(lambda *_, to=modes: to.append(Calls().__enter__())))
        hooks.append(base.lm.register_forward_hook(lambda *_, to=modes: to[-1].__exit__(None, None, None)))
        sample(base, role)
        for hook in hooks:
            hook.remove()
        counts[role] = modes[-1].count
    assert 200 < counts["base"] < counts["policy"] <= 1.5 * counts["base"]


def test_what_was_captured_answers_for_weights_that_changed_since(monkeypatch):
    base, made = small(), []
    before = sample(base)
    scramble(base, scale=0.4)
    after = sample(base)
    assert before != after
    monkeypatch.setattr(decoder, "DEVICES", ("cpu",))
    monkeypatch.setattr(decoder, "StaticCache", lambda *args: made.append(args) or StaticCache(*args))
    assert sample(base) == after
    scramble(base, scale=0.2)
    assert sample(base) == before
    assert len(made) == 2, "one for the trial, one for both calls"
    base.add_adapter("two", Lora(r=8))
    scramble(base, "two", 0.3)
    assert sample(base, "two") != before
    assert sample(base) == before, "beside another role"


def test_caches_that_take_much_of_the_memory_are_freed(monkeypatch):
    monkeypatch.setattr(decoder, "DEVICES", ("cpu",))
    base = small()
    used = decoder.decoder_of(base)
    sample(base)
    assert used.adapters.bytes > 0, "kept"
    monkeypatch.setattr(decoder, "KEPT_SHARE", 0.0)
    sample(base)
    assert used.adapters.bytes == 0


def test_a_model_that_cannot_be_captured_says_why_once_and_is_sampled_from_all_the_same(monkeypatch, capsys):
    base = small()
    expected = sample(base)
    monkeypatch.setattr(decoder, "DEVICES", ("cpu",))

    def fails(*_):
        raise ValueError("no such\nlayer")

    monkeypatch.setattr(decoder, "StaticCache", fails)
    assert sample(base) == expected == sample(base)
    assert capsys.readouterr().err == "sampling runs without CUDA graphs: ValueError: no such layer\n"


def test_buckets_hold_what_they_are_for():
    assert [rows.row_bucket(count) for count in (1, 2, 3, 5, 9, 16, 17, 33)] == [1, 2, 4, 8, 16, 16, 24, 40]
    assert [rows.column_bucket(tokens) for tokens in (1, 256, 257)] == [256, 256, 512]
    assert spans_of(["a", "a"]) == (("a", None),)
    assert spans_of(["a", "a", "b"]) == (("a", (0, 2)), ("b", (2, 3)))


@pytest.mark.parametrize("memory", [1, 3.2, 7.9, 9, 15, 17, 100])
def test_as_many_rows_as_fit_are_as_many_as_their_bucket(memory, monkeypatch):
    monkeypatch.setattr(decoder, "DEVICES", ("cpu",))
    base = small()
    row = base.row_cache.bytes(256, windows=False)
    found = decoder.decoder_of(base).rows_within(memory * row, base, 200)
    assert rows.row_bucket(found) == found <= memory < 2 * found + 8


def test_held_adapters_do_nothing_outside_their_own_forward_passes():
    base, held = small(), HeldAdapters()
    ids = torch.tensor(PROMPTS[:1])
    held.hold(base, ["policy"])
    with torch.no_grad(), base.acting_as("base") as lm:
        bare = lm(ids).logits
    with torch.no_grad(), base.acting_as("policy") as lm:
        expected = lm(ids).logits
    with torch.no_grad(), base.acting_as("base") as lm, held.on():
        assert torch.equal(lm(ids).logits, bare)
        with held.answering(spans_of(["policy"])):
            assert torch.allclose(lm(ids).logits, expected, atol=1e-5)
    assert serves(base, "policy")
    assert (bare - expected).abs().max() > 0.1
