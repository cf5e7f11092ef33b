"""Settings as TRL's config, and what the loop says when it can't go on."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention

from qalign.config.stages import DPO
from qalign.data.collate import MicroBatchLimit
from qalign.errors import UserError
from qalign.model.memory import Plan
from qalign.train.callbacks import RunCallback
from qalign.train.loop import micro_batch, micro_batch_size, not_finite, planned_steps, train_to_the_end
from tests.helpers import TRAIN, metrics
from tests.reward_runs import run_stage, write_recipe


def settings(**keys) -> DPO:
    return DPO(data=TRAIN, **keys)


def test_micro_batch_auto_divides_and_fits():
    planned = Plan(4096, 0)
    assert micro_batch_size(settings(batch_size=12), planned, 1000) == 4  # 4 * 1000 <= 4096 < 6 * 1000
    assert micro_batch_size(settings(batch_size=12), planned, 1024) == 4  # exactly 4096
    assert micro_batch_size(settings(batch_size=7), planned, 1000) == 1
    assert micro_batch_size(settings(batch_size=12), planned, 5000) == 1  # a plan is never below the longest row
    assert micro_batch_size(settings(batch_size=12, micro_batch_size=3), planned, 5000) == 3


def test_planned_steps_count_a_short_last_batch():
    assert planned_steps(settings(batch_size=8), 17) == 3
    assert planned_steps(settings(batch_size=8, epochs=1.5), 17) == 5  # 3 an epoch, 4.5 rounded up
    assert planned_steps(settings(batch_size=8, max_steps=2), 17) == 2


@pytest.mark.parametrize(("size", "limit"), [("auto", MicroBatchLimit(tokens=4096)), (3, MicroBatchLimit(pairs=3))])
def test_trainers_of_pairs_take_tokens_or_pairs_at_a_time(size, limit):
    assert micro_batch(settings(batch_size=12, micro_batch_size=size), Plan(4096, 2)) == limit


@pytest.mark.parametrize(
    ("micro", "fix"),
    [
        (5, r"Try dpo\.micro_batch_size=1, or else model\.max_length=150$"),
        ("auto", r"Try dpo\.micro_batch_size=1, or else model\.max_length=150$"),
        (1, r"Try model\.max_length=150$"),
    ],
)
def test_out_of_memory_suggests_what_takes_less(micro, fix):
    def out_of_memory(**_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    recipe = SimpleNamespace(model=SimpleNamespace(max_length=300))
    run = SimpleNamespace(stage="dpo", recipe=recipe, settings=settings(batch_size=15, micro_batch_size=micro))
    at_once = "so much" + str(Plan(4096, 2))
    with pytest.raises(UserError, match=rf"with so much, 2 layers checkpointed \(CUDA out of memory\)\. {fix}"):
        train_to_the_end(SimpleNamespace(train=out_of_memory), run, SimpleNamespace(tokens_seen=0), None, at_once)


def test_not_finite_names_each_row_once():
    error = not_finite(SimpleNamespace(state=SimpleNamespace(global_step=4)), ["a.jsonl:1", "a.jsonl:2", "a.jsonl:1"])
    (line,) = error.lines
    assert line.startswith("step 5: the loss is not finite on a.jsonl:1, a.jsonl:2; ")


def test_a_resumed_run_counts_its_tokens_on(tmp_path):
    """TRL's trainers count from zero in each session."""
    journal = RunCallback(SimpleNamespace(metrics=tmp_path / "metrics.jsonl"), tokens_before=100)
    journal._bar = SimpleNamespace(set_postfix_str=lambda text: None)
    journal.on_log(None, SimpleNamespace(global_step=3), None, logs={"loss": 1.0, "num_tokens": 20.0})
    assert journal.tokens_seen == 120
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["num_tokens"] == 120


def test_a_checkpoint_keeps_no_half_filled_logging_window():
    control = SimpleNamespace(should_save=True, should_log=False)
    journal = RunCallback(SimpleNamespace(stop=SimpleNamespace(number=None)))
    journal._bar = SimpleNamespace(update=lambda count: None, n=0)
    journal.on_step_end(None, SimpleNamespace(global_step=3, max_steps=9), control)
    assert control.should_log


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_checkpointing_one_layer_of_two_changes_no_number(stage, tmp_path, tiny_folder, monkeypatch, capsys):
    forward, calls = LlamaAttention.forward, []

    def counted(layer, *args, **kwargs):
        if torch.is_grad_enabled():
            calls.append(layer.layer_idx)
        return forward(layer, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", counted)
    curves = []
    for layers in (0, 1):
        calls.clear()
        # No report on held-out pairs and no checkpoints: three steps and nothing else.
        run = run_stage(write_recipe(tmp_path / str(layers), tiny_folder, stage, checkpointed_layers=layers))
        assert calls.count(1) >= 3
        assert calls.count(0) == (1 + layers) * calls.count(1)  # a checkpointed layer runs again backward
        assert (", 1 layers checkpointed" in capsys.readouterr().out) == (layers == 1)
        curves.append(metrics(run))
    names = {"loss", "grad_norm", "logps/chosen", "rewards/margins"} & set(curves[0][0])
    assert {"loss", "grad_norm"} <= names
    for one, other in zip(*curves, strict=True):
        for name in names & set(one):
            assert one[name] == pytest.approx(other[name], rel=1e-6, abs=1e-6), name
