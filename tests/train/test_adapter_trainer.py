"""What all trainers share: the schedule that counts from 1, and the check for losses that are not finite."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from qalign.config.recipe import Lora
from qalign.config.stages import PPO
from qalign.errors import UserError
from qalign.model.base import Role
from qalign.rl.ppo_setup import make_optimizer
from qalign.train.trainers.adapter import schedule_from_one
from qalign.train.trainers.pairs import PairTrainer
from qalign.train.trainers.sft import SupervisedTrainer
from tests.helpers import house_style, metrics
from tests.reward_runs import DATA, run_stage, write_recipe
from tests.train.processes import SCALE, Idle, scale_losses
from tests.train.test_pair_trainers import trainer_of

PEAK = 0.5
KINDS = {
    "linear": {}, "cosine": {}, "constant": {}, "constant_with_warmup": {}, "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0}, "inverse_sqrt": {}, "cosine_with_min_lr": {"min_lr": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 1}, "cosine_warmup_with_min_lr": {"min_lr": 0.1},
    "reduce_lr_on_plateau": {},
}  # fmt: skip


def rates(kind: str, warmup: int, steps: int) -> list[float]:
    """The learning rate of every step, as an optimiser has it."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=PEAK)
    args = TrainingArguments(output_dir="unused", use_cpu=True, lr_scheduler_kwargs=KINDS[kind])
    schedule = schedule_from_one(kind, optimizer, warmup, steps, args)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step(*([1.0] if kind == "reduce_lr_on_plateau" else []))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (1, 1), (1, 2), (1, 7), (4, 7), (7, 7), (20, 7)])
def test_no_step_has_the_learning_rate_0(kind, warmup, steps):
    assert all(0 < rate <= PEAK * (1 + 1e-6) for rate in rates(kind, warmup, steps))


def test_a_schedule_counts_its_steps_from_one():
    """Two steps of warm-up, then down a line that would reach 0 one step after the last."""
    assert rates("linear", 2, 4) == pytest.approx([PEAK / 2, PEAK, PEAK * 2 / 3, PEAK / 3])
    cosine = [PEAK * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in (1, 2, 3)]
    assert rates("cosine", 0, 3) == pytest.approx(cosine)
    assert rates("constant_with_warmup", 3, 4) == pytest.approx([PEAK / 3, PEAK * 2 / 3, PEAK, PEAK])


def test_ppo_has_the_same_schedule():
    settings = PPO(data="a.jsonl", reward="a.py:f", scheduler="linear", warmup_ratio=0.5, learning_rate=PEAK)
    _, rate, _ = make_optimizer(settings, [torch.nn.Parameter(torch.zeros(1))], 4)
    assert [rate(done) for done in range(4)] == pytest.approx(rates("linear", 2, 4))


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "kto"])
def test_a_run_of_one_step_moves_the_adapter(stage, tmp_path, tiny_folder):
    run = run_stage(write_recipe(tmp_path / stage, tiny_folder, stage, max_steps=1))
    (line,) = metrics(run)
    assert line["learning_rate"] == 1e-2
    weights = load_file(run.adapter / "adapter_model.safetensors")
    moved = [tensor.abs().max().item() for name, tensor in weights.items() if "lora_B" in name]
    assert len(moved) == 14
    assert min(moved) > 5e-3  # Adam's first step is the learning rate


def test_the_schedule_falls_over_the_whole_run(tmp_path, tiny_folder):
    """The recipe's words, in the metrics of a run."""
    keys = {"scheduler": "linear", "warmup_ratio": 0.5, "limit": 16}
    lines = metrics(run_stage(write_recipe(tmp_path, tiny_folder, "dpo", **keys)))
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.5e-2, 1e-2, 1e-2 * 2 / 3, 1e-2 / 3])


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "kto"])
def test_a_held_out_loss_that_is_not_finite_names_its_row(stage, tmp_path, tiny_folder, monkeypatch):
    """The rows of training are fine, so it is the held-out ones that are blamed."""
    held_out = DATA / ("house_style_dialogues_test.jsonl" if stage == "sft" else "house_style_test.jsonl")
    path = write_recipe(tmp_path, tiny_folder, stage, eval_data={"path": str(held_out), "limit": 1}, eval_every=1)
    kind = SupervisedTrainer if stage == "sft" else PairTrainer
    real = kind.evaluate

    def broken(trainer, *args, **kwargs):
        trainer.base.lm.get_input_embeddings().weight.data.fill_(math.nan)
        return real(trainer, *args, **kwargs)

    monkeypatch.setattr(kind, "evaluate", broken)
    with pytest.raises(UserError, match=rf"^step 1: the held-out loss is not finite on .*{held_out.name}:1"):
        run_stage(path)


@pytest.mark.parametrize(("gradient", "scale"), [(1.0, SCALE), (math.inf, SCALE / 2)])
def test_a_process_without_a_micro_batch_steps_in_float16_as_the_others_do(
    gradient, scale, tiny_base, tmp_path, monkeypatch
):
    """Where a gradient isn't finite, no process takes the step, and all halve the scale."""
    tiny_base.add_adapter(Role.POLICY, Lora(r=4))
    pairs = house_style(tiny_base.tokenizer, 1)
    trainer = trainer_of(tiny_base, tmp_path, pairs, max_steps=1, num_train_epochs=1)
    trainer.world, trainer.after_step = Idle(), lambda sums: None  # the first process has figures, which are left out
    scale_losses(trainer.accelerator, monkeypatch, gradient)
    weights = [*tiny_base.trained_weights(Role.POLICY).values()]
    before = [weight.clone() for weight in weights]
    trainer.train()
    assert [not torch.equal(*both) for both in zip(before, weights, strict=True)] == [scale == SCALE] * len(before)
    assert trainer.accelerator.scaler.get_scale() == scale
