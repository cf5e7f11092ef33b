"""What a row takes in a model's cache, and whether a model can be sampled with one."""

import pytest
import torch
import transformers as tf

from qalign.model.memory.kv_cache import measured_cache
from qalign.model.origin import note
from tests.families import HYBRIDS, SERVED, UNSERVED, family
from tests.families import config as family_config
from tests.model.test_memory import shape


@pytest.fixture(autouse=True)
def fresh():
    """A note is said once a process."""
    note.cache_clear()


def test_a_kv_cache_by_hand():
    """Mistral: 8 key heads of 128 in 32 layers, keys and values; 131,072 bytes a token in 16 bits."""

    def cached(config: tf.PretrainedConfig, tokens: int) -> int:
        with torch.device("meta"):
            lm = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return measured_cache(lm).bytes(tokens)

    assert cached(shape("Mistral-7B-v0.3"), 1000) == 131_072_000
    assert cached(shape("Qwen3-4B-Instruct-2507"), 1) == 2 * 36 * 8 * 128 * 2
    # Every second layer keeps no more than its window of 6 tokens: 2 key heads of 8.
    assert cached(family_config("gemma3"), 100) == 2 * 2 * 8 * 2 * (100 + 6)
    # A layer without attention keeps 3 tokens of its convolution, 32 wide, whatever the length (transformers keeps 4).
    assert cached(family_config("lfm2"), 100) == 2 * 2 * 8 * 2 * 100 + 32 * 3 * 2


def test_every_family_but_two_has_a_cache_that_is_exact(capsys):
    names = {name: measured_cache(family(name, dtype=torch.float32)).name for name in (*SERVED, *HYBRIDS, *UNSERVED)}
    others = {name: found for name, found in names.items() if found != "past_key_values"}
    assert others == {"mamba2": "cache_params", "minimax": None, "recurrent_gemma": None}
    said = "note: {}ForCausalLM is sampled without a cache, slowly, as it {}\n"
    assert set(capsys.readouterr().out.splitlines(keepends=True)) == {
        said.format("MiniMax", "doesn't take transformers' DynamicCache"),
        said.format("RecurrentGemma", "reads the padding of shorter prompts"),
    }


def forgets_the_order(lm, monkeypatch) -> None:
    monkeypatch.setattr(tf.DynamicCache, "reorder_cache", lambda *_: None)


def ignores_the_mask(lm, monkeypatch) -> None:
    real = lm.base_model.forward
    monkeypatch.setattr(lm.base_model, "forward", lambda *args, attention_mask=None, **more: real(*args, **more))


def refuses_to_reorder(lm, monkeypatch) -> None:
    monkeypatch.delattr(tf.cache_utils.Cache, "reorder_cache")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (forgets_the_order, "gives other answers with its cache than without"),
        (ignores_the_mask, "reads the padding of shorter prompts"),
        (refuses_to_reorder, "can't pad or reorder the rows of its cache"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_that_would_go_wrong_is_not_used(change, reason, dtype, monkeypatch, capsys):
    lm = family("lfm2", spread=0.1, dtype=dtype)
    with_cache = measured_cache(lm)
    change(lm, monkeypatch)
    without = measured_cache(lm)
    assert (with_cache.name, without.name) == ("past_key_values", None)
    assert capsys.readouterr().out.endswith(f"is sampled without a cache, slowly, as it {reason}\n")
    assert without.bytes(200) - without.bytes(100) > with_cache.bytes(200) - with_cache.bytes(100) > 0


def test_what_rows_take_without_a_cache_is_counted_without_weights():
    with torch.device("meta"):
        lm = tf.AutoModelForCausalLM.from_config(family_config("minimax"))
    lm.set_experts_implementation("qalign_experts_shape")  # as `fit` does
    found = measured_cache(lm)
    assert found.name is None
    assert 0 < found.bytes(100) < found.bytes(200) / 1.9
