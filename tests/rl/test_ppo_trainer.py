"""The numbers of one PPO iteration: order of prompts and passes, rewards, advantages, when updates stop, memory."""

import gc
import math

import pytest
import torch
from accelerate import Accelerator
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoConfig, AutoModelForCausalLM

from qalign.config.recipe import Lora, Recipe
from qalign.data.collate import MicroBatchLimit
from qalign.data.templates import ChatTemplate
from qalign.model.base import Base, Role
from qalign.model.memory.forecast import Forecast
from qalign.rl.ppo_setup import bytes_by_role
from qalign.rl.ppo_trainer import PPOTrainer
from qalign.rl.rewards import AdapterScorer
from tests.conftest import FIXTURES
from tests.rl.conftest import collected
from tests.train.processes import SCALE, Idle, scale_losses


def test_each_pass_sees_every_answer_once_in_another_order(trainer_of):
    trainer = trainer_of()
    rollout = collected(trainer, advantages=False)
    passes = [trainer._mini_batches(rollout, epoch) for epoch in range(3)]
    orders = [[n for mini in minis for micro in mini for n in micro] for minis in passes]
    assert [sorted(order) for order in orders] == [[0, 1, 2, 3]] * 3
    assert len({tuple(order) for order in orders}) > 1


def test_every_prompt_is_answered_before_any_comes_again(trainer_of):
    trainer = trainer_of(batch_size=4)
    drawn = []
    for trainer.done in range(4):
        drawn.append([prompt.where for prompt, _ in trainer._next_prompts()])
    assert sorted(drawn[0] + drawn[1]) == sorted(drawn[2] + drawn[3]) == [f"rows.jsonl:{n}" for n in range(1, 5)]


def test_rewards_are_normalised_clipped_and_charged_for_kl_and_for_a_missing_end(trainer_of):
    trainer = trainer_of(reward_clip=1.0, missing_eos_penalty=0.25, gae_lambda=1.0)
    rollout = collected(trainer, advantages=False)
    assert rollout.ended.any()
    assert not rollout.ended.all()
    rollout.reference_logps = rollout.old_logps - 0.5 * rollout.mask
    trainer.kl_coefficient = 0.1
    trainer.score(rollout)
    found = trainer.advantages(rollout)
    scores = rollout.scores
    normal = ((scores - scores.mean()) / scores.std(correction=0)).clamp(-1, 1) - 0.25 * ~rollout.ended
    expected = normal - 0.1 * 0.5 * rollout.mask.sum(dim=1)
    assert found["objective/rlhf_reward"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert found["objective/non_score_reward"] == pytest.approx(-0.05 * rollout.tokens / 8, abs=1e-5)
    assert rollout.returns[:, 0].tolist() == pytest.approx(expected.tolist(), abs=1e-5), "reward to go, undiscounted"
    assert rollout.advantages[rollout.mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert rollout.advantages[rollout.mask].std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_scores_may_be_measured_from_the_mean_of_their_prompt(trainer_of):
    trainer = trainer_of(reward_scaling="prompt", missing_eos_penalty=0.25, gae_lambda=1.0, kl_coefficient=0.0)
    rollout = collected(trainer)
    scores = rollout.scores
    normal = ((scores - scores.mean()) / scores.std(correction=0) - 0.25 * ~rollout.ended).view(4, 2)
    expected = (normal - normal.mean(dim=1, keepdim=True)).flatten()
    assert rollout.returns[:, 0].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def with_reward_model(trainer: PPOTrainer, reward_run, weight: float = 1.0) -> PPOTrainer:
    recipe = Recipe(model=trainer.base.spec, output="unused", ppo=trainer.settings)
    scorer = AdapterScorer("ppo.reward", reward_run.adapter, weight, recipe)
    scorer.attach(trainer.base, Role.REWARD, MicroBatchLimit(pairs=1))
    trainer.scorers = [scorer]
    return trainer


@pytest.mark.parametrize("weight", [1.0, -0.5])
@pytest.mark.parametrize("scaling", ["running", "prompt", "none"])
def test_a_value_model_copied_from_the_reward_model_begins_in_the_units_of_its_returns(
    scaling, weight, trainer_of, reward_run
):
    """Otherwise the reward model's level would stay on the advantage of every last token, whatever the score."""
    trainer = trainer_of(value="adapter", reward_scaling=scaling, missing_eos_penalty=0.0, kl_coefficient=0.0)
    with_reward_model(trainer, reward_run, weight)
    trainer.base._heads[Role.VALUE].register_forward_hook(lambda module, given, output: output + 40)
    rollout = collected(trainer, advantages=False)
    raw = rollout.values.clone()
    assert raw[rollout.mask].mean() > 30
    trainer.score(rollout)
    trainer.advantages(rollout)
    scores = rollout.scores
    if scaling != "none":
        scores = (scores - scores.mean()) / scores.std(correction=0)
    if scaling == "prompt":
        scores = (scores.view(4, 2) - scores.view(4, 2).mean(dim=1, keepdim=True)).flatten()
    values, raw = rollout.values[rollout.mask], raw[rollout.mask]
    sign = 1 if weight > 0 else -1
    expected = (raw - raw.mean()) / raw.std(correction=0) * sign * scores.std(correction=0) + scores.mean()
    assert torch.allclose(values, expected, atol=1e-3 * scores.std().item())
    again = trainer.collect([(row.prompt, row.tokens.prompt_ids) for row in rollout.rows], 2, seed=1)
    assert torch.allclose(again.values, rollout.values, atol=1e-3 * scores.std().item()), "and it stays in them"


def test_first_scores_that_are_all_alike_leave_the_value_model_its_unit(trainer_of, reward_run):
    trainer = with_reward_model(trainer_of(value="adapter", missing_eos_penalty=0.0), reward_run)
    rollout = collected(trainer, advantages=False)
    rollout.scores = torch.zeros(8)
    trainer.advantages(rollout)
    assert trainer.value_units[1] == 1.0
    assert rollout.values[rollout.mask].mean().item() == pytest.approx(0, abs=1e-5)


def test_a_norm_of_0_clips_nothing(trainer_of):
    found = []
    for norm in (0, 1e9):
        trainer = trainer_of(trainer={"max_grad_norm": norm})
        trainer.iterate()
        found.append({name: weight.detach().clone() for name, weight in trainer.weights.items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_updates_stop_once_the_policy_is_too_far_and_that_step_is_not_taken(trainer_of, monkeypatch):
    """The first step is always taken, at KL 0; the bound is passed at the second."""
    found = {}
    for kl_stop in (None, 1e-9):
        trainer, taken = trainer_of(update_epochs=4, kl_stop=kl_stop), []
        step = trainer.optimizer.step
        monkeypatch.setattr(trainer.optimizer, "step", lambda step=step, taken=taken: (taken.append(1), step()))
        assert trainer.iterate()[1]["optimizer_steps"] == len(taken)
        found[kl_stop] = len(taken)
    assert found == {None: 8, 1e-9: 1}


def test_the_kl_coefficient_adapts_to_its_target(trainer_of):
    trainer = trainer_of(kl_target=1e-6)
    trainer.iterate()
    assert trainer.kl_coefficient == pytest.approx(0.05 * 0.98), "KL was 0"
    for _ in range(2):
        rollout, _ = trainer.iterate()
    assert rollout.kl.mean() > 1e-5
    assert trainer.kl_coefficient > 0.05 * 0.98


# --- memory: one base for all roles ----------------------------------------------------------------------------------


def heap_storages() -> dict[int, tuple]:
    """Every tensor alive, by the address of its content."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.device.type == "cpu"]
    tensors = [t for t in tensors if not isinstance(t, FakeTensor)]  # what other tests left has no content
    return {t.untyped_storage().data_ptr(): (t.untyped_storage().nbytes(), tuple(t.shape)) for t in tensors}


@pytest.fixture
def all_roles(trainer_of, reward_run, tmp_path):
    """Makes a trainer with policy, reference, reward and value model, after one iteration."""

    def make() -> PPOTrainer:
        trainer = trainer_of(value="adapter")
        trainer.base.load_adapter(Role.REWARD, str(reward_run.adapter), trainable=False)
        trainer.base.save_adapter(Role.POLICY, tmp_path / "copy")
        trainer.base.load_reference(str(tmp_path / "copy"))
        trainer.done = 1
        trainer.iterate()
        return trainer

    return make


def test_one_copy_of_every_base_weight_with_all_roles_at_work(all_roles):
    before = set(heap_storages())
    trainer = all_roles()
    weights = {
        name: p for name, p in trainer.base.model.named_parameters() if not any(f".{role}." in name for role in Role)
    }
    alive = {address: held for address, held in heap_storages().items() if address not in before}
    for name, weight in weights.items():
        size = weight.untyped_storage().nbytes()
        if size < 2000:  # many other tensors are as small as a norm's weights
            continue
        copies = [held for held in alive.values() if held == (size, tuple(weight.shape))]
        twins = sum(other.shape == weight.shape for other in weights.values())
        assert len(copies) == twins, f"{name}: {len(copies)} tensors of its size, {twins} weights"


def test_bytes_by_role_to_the_number(all_roles):
    trainer = all_roles()
    found = bytes_by_role(trainer.base, trainer.optimizer)
    policy = sum(w.numel() for w in trainer.base.trained_weights(Role.POLICY).values())
    optimiser = found[Role.POLICY].pop("optimiser")
    assert found[Role.POLICY] == {"weights": 4 * policy, "gradients": 4 * policy}
    assert optimiser == pytest.approx(8 * policy, rel=0.01)
    assert found[Role.REFERENCE] == {"weights": 4 * policy, "gradients": 0, "optimiser": 0}
    assert found[Role.REWARD] == {"weights": 4 * (policy + 64), "gradients": 0, "optimiser": 0}
    assert found[Role.VALUE]["weights"] == 4 * (policy + 64)
    embeddings = 2 * 2006 * 64 * 4
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # weights in 4 bits
    assert embeddings + linear / 2 < found[Role.BASE]["weights"] < embeddings + linear / 2 + 20_000  # scales, norms
    assert all(weight.grad is None for weight in trainer.weights.values()), "gradients live in updates only"


def test_at_mistrals_shape_four_roles_take_little_more_than_one():
    """On tensors without content: the 4-bit base with the weights of policy, reference, reward model and value model,
    against the 4-bit base with one adapter."""
    config = AutoConfig.from_pretrained(FIXTURES / "configs" / "Mistral-7B-v0.3")
    spec = {"base": "unused", "compute_dtype": "bfloat16"}
    recipe = Recipe.model_validate({"model": spec, "output": "unused", "ppo": {"data": "a", "reward": "a.py:f"}})
    held = Forecast(recipe, "ppo", config, "cuda", torch.bfloat16).fixed["base"]
    assert 4.1e9 < held < 4.2e9
    with torch.device("meta"):
        base = Base(
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), ChatTemplate(None), None, recipe.model
        )
        for role in (Role.POLICY, Role.REFERENCE, Role.REWARD, Role.VALUE):
            base.add_adapter(role, Lora(r=16))
        for role in (Role.REWARD, Role.VALUE):
            base.add_head(role)
    sizes = [sum(weight.nbytes for weight in base.trained_weights(role).values()) for role in base.adapters]
    assert sizes[:2] == [4 * 41_943_040] * 2
    assert (held + sum(sizes)) / (held + sizes[0]) < 1.15


@pytest.mark.parametrize(("gradient", "scale"), [(1.0, SCALE), (math.inf, SCALE / 2)])
def test_a_process_without_a_micro_batch_steps_in_float16_as_the_others_do(gradient, scale, trainer_of, monkeypatch):
    """Where a gradient isn't finite, no process takes the step, and all halve the scale."""
    trainer = trainer_of(batch_size=2, mini_batches=1, update_epochs=1)
    rollout = collected(trainer)
    trainer.world, trainer.accelerator = Idle(), Accelerator(cpu=True)
    scale_losses(trainer.accelerator, monkeypatch, gradient)
    trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer.optimizer)
    before = {name: weight.clone() for name, weight in trainer.weights.items()}
    trainer.update(rollout)
    moved = {name: not torch.equal(before[name], weight) for name, weight in trainer.weights.items()}
    assert moved == dict.fromkeys(before, scale == SCALE)
    assert trainer.accelerator.scaler.get_scale() == scale
