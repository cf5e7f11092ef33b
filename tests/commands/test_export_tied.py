"""Merging on a base whose embeddings and output layer are one tensor, and whose generation config is inconsistent."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from qalign.data.templates import ChatTemplate
from qalign.data.tokenize import end_of_turn_id
from tests.commands.test_export_merged import STRONG, logits, stored, unmerged
from tests.helpers import merge
from tests.reward_runs import run_stage, write_recipe


@pytest.fixture
def tied(tiny_folder, tmp_path) -> str:
    """The tiny model with one tensor for its embeddings and its output layer; its generation config contradicts itself,
    as those of Llama 2 and Vicuna did."""
    lm = LlamaForCausalLM.from_pretrained(tiny_folder)
    lm.config.tie_word_embeddings = True
    lm.tie_weights()
    lm.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "model")
    settings = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    return str(tmp_path / "model")


def test_tied_embeddings_stay_tied(tied, tmp_path, capsys):
    run = run_stage(write_recipe(tmp_path, tied, "dpo", **STRONG))
    merge(str(run.path), "dequantized", None)
    target = run.path / "merged-dequantized"
    assert "lm_head.weight" not in stored(target)
    merged = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    assert "changed or left out: do_sample" in capsys.readouterr().out
    settings = merged.generation_config
    assert (settings.do_sample, settings.temperature, settings.top_p) == (True, 0.9, 0.6)
    assert settings.eos_token_id[0] == end_of_turn_id(ChatTemplate(AutoTokenizer.from_pretrained(target)))
    bare, expected = unmerged(run)
    assert (logits(merged) - expected).abs().mean() < 0.1 * (bare - expected).abs().mean()


def divergence(trained: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL of the next-token distributions, in nats."""
    p, q = trained.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_an_adapter_on_tied_embeddings_changes_what_is_read_and_not_what_is_predicted_with(tied, tmp_path, onto):
    """Merged into both, the model would be farther from the trained one than the untrained base is."""
    lora = {"r": 4, "targets": ["embed_tokens", "q_proj"]}
    model = {"compute_dtype": "float32", "quantization": "none"}  # in which both bases are the same
    run = run_stage(write_recipe(tmp_path, tied, "sft", model=model, lora=lora, **STRONG))
    merge(str(run.path), onto, None)
    target = run.path / f"merged-{onto}"
    bare, trained = unmerged(run)
    merged = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert merged.config.tie_word_embeddings is False
    assert torch.equal(stored(target)["lm_head.weight"], stored(tied)["model.embed_tokens.weight"].to(torch.bfloat16))
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    learned = divergence(trained, bare)
    assert learned > 0.01
    assert divergence(trained, logits(merged)) < 0.02 * learned
