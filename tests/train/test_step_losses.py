"""Losses whose pairs are compared over a whole optimiser step (AOT), and BCO's shift, a mean over all steps before."""

import pytest
import torch

from qalign.config.recipe import Lora
from qalign.data.collate import MicroBatchLimit
from qalign.errors import Stopped
from qalign.model.base import Role
from qalign.train.trainers.policy import SHIFT
from tests.helpers import TEST, house_style, metrics, scramble, stopping_after, train
from tests.train.runs import assert_same_run
from tests.train.test_pair_trainers import pair_losses, trainer_of

AOT = ["aot", "aot_unpaired", {"aot_unpaired": 0.5, "sigmoid": 1.0, "sft": 0.2}]


@pytest.fixture
def base(tiny_base):
    """The tiny model with a policy that does something."""
    tiny_base.add_adapter(Role.POLICY, Lora(r=4, alpha=8))
    scramble(tiny_base, scale=0.2)
    return tiny_base


def step_of(base, folder, loss, micro: int):
    """(losses of a step by the places of its pairs, gradients) in micro-batches of this many pairs."""
    pairs = house_style(base.tokenizer, 7)
    trainer = trainer_of(base, folder, pairs, micro=MicroBatchLimit(pairs=micro), chosen={"loss": loss, "beta": 2.0})
    trainer.create_optimizer()
    base.model.zero_grad()
    kept, read = [], trainer._read
    trainer._read = lambda: kept.extend(trainer._unread) or read()
    with base.packed_attention():
        trainer.training_step(trainer.model, pairs, len(pairs))
    found = {where: loss.item() for places, losses, _ in kept for where, loss in zip(places, losses, strict=True)}
    return found, {name: p.grad.clone() for name, p in base.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", AOT)
def test_micro_batches_change_neither_loss_nor_gradient(base, tmp_path, loss):
    whole, gradients = step_of(base, tmp_path, loss, 7)
    for micro in (1, 3):
        found, others = step_of(base, tmp_path, loss, micro)
        assert found == pytest.approx(whole, rel=1e-4)
        for name, gradient in gradients.items():
            assert (others[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    assert len({*whole.values()}) == 7


def test_the_pairs_of_a_micro_batch_alone_would_have_another_loss(base, tmp_path):
    """So the test above shows something."""
    whole, _ = step_of(base, tmp_path, "aot", 7)
    trainer = trainer_of(base, tmp_path, [], chosen={"loss": "aot", "beta": 2.0})
    with torch.no_grad():
        alone = {pair.where: pair_losses(trainer, [pair]).item() for pair in house_style(base.tokenizer, 7)}
    assert alone != pytest.approx(whole, rel=1e-2)


@pytest.mark.parametrize(("loss", "micro", "passes"), [("aot", 2, 8), ("aot", 7, 1), ("sigmoid", 2, 4)])
def test_only_a_step_of_several_micro_batches_takes_a_second_pass(
    base,
    tmp_path,
    monkeypatch,
    loss,
    micro,
    passes,
):
    calls, real = [], type(base).batch
    monkeypatch.setattr(
        type(base), "batch", lambda self, rows, *more: calls.append(len(rows)) or real(self, rows, *more)
    )
    step_of(base, tmp_path, loss, micro)
    assert len(calls) == passes


def test_the_held_out_loss_does_not_depend_on_micro_batches(base, tmp_path):
    pairs, found = house_style(base.tokenizer, 7), []
    for micro in (1, 2, 7):
        values = {"eval_pairs": pairs, "per_device_eval_batch_size": 5}
        limit = MicroBatchLimit(pairs=micro)
        found.append(trainer_of(base, tmp_path, pairs, micro=limit, chosen={"loss": "aot"}, **values).evaluate())
    assert found[0]["eval_loss"] == pytest.approx(found[2]["eval_loss"], rel=1e-5)
    assert found[1]["eval_loss"] == pytest.approx(found[2]["eval_loss"], rel=1e-5)


def test_bcos_shift_is_the_mean_reward_of_the_steps_before(recipe_file):
    run = train(recipe_file(loss="bco_pair", limit=12, max_steps=4, learning_rate=1e-2))
    lines, means = metrics(run), []
    for line in lines:
        means.append((line["rewards/chosen"] + line["rewards/rejected"]) / 2)
        assert line[SHIFT] == pytest.approx(sum(means) / len(means), rel=1e-5, abs=1e-7)
    assert abs(lines[-1][SHIFT]) > 1e-3
    other = train(recipe_file("one.yaml", "one", loss="bco_pair", limit=12, max_steps=4, learning_rate=1e-2,
                              micro_batch_size=1))  # fmt: skip
    for line, same in zip(lines, metrics(other), strict=True):
        assert same["loss"] == pytest.approx(line["loss"], rel=1e-5)
    assert SHIFT not in metrics(train(recipe_file("dpo.yaml", "dpo", limit=8, max_steps=1)))[0]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["bco_pair", "aot"])
def test_a_run_that_was_cut_short_resumes_to_the_same_numbers(recipe_file, loss):
    keys = {"loss": loss, "limit": 20, "save_every": 2, "learning_rate": 1e-2, "eval_data": TEST, "eval_every": 2}
    keys |= {"trainer": {"logging_steps": 3}, "max_steps": 5}
    whole = train(recipe_file("whole.yaml", "whole", **keys))
    path = recipe_file("cut.yaml", "cut", **keys)
    with stopping_after(2), pytest.raises(Stopped):
        train(path)
    assert_same_run(train(path, resume=True), whole)
