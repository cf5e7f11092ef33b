"""Runs without a value model: what is in memory, which prompts an update leaves out, and what is the same whatever the
micro-batches."""

from itertools import chain

import pytest
import torch

from qalign.config.stages import GRPO
from qalign.data.collate import MicroBatchLimit
from qalign.model.base import Role
from qalign.rl.objective import informative
from tests.helpers import scramble
from tests.rl.conftest import assert_alike, collected

WITHOUT = {"value": "none", "missing_eos_penalty": 0.0}


@pytest.mark.parametrize("advantage", ["rloo", "grpo", "dr_grpo"])
def test_there_is_no_value_model(advantage, trainer_of):
    trainer = trainer_of(advantage=advantage, **WITHOUT)
    assert Role.VALUE not in trainer.base.adapters
    assert not trainer.base._heads
    assert all(name.startswith("policy/") for name in trainer.weights)
    rollout, found = trainer.iterate()
    assert not rollout.values.any()
    assert {"loss", "policy/clipfrac_avg", "objective/kl", "frac_reward_zero_std"} <= set(found)
    assert not any("value" in name or name in ("val/explained", "val/clipfrac_avg") for name in found)
    assert ("loss/kl_avg" in found) == (advantage != "rloo")


@pytest.mark.parametrize("keys", [{"advantage": "grpo"}, {"advantage": "grpo", "ratio": "sequence"},
                                  {"advantage": "rloo", "learning_rate": 1e-3},
                                  {"advantage": "dr_grpo", "kl": "none"}])  # fmt: skip
def test_micro_batches_change_no_number(keys, trainer_of):
    curves = []
    for limit in (MicroBatchLimit(pairs=1), MicroBatchLimit(pairs=4)):
        trainer = trainer_of(limit=limit, **WITHOUT, **keys)
        curves.append([trainer.iterate()[1] for _ in range(2)])
        for step in curves[-1]:
            step.pop("policy/clipfrac_avg")
    assert_alike(*curves, 2e-4)


def test_the_advantage_of_an_answer_is_that_of_all_its_tokens(trainer_of):
    trainer = trainer_of(advantage="rloo", kl="in_reward", kl_coefficient=0.1, **WITHOUT)
    rollout = collected(trainer, advantages=False)
    rollout.reference_logps = rollout.old_logps - 0.5 * rollout.mask
    trainer.score(rollout)
    trainer.advantages(rollout)
    rewards = (rollout.scores - 0.1 * 0.5 * rollout.mask.sum(dim=1)).view(4, 2)
    expected = torch.stack([rewards[:, 0] - rewards[:, 1], rewards[:, 1] - rewards[:, 0]], dim=1).flatten()
    for row, mask, advantage in zip(rollout.advantages, rollout.mask, expected, strict=True):
        assert row[mask].tolist() == pytest.approx([advantage.item()] * int(mask.sum()), abs=1e-6)
        assert not row[~mask].any()


def scored(trainer, *scores: float):
    """Replaces the reward: the same scores in every iteration."""
    trainer.scorers[0].function = lambda completion_ids: list(scores)
    return trainer


def test_prompts_whose_answers_score_alike_are_left_out_and_counted(trainer_of):
    """Prompts 1 and 3 of four: the update sees the others alone, as if only they had been sampled."""
    keys = {"advantage": "grpo", "dynamic_sampling": True, "mini_batches": 1, "update_epochs": 1, **WITHOUT}
    trainer = scored(trainer_of(**keys), 0, 1, 2, 2, 5, 1, -1, -1)
    seen, gradients = [], trainer._gradients
    trainer._gradients = lambda rollout, mini: seen.extend(chain(*mini)) or gradients(rollout, mini)
    rollout, found = trainer.iterate()
    assert rollout.used == [0, 2]
    assert sorted(seen) == [0, 2]
    assert (found["dynamic_sampling/left_out"], found["frac_reward_zero_std"]) == (2, 0.5)
    assert rollout.old_logps[rollout.mask].all(), "log-probs of all answers are read, for KL and entropy"
    assert found["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert found["optimizer_steps"] == 1
    plain = scored(trainer_of(**keys | {"dynamic_sampling": False}), 0, 1, 2, 2, 5, 1, -1, -1)
    _, all_of_them = plain.iterate()
    assert "dynamic_sampling/left_out" not in all_of_them
    assert all_of_them["frac_reward_zero_std"] == 0.5


def test_an_iteration_whose_prompts_are_all_left_out_changes_nothing(trainer_of):
    trainer = scored(trainer_of(advantage="grpo", dynamic_sampling=True, **WITHOUT), *[3.0] * 8)
    before = {name: weight.clone() for name, weight in trainer.weights.items()}
    _, found = trainer.iterate()
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.weights.items())
    assert (found["loss"], found["optimizer_steps"], found["dynamic_sampling/left_out"]) == (0.0, 0, 4)
    _, found = scored(trainer, 0, 1, 2, 2, 5, 1, -1, -1).iterate()
    assert found["optimizer_steps"] > 0, "it goes on with the next prompts"


def test_an_answer_that_was_cut_tells_answers_apart(trainer_of):
    trainer = trainer_of(advantage="grpo", **WITHOUT | {"missing_eos_penalty": 0.5})
    rollout = collected(trainer, advantages=False)
    rollout.scores = torch.zeros(8)
    ended = rollout.ended.view(4, 2)
    expected = [number for number, both in enumerate(ended) if both.any() and not both.all()]
    assert informative(rollout, trainer.settings) == expected
    assert expected


def test_kl_in_the_loss_pulls_the_policy_back(trainer_of):
    """With rewards that teach nothing, the KL to the reference falls; with `kl: none` the policy stays where it is."""
    found = {}
    for kl in ("in_loss", "none"):
        keys = {"kl_coefficient": 1.0} if kl == "in_loss" else {}
        trainer = trainer_of(advantage="dr_grpo", kl=kl, **WITHOUT | keys)
        scramble(trainer.base, scale=0.1)
        trainer.done = 1  # the policy isn't its reference
        scored(trainer, *[0.0] * 8)
        found[kl] = [trainer.iterate()[1]["objective/kl_k3"] for _ in range(5)]
    assert found["in_loss"][-1] < 0.8 * found["in_loss"][0]
    assert found["none"][-1] > 0.9 * found["none"][0]


def test_grpos_section_has_its_own_defaults():
    settings = GRPO(data="a", reward="a.py:f")
    assert (settings.advantage, settings.value, settings.kl) == ("grpo", "none", "in_loss")
    assert (settings.samples_per_prompt, settings.mini_batches, settings.update_epochs) == (8, 1, 1)
    other = GRPO(data="a", reward="a.py:f", advantage="dr_grpo", kl="none")
    assert (other.kl, other.loss_average) == ("none", "constant"), "what is written comes before what follows"
