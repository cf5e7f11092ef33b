"""The DPO stage on a tiny model, where it differs from the other stages (`test_stages.py`)."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from qalign.config.load import load as load_recipe
from qalign.errors import UserError
from qalign.model.base import Base
from tests.conftest import FIXTURES, ROOT
from tests.families import family
from tests.helpers import TEST, metrics, slow, summary, train, train_recipe

LN_2 = 0.6931472


@pytest.mark.parametrize(("save_every", "logged"), [(100, [1, 6]), (4, [1, 4, 6])])
def test_the_first_the_last_and_every_saved_step_are_logged(recipe_file, save_every, logged):
    """A checkpoint is logged too, so that a resumed run logs the same means."""
    run = train(recipe_file(trainer={"logging_steps": 100}, save_every=save_every))
    assert [line["step"] for line in metrics(run)] == logged


@pytest.mark.slow
def test_the_best_checkpoint_can_be_the_one_that_is_kept(recipe_file):
    """Trainer's own `load_best_model_at_end` finds the policy in a checkpoint (here the highest loss is "best")."""
    keys = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    run = train(recipe_file(eval_data=TEST, eval_every=1, save_every=1, max_steps=4, trainer=keys))
    losses = {line["step"]: line["eval_loss"] for line in metrics(run) if "eval_loss" in line}
    best = max(losses, key=losses.get)
    assert best != 4, "the last step must not be the best, or this shows nothing"
    kept, checkpoint = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (run.adapter, run.checkpoints / f"checkpoint-{best}")
    )
    assert all(torch.equal(kept[name], checkpoint[name]) for name in kept)


def test_a_best_checkpoint_by_a_figure_that_is_not_measured_is_one_line(recipe_file):
    keys = {"metric_for_best_model": "eval_losss"}
    with pytest.raises(UserError, match=r"no 'losss' among .*; did you mean 'loss'\?; they have .*rewards/margins"):
        train(recipe_file(eval_data=TEST, eval_every=1, max_steps=2, trainer=keys))


@pytest.mark.parametrize("reference", ["cached", "in_step"])
def test_the_first_loss_is_ln_2_from_a_new_adapter_and_from_a_trained_one(recipe_file, capsys, reference):
    first = train(recipe_file(max_steps=4, reference=reference))
    assert "once a pair, packed without padding" in capsys.readouterr().out
    keys = {"max_steps": 1, "start_from": str(first.adapter), "reference": reference}
    second = train(recipe_file("second.yaml", output="again", **keys))
    for run, words in ((first, "the base with adapters off"), (second, str(first.adapter))):
        assert metrics(run)[0]["loss"] == pytest.approx(LN_2, abs=1e-6)
        assert summary(run)["reference"].endswith(words)


@pytest.mark.parametrize("loss", ["ipo", "orpo", *map(slow, ["hinge", "robust", "sigmoid_norm", "apo_zero", "simpo"])])
def test_every_loss_trains(recipe_file, loss):
    extra = {"label_smoothing": 0.1} if loss == "robust" else {}
    run = train(recipe_file(loss=loss, limit=8, epochs=6, learning_rate=5e-3, **extra))
    lines = metrics(run)
    assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"] + 0.01
    assert summary(run)["reference"].startswith("none" if loss in ("simpo", "orpo") else "the base")


def test_a_family_that_cannot_share_prompts_says_so_and_trains(recipe_file, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / "llama3")
    family("falcon", len(tokenizer), dtype=torch.float32, spread=0.1).save_pretrained(tmp_path / "falcon")
    tokenizer.save_pretrained(tmp_path / "falcon")
    run = train(recipe_file(model={"base": str(tmp_path / "falcon")}, limit=8, epochs=4, learning_rate=1e-2))
    assert "twice a pair, padded: FalconForCausalLM" in capsys.readouterr().out
    lines = metrics(run)
    assert lines[0]["loss"] == pytest.approx(LN_2, abs=1e-6)
    assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"] + 0.01


@pytest.mark.parametrize("name", ["hh_harmless.jsonl.gz", slow("alpaca_eval_prefs.jsonl.gz"), slow("dpo_en_demo.json")])
def test_real_data_trains(recipe_file, shared_data, name):
    run = train(recipe_file(data=str(shared_data / name), limit=12, max_steps=3, model={"max_length": 2048}))
    assert [line["step"] for line in metrics(run)] == [1, 2, 3]


@pytest.mark.parametrize("key", ["data", "eval_data"])
def test_training_rows_and_held_out_rows_are_checked_apart(recipe_file, write_jsonl, key):
    bad = write_jsonl("bad.jsonl", [{"prompt": "q", "chosen": "", "rejected": "no"}])
    with pytest.raises(UserError, match=rf"dpo\.{key}: 1 of 1 rows were refused"):
        train(recipe_file(**{"eval_data": TEST, key: bad}))


def test_rows_that_say_they_are_no_pair_are_left_out_and_not_refused(recipe_file, write_jsonl):
    pair, tie = {"prompt": "q", "chosen": "yes", "rejected": "no"}, {"prompt": "q", "no_pair": "a tie"}
    run = train(recipe_file(data=write_jsonl("votes.jsonl", [pair, tie, pair, tie]), max_steps=1))
    counts = {"used": 2, "held_out": 0, "refused": 0, "shortened": 0, "left_out": 2}
    assert summary(run)["rows"] == counts
    with pytest.raises(UserError, match=r"dpo\.data: none of its 2 rows is a pair; the first: a tie"):
        train(recipe_file(data=write_jsonl("ties.jsonl", [tie, tie])), overwrite=True)


def test_a_value_that_trl_refuses_is_one_line(recipe_file):
    with pytest.raises(UserError, match=r"dpo.trainer: .*not_an_optimizer") as raised:
        train(recipe_file(trainer={"optim": "not_an_optimizer"}))
    assert len(raised.value.lines) == 1


@pytest.mark.true_model
def test_the_demo_learns_on_the_true_model(tmp_path):
    """A few steps of the demo's own recipe: SmolLM2 in NF4, in the precision this machine picks."""
    words = ["start_from=null", "loss={sigmoid: 1, sft: 0.5}", "max_steps=6", "batch_size=4", "limit=24", "eval_data="]
    overrides = [f"output={tmp_path}", *(f"dpo.{word}" for word in words)]
    lines = metrics(train_recipe(load_recipe(str(ROOT / "recipes" / "smollm2_demo.yaml"), overrides, "dpo")))
    assert lines[0]["rewards/margins"] == 0
    assert lines[-1]["rewards/margins"] > 0.1
    assert lines[-1]["rewards/accuracies"] >= 0.75  # of four pairs: one may be close enough for bfloat16 to decide


def test_a_loss_without_a_reference_loads_no_frozen_copy(recipe_file, monkeypatch, capsys):
    parent = train(recipe_file(output="parent", max_steps=1)).adapter
    monkeypatch.setattr(Base, "load_reference", lambda *_: pytest.fail("a frozen copy was loaded"))
    train(recipe_file(output="simpo", loss="simpo", beta=2.0, start_from=str(parent), max_steps=1))
    assert "none: this loss needs no reference" in capsys.readouterr().out
