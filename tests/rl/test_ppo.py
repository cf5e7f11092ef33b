"""The PPO stage: invariants, its numbers against plain ones, learning, resuming, and what is said when things fail."""

import gc
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoConfig, AutoModelForCausalLM

from qalign import losses, ppo
from qalign.config.load import load as load_recipe
from qalign.config.recipe import PPO, Lora, Model, Recipe
from qalign.data.collate import MicroBatchLimit
from qalign.data.prompts import Prompt
from qalign.data.tokenize import encode_prompt
from qalign.errors import UserError
from qalign.model.base import Base, Role, load
from qalign.model.generation import Sampling, TransformersEngine
from qalign.model.memory import Forecast
from qalign.rl import ppo_loop, ppo_trainer
from qalign.rl.ppo_setup import bytes_by_role, prepare
from qalign.rl.ppo_trainer import PPOTrainer
from qalign.rl.rewards import AdapterScorer, FunctionScorer
from qalign.train.run_folder import RunFolder
from tests.conftest import FIXTURES, ROOT
from tests.helpers import digest, metrics, scramble
from tests.reward_runs import run_stage, write_recipe

REWARDS = """
def long(completion_ids):
    return [float(len(ids)) for ids in completion_ids]

def many(completion_ids):
    return [sum(token in GOOD for token in ids) / len(ids) for ids in completion_ids]

def many_too(completion_ids):
    return many(completion_ids)

def shrinking(completion_ids):
    return [-float(len(ids)) for ids in completion_ids]

def flat(completions):
    return [1.0] * len(completions)

def broken(completions, calls=[]):
    calls.append(1)
    return [float("nan") if len(calls) == 4 else 1.0] * len(completions)
"""
TIMES = ("tokens_per_second/", "share/")


@pytest.fixture
def rewards(tmp_path, tiny_folder) -> str:
    """`many` likes half of all tokens, those that one direction of the hidden states makes likelier: a model of random
    weights can learn that."""
    head = load_file(Path(tiny_folder) / "model.safetensors")["lm_head.weight"]
    good = (head[:, 0] > 0).nonzero()[:, 0].tolist()
    (tmp_path / "mine.py").write_text(f"GOOD = set({good})\n{REWARDS}")
    return str(tmp_path / "mine.py")


@pytest.fixture(scope="module")
def reward_run(tiny_folder, tmp_path_factory) -> RunFolder:
    return run_stage(write_recipe(tmp_path_factory.mktemp("ppo_reward") / "runs", tiny_folder))


@pytest.fixture(scope="module")
def sft_run(tiny_folder, tmp_path_factory) -> RunFolder:
    return run_stage(write_recipe(tmp_path_factory.mktemp("ppo_sft") / "runs", tiny_folder, "sft"))


@pytest.fixture
def recipe_of(tmp_path, tiny_folder, rewards):
    """Writes a recipe of PPO for the tiny model; keyword arguments go into its ppo section."""

    def write(name: str = "runs", model: dict | None = None, **keys) -> str:
        data = ROOT / "recipes" / "data"
        section = {
            "data": str(data / "house_style_train.jsonl"), "limit": 8, "reward": f"{rewards}:many",
            "batch_size": 8, "samples_per_prompt": 2, "micro_batch_size": 2, "max_steps": 3, "max_new_tokens": 8,
            "learning_rate": 1e-2, "scheduler": "constant", "warmup_ratio": 0.0, "save_every": 1, "kl_stop": None,
        }  # fmt: skip
        recipe = {
            "model": {"base": tiny_folder, "compute_dtype": "float32", "max_length": 256, **(model or {})},
            "lora": {"r": 4, "alpha": 8},
            "output": str(tmp_path / name),
            "ppo": section | keys,
        }
        (tmp_path / name).mkdir(exist_ok=True)
        path = tmp_path / name / "ppo.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return str(path)

    return write


@pytest.fixture
def held_out() -> list[dict]:
    return [{"path": str(ROOT / "recipes" / "data" / "house_style_test.jsonl"), "limit": 6}]


def lines(run: RunFolder) -> list[dict]:
    """The metrics without what the clock says."""
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in metrics(run)]


def assert_alike(one: list[dict], other: list[dict], tolerance: float = 1e-6) -> None:
    assert [line.keys() for line in one] == [line.keys() for line in other]
    for a, b in zip(one, other, strict=True):
        for key, value in a.items():
            assert b[key] == (pytest.approx(value, abs=tolerance) if isinstance(value, float) else value), key


@pytest.fixture
def trainer_of(tiny_folder, rewards, reward_run):
    """A trainer on a fresh base, ready to iterate; keyword arguments go into its settings."""

    def make(
        dtype: str = "float32",
        micro: MicroBatchLimit = MicroBatchLimit(pairs=1),  # noqa: B008
        value: str = "trunk",
        reward: str = "many",
        layers: int = 0,
        seed: int = 3,
        **keys,
    ) -> PPOTrainer:
        torch.manual_seed(0)
        base = load(Model(base=tiny_folder, compute_dtype=dtype, max_length=256))
        base.add_adapter(Role.POLICY, Lora(r=4))
        if value == "trunk":
            base.add_head(Role.VALUE)
        else:
            base.load_adapter(Role.VALUE, str(reward_run.adapter), trainable=True)
        settings = {"batch_size": 8, "samples_per_prompt": 2, "max_new_tokens": 8, "learning_rate": 1e-2}
        settings |= {"data": "unused.jsonl", "reward": "unused.py:f", "warmup_ratio": 0.0, "kl_stop": None}
        settings = PPO.model_validate(settings | {"value": value, "scheduler": "constant", **keys})
        questions = [
            (Prompt((turn,), f"rows.jsonl:{n}", {}), encode_prompt(base.tokenizer, [turn], {}))
            for n, turn in enumerate(({"role": "user", "content": f"Why is {x}?"} for x in "abcd"), start=1)
        ]
        ends = (base.tokenizer.eos_token_id, *range(200))  # a tenth of all tokens ends an answer
        return PPOTrainer(
            base, settings, questions, [FunctionScorer("ppo.reward", f"{rewards}:{reward}", 1.0)], TransformersEngine(),
            Sampling(settings.max_new_tokens, settings.temperature, ends), micro, layers, 10, seed,
        )  # fmt: skip

    return make


# --- invariants ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["trunk", "adapter"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_before_the_first_update_the_ratio_is_1_and_kl_is_0(dtype, value, temperature, trainer_of):
    trainer = trainer_of(dtype, value=value, temperature=temperature)
    rollout = trainer.collect(trainer._drawn(), 2, seed=1)
    assert torch.equal(rollout.old, rollout.reference)
    assert not rollout.kl.any()
    trainer.score(rollout)
    trainer.advantages(rollout)
    with trainer.base.reading_pairs():
        trainer.base.model.train()
        found = [trainer._gradients(rollout, mini) for mini in trainer._mini_batches(rollout.rows, epoch=0)]
    assert [part["furthest"] for part in found] == [0.0, 0.0]
    assert [part["ratio"] for part in found] == pytest.approx([1.0, 1.0], abs=1e-6)
    assert not any(part["clipped"] for part in found)


def test_old_log_probs_are_those_of_the_distribution_that_was_sampled(trainer_of):
    """Full logits at the temperature, one answer at a time; values and entropies of the very same places."""
    trainer = trainer_of(temperature=0.6)
    scramble(trainer.base)
    trainer.base._heads[Role.VALUE].weight.data.normal_(0, 0.1)
    rollout = trainer.collect(trainer._drawn(), 2, seed=1)
    answer = 0
    for row in rollout.rows:
        for ids in row.tokens.answers:
            sequence = torch.tensor([row.tokens.prompt_ids + ids])
            with torch.no_grad(), trainer.base.acting_as(Role.POLICY) as lm:
                logits = lm(sequence).logits[0, len(row.tokens.prompt_ids) - 1 : -1] / 0.6
                hidden = lm.base_model(sequence).last_hidden_state[0, len(row.tokens.prompt_ids) - 1 : -1]
            logps = logits.log_softmax(-1)
            assert rollout.mask[answer].tolist() == [token < len(ids) for token in range(rollout.mask.shape[1])]
            expected = {
                "old": logps.gather(1, torch.tensor(ids)[:, None])[:, 0],
                "entropies": -(logps.exp() * logps).sum(-1),
                "values": hidden @ trainer.base._heads[Role.VALUE].weight[0],
            }
            for name, tensor in expected.items():
                assert torch.allclose(getattr(rollout, name)[answer, : len(ids)], tensor, atol=1e-4), name
                assert not getattr(rollout, name)[answer, len(ids) :].any()
            answer += 1


def test_a_model_that_cannot_repeat_its_log_probs_is_refused(trainer_of, monkeypatch):
    trainer, plain = trainer_of(), ppo_trainer.state_logps
    trainer.done = 1  # not the first iteration, in which the reference is looked at
    shaken = lambda lm, states, *more: plain(lm, states + 0.01 * states.requires_grad, *more)  # noqa: E731
    monkeypatch.setattr(ppo_trainer, "state_logps", shaken)
    before = {name: weight.clone() for name, weight in trainer.weights.items()}
    with pytest.raises(UserError, match="the policy's log-probs can't be repeated"):
        trainer.iterate()
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.weights.items())


def test_a_policy_that_is_not_its_reference_is_refused_at_the_start(trainer_of):
    trainer = trainer_of()
    scramble(trainer.base)
    with pytest.raises(UserError, match=r"the policy is .* nats a token from its reference before the first update"):
        trainer.iterate()


def test_dropout_of_an_adapter_that_was_trained_with_it_is_off(trainer_of, tmp_path, tiny_base):
    tiny_base.add_adapter(Role.POLICY, Lora(r=4, dropout=0.5))
    tiny_base.save_adapter(Role.POLICY, tmp_path / "a")
    base = load(tiny_base.spec)
    base.load_adapter(Role.POLICY, str(tmp_path / "a"), trainable=True)
    rates = lambda: {module.p for module in base.model.modules() if isinstance(module, nn.Dropout)}  # noqa: E731
    assert 0.5 in rates()
    prepare(base, 0)
    assert rates() == {0.0}


# --- the numbers -----------------------------------------------------------------------------------------------------


def plain_update(trainer: PPOTrainer, rollout) -> dict[str, torch.Tensor]:
    """The gradients of the first mini-batch from the formulas: each answer alone, full logits, one loss."""
    base, settings = trainer.base, trainer.settings
    numbers = [n for micro in trainer._mini_batches(rollout.rows, epoch=0)[0] for n in micro]
    rows = [n * rollout.each + k for n in numbers for k in range(rollout.each)]
    tokens = sum(int(rollout.mask[row].sum()) for row in rows)
    total = torch.zeros(())
    for n in numbers:
        for k, ids in enumerate(rollout.rows[n].tokens.answers):
            at = n * rollout.each + k, slice(0, len(ids))
            old, adv, old_values, returns = (
                getattr(rollout, x)[at] for x in ("old", "advantages", "values", "returns")
            )
            start = len(rollout.rows[n].tokens.prompt_ids) - 1
            sequence = torch.tensor([rollout.rows[n].tokens.prompt_ids + ids])
            with base.acting_as(Role.POLICY) as lm:
                logps = lm(sequence).logits[0, start:-1].log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
                ratio = (logps - old).exp()
                total = total - torch.min(ratio * adv, ratio.clamp(0.8, 1.2) * adv).sum() / tokens
            with base.acting_as(Role.VALUE) as lm:
                values = base.values(lm.base_model(sequence).last_hidden_state[0, start:-1])
                held = old_values + (values - old_values).clamp(-0.2, 0.2)
                error = torch.max((values - returns) ** 2, (held - returns) ** 2)
                total = total + settings.value_coefficient * 0.5 * error.sum() / tokens
    return dict(zip(trainer.weights, torch.autograd.grad(total, list(trainer.weights.values())), strict=True))


def test_gradients_of_policy_and_value_model_are_those_of_the_formulas(trainer_of):
    trainer = trainer_of(value="adapter")
    trainer.iterate()  # so that the policy has left its reference and ratios are not 1 below
    rollout = trainer.collect(trainer._drawn(), 2, seed=7)
    trainer.score(rollout)
    trainer.advantages(rollout)
    scramble(trainer.base, scale=0.02)
    expected = plain_update(trainer, rollout)
    with trainer.base.reading_pairs():
        found = trainer._gradients(rollout, trainer._mini_batches(rollout.rows, epoch=0)[0])
    assert found["clipped"] > 0
    for name, weight in trainer.weights.items():
        assert torch.allclose(weight.grad, expected[name], atol=1e-5 * expected[name].abs().max().item() + 1e-8), name
        assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("value", ["trunk", "adapter"])
def test_micro_batches_padding_and_checkpointing_change_no_number(value, trainer_of, monkeypatch):
    curves = []
    for micro, layers, padded in (
        (MicroBatchLimit(pairs=1), 0, False), (MicroBatchLimit(pairs=4), 0, False), (MicroBatchLimit(tokens=40), 2, False),
        (MicroBatchLimit(pairs=2), 0, True),
    ):  # fmt: skip
        trainer = trainer_of(micro=micro, value=value, layers=layers)
        if padded:
            trainer.base.__dict__["why_padded"] = "to see whether it matters"
        curves.append([trainer.iterate()[1] for _ in range(2)])
    for other in curves[1:]:
        for steps in (curves[0], other):  # a ratio that rounding takes across the bound is a token more or less
            shares = [
                step.pop(name) for step in steps for name in ("policy/clipfrac_avg", "val/clipfrac_avg") if name in step
            ]
            assert all(0 <= share < 1 for share in shares)
        assert_alike(curves[0], other, 2e-4)


def test_each_pass_sees_every_answer_once_in_another_order(trainer_of):
    trainer = trainer_of(update_epochs=3, mini_batches=2)
    rollout = trainer.collect(trainer._drawn(), 2, seed=1)
    passes = list(trainer._schedule(rollout.rows))
    orders = [[n for mini in passes[2 * e : 2 * e + 2] for micro in mini for n in micro] for e in range(3)]
    assert [sorted(order) for order in orders] == [[0, 1, 2, 3]] * 3
    assert len({tuple(order) for order in orders}) > 1


def test_every_prompt_is_answered_before_any_comes_again(trainer_of):
    trainer = trainer_of(batch_size=4)
    drawn = []
    for trainer.done in range(4):
        drawn.append([prompt.where for prompt, _ in trainer._drawn()])
    assert sorted(drawn[0] + drawn[1]) == sorted(drawn[2] + drawn[3]) == [f"rows.jsonl:{n}" for n in range(1, 5)]


def test_rewards_are_normalised_clipped_and_charged_for_kl_and_for_no_end(trainer_of):
    trainer = trainer_of(reward_clip=1.0, missing_eos_penalty=0.25, gae_lambda=1.0)
    rollout = trainer.collect(trainer._drawn(), 2, seed=1)
    assert rollout.ended.any()
    assert not rollout.ended.all()
    rollout.reference = rollout.old - 0.5 * rollout.mask
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
    rollout = trainer.collect(trainer._drawn(), 2, seed=1)
    trainer.score(rollout)
    scores = rollout.scores
    trainer.advantages(rollout)
    normal = (scores - scores.mean()) / scores.std(correction=0) - 0.25 * ~rollout.ended
    pairs = normal.view(4, 2)
    expected = (pairs - pairs.mean(dim=1, keepdim=True)).flatten()
    assert rollout.returns[:, 0].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("weight", [1.0, -0.5])
@pytest.mark.parametrize("scaling", ["running", "prompt", "none"])
def test_a_value_model_copied_from_the_reward_model_begins_in_the_units_of_its_returns(
    scaling, weight, trainer_of, reward_run
):
    """Else every answer's last token would be blamed or praised for the reward model's level, whatever the score."""
    trainer = trainer_of(value="adapter", reward_scaling=scaling, missing_eos_penalty=0.0, kl_coefficient=0.0)
    recipe = Recipe(model=trainer.base.spec, output="unused", ppo=trainer.settings)
    scorer = AdapterScorer("ppo.reward", reward_run.adapter, weight, recipe)
    scorer.attach(trainer.base, Role.REWARD, MicroBatchLimit(pairs=1))
    trainer.scorers = [scorer]
    trainer.base._heads[Role.VALUE].register_forward_hook(lambda module, given, said: said + 40)  # a level of its own
    rollout = trainer.collect(trainer._drawn(), 2, seed=1)
    raw = rollout.values.clone()
    assert raw[rollout.mask].mean() > 30
    trainer.score(rollout)
    trainer.advantages(rollout)
    scores = rollout.scores  # less their mean, in their deviation, less their prompt's mean
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
    trainer = trainer_of(value="adapter", missing_eos_penalty=0.0)
    recipe = Recipe(model=trainer.base.spec, output="unused", ppo=trainer.settings)
    scorer = AdapterScorer("ppo.reward", reward_run.adapter, 1.0, recipe)
    scorer.attach(trainer.base, Role.REWARD, MicroBatchLimit(pairs=1))
    rollout = trainer.collect(trainer._drawn(), 2, seed=1)
    trainer.scorers = [scorer]
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


def test_updates_stop_once_the_policy_is_too_far_and_that_step_is_not_taken(trainer_of):
    free, held = trainer_of(update_epochs=4), trainer_of(update_epochs=4, kl_stop=1e-4)
    assert free.iterate()[1]["optimizer_steps"] == 8
    after_one = trainer_of(update_epochs=1, mini_batches=1)
    _, found = held.iterate()
    assert 1 <= found["optimizer_steps"] < 8
    assert after_one.iterate()[1]["optimizer_steps"] == 1


def test_the_kl_coefficient_adapts_to_its_target(trainer_of):
    trainer = trainer_of(kl_target=1e-6)
    trainer.iterate()
    assert trainer.kl_coefficient == pytest.approx(0.05 * 0.98), "KL was 0"
    for _ in range(2):
        rollout, _ = trainer.iterate()
    assert rollout.kl.mean() > 1e-5
    assert trainer.kl_coefficient > 0.05 * 0.98


def test_it_makes_the_rewarded_more_likely_and_flipping_the_sign_the_less(trainer_of):

    def gain() -> float:
        trainer = trainer_of(
            micro=MicroBatchLimit(pairs=4),
            batch_size=64,
            samples_per_prompt=16,
            kl_coefficient=0.0,
            missing_eos_penalty=0.0,
        )
        first, *_, beforelast, last = (trainer.iterate()[1]["objective/scores"] for _ in range(9))
        return (beforelast + last) / 2 - first

    assert gain() > 0.08  # 0.17 here
    plain = losses.clipped_policy_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "clipped_policy_loss", lambda new, old, adv, clip: plain(new, old, -adv, clip))
        assert gain() < -0.15  # -0.29 here


# --- one base --------------------------------------------------------------------------------------------------------


def heap_storages() -> dict[int, tuple]:
    """Every tensor alive, by the address of its content."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.device.type == "cpu"]
    tensors = [t for t in tensors if not isinstance(t, FakeTensor)]  # what other tests left has no content
    return {t.untyped_storage().data_ptr(): (t.untyped_storage().nbytes(), tuple(t.shape)) for t in tensors}


def test_one_copy_of_every_base_weight_with_all_roles_at_work(trainer_of, reward_run):
    before = set(heap_storages())
    trainer = trainer_of(value="adapter")
    trainer.base.load_adapter(Role.REWARD, str(reward_run.adapter), trainable=False)
    trainer.base.load_reference(str(save_policy(trainer, reward_run.path / "copy")))
    trainer.done = 1
    trainer.iterate()
    weights = {
        name: p for name, p in trainer.base.model.named_parameters() if not any(f".{role}." in name for role in Role)
    }
    alive = {address: held for address, held in heap_storages().items() if address not in before}
    for name, weight in weights.items():
        size = weight.untyped_storage().nbytes()
        if size < 2000:  # norms' weights are as small as much else
            continue
        copies = [held for held in alive.values() if held == (size, tuple(weight.shape))]
        twins = sum(other.shape == weight.shape for other in weights.values())
        assert len(copies) == twins, f"{name}: {len(copies)} tensors of its size, {twins} weights"


def save_policy(trainer: PPOTrainer, folder: Path) -> Path:
    trainer.base.save_adapter(Role.POLICY, folder)
    return folder


def test_bytes_by_role_to_the_number(trainer_of, reward_run):
    trainer = trainer_of(value="adapter")
    trainer.base.load_adapter(Role.REWARD, str(reward_run.adapter), trainable=False)
    trainer.done = 1
    trainer.iterate()
    found = bytes_by_role(trainer.base, trainer.optimizer)
    policy = sum(w.numel() for w in trainer.base.trained_weights(Role.POLICY).values())
    assert found[Role.POLICY] == {
        "weights": 4 * policy,
        "gradients": 4 * policy,
        "optimiser": found[Role.POLICY]["optimiser"],
    }
    assert found[Role.POLICY]["optimiser"] == pytest.approx(8 * policy, rel=0.01)
    assert found[Role.REWARD] == {"weights": 4 * (policy + 64), "gradients": 0, "optimiser": 0}
    assert found[Role.VALUE]["weights"] == 4 * (policy + 64)
    embeddings = 2 * 2006 * 64 * 4
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # weights in 4 bits
    assert embeddings + linear / 2 < found[Role.BASE]["weights"] < embeddings + linear / 2 + 20_000  # scales, norms
    assert all(weight.grad is None for weight in trainer.weights.values()), "gradients live in updates only"


def test_at_mistrals_shape_four_roles_take_little_more_than_one():
    """On tensors without content: the 4-bit base with the weights of policy, reference, reward model and value model,
    beside the 4-bit base with one adapter."""
    config = AutoConfig.from_pretrained(FIXTURES / "configs" / "Mistral-7B-v0.3")
    spec = {"base": "unused", "compute_dtype": "bfloat16"}
    recipe = Recipe.model_validate({"model": spec, "output": "unused", "ppo": {"data": "a", "reward": "a.py:f"}})
    held = Forecast(recipe, "ppo", config, "cuda", torch.bfloat16).fixed["base"]
    assert 4.1e9 < held < 4.2e9
    with torch.device("meta"):
        base = Base(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), None, None, "", recipe.model)
        for role in (Role.POLICY, Role.REFERENCE, Role.REWARD, Role.VALUE):
            base.add_adapter(role, Lora(r=16))
        for role in (Role.REWARD, Role.VALUE):
            base.add_head(role)
    sizes = [sum(weight.nbytes for weight in base.trained_weights(role).values()) for role in base.adapters]
    assert sizes[:2] == [4 * 41_943_040] * 2
    assert (held + sum(sizes)) / (held + sizes[0]) < 1.15


def test_training_changes_policy_and_value_model_and_nothing_else(trainer_of):
    trainer = trainer_of(value="adapter")
    unchanged = lambda: [  # noqa: E731
        (name, tensor.clone()) for name, tensor in trainer.base.model.state_dict().items()
        if ".policy." not in name and ".value." not in name
    ]  # fmt: skip
    before, start = unchanged(), {name: weight.clone() for name, weight in trainer.weights.items()}
    trainer.iterate()
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(before, unchanged(), strict=True))
    moved = {name.partition("/")[0] for name, weight in trainer.weights.items() if not torch.equal(weight, start[name])}
    assert moved == {"policy", "value"}
    assert digest(trainer.base)


# --- the run ---------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(recipe_of, held_out, reward_run, sft_run, rewards, capsys, tmp_path):
    judge = f"{rewards}:shrinking"
    path = recipe_of(
        reward=str(reward_run.path), judge=judge, start_from=str(sft_run.adapter), eval_data=held_out, eval_every=2,
        value="adapter",
    )  # fmt: skip
    run = run_stage(path)
    summary = json.loads(run.summary.read_text())
    assert summary["steps"] == 3
    assert set(summary["bytes_by_role"]) == {"base", "policy", "reference", "reward", "value"}
    assert set(summary["share_by_part"]) == {"rollout", "scoring", "update"}
    assert 0.8 < sum(summary["share_by_part"].values()) <= 1.01
    assert all(speed > 0 for speed in summary["tokens_per_second_by_part"].values())
    assert summary["reference"] == f"the base with a frozen copy of the adapter {sft_run.adapter}"
    steps = [line for line in metrics(run) if "loss" in line]
    looks = [line for line in metrics(run) if "eval_proxy" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert [line["step"] for line in looks] == [0, 2, 3]
    assert steps[0]["objective/kl"] == 0
    assert (run.path / "ppo_report.png").read_bytes()[:4] == b"\x89PNG"
    best = max(looks, key=lambda line: line["eval_judge"])
    assert summary["held_out"]["best"]["step"] == best["step"]
    samples = [json.loads(line) for line in (run.path / "samples" / "step-3.jsonl").read_text().splitlines()]
    assert len(samples) == 6
    assert sum(row["reward"] for row in samples) / 6 == pytest.approx(looks[-1]["eval_proxy"], abs=1e-5)
    out = capsys.readouterr().out
    assert "judge          shrinking" in out
    assert "rollout" in out
    assert not (run.checkpoints / "checkpoint-1").exists(), "two are kept"

    from peft import AutoPeftModelForCausalLM

    for folder in (run.adapter, run.path / "adapter_best"):
        assert AutoPeftModelForCausalLM.from_pretrained(folder)
    assert json.loads((run.adapter / "lineage.json").read_text())["parent"] == str(sft_run.adapter)


def test_the_best_by_the_judge_is_kept_not_the_last(recipe_of, held_out, rewards):
    """The judge likes what PPO unlearns, so the best is the policy before training."""
    run = run_stage(
        recipe_of(
            reward=f"{rewards}:many",
            judge=f"{rewards}:flat",
            eval_data=held_out,
            eval_every=1,
            max_steps=2,
            learning_rate=5e-2,
        )
    )
    weights = load_file(run.path / "adapter_best" / "adapter_model.safetensors")
    assert not any(tensor.any() for name, tensor in weights.items() if "lora_B" in name), "earliest of equals"
    assert any(t.any() for n, t in load_file(run.adapter / "adapter_model.safetensors").items() if "lora_B" in n)


@pytest.mark.parametrize("value", ["trunk", "adapter"])
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(value, recipe_of, held_out, reward_run, rewards):
    keys = {
        "eval_data": held_out, "eval_every": 2, "max_steps": 4, "value": value, "kl_target": 0.5, "save_every": 1,
        "judge": f"{rewards}:shrinking", "reward": str(reward_run.path), "scheduler": "linear",
    }  # fmt: skip
    whole = run_stage(recipe_of("whole", **keys))
    for stop in (0, 1, 3):
        path = recipe_of("cut", **keys)
        shutil.rmtree(Path(path).parent / "ppo", ignore_errors=True)
        original = PPOTrainer.iterate

        def dies(self, stop=stop, original=original):
            if self.done == stop:
                raise KeyboardInterrupt
            return original(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PPOTrainer, "iterate", dies)
            with pytest.raises(KeyboardInterrupt):
                run_stage(path)
        resumed = run_stage(path, resume=True)
        assert_alike(lines(whole), lines(resumed))
        for name in ("step-0", "step-4"):
            file = f"samples/{name}.jsonl"
            assert (whole.path / file).read_text() == (resumed.path / file).read_text()


def started(path: str, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "qalign.ppo", path, *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(file: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while not file.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    assert file.exists(), process.communicate()[0]


def test_killed_in_the_middle_it_resumes_to_the_same_numbers(recipe_of):
    keys = {"max_steps": 5}
    whole = run_stage(recipe_of("whole", **keys))
    path = recipe_of("killed", **keys)
    folder = Path(path).parent / "ppo" / "checkpoints"
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        process = started(path, *(["--resume"] if checkpoint == "checkpoint-4" else []))
        wait_for(folder / checkpoint, process)  # perhaps half written
        process.kill()
        process.communicate()
    (folder / "checkpoint-99").mkdir()  # what a kill may leave
    run = run_stage(path, resume=True)
    assert_alike(lines(whole), lines(run))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop_it_writes_a_checkpoint_and_says_how_to_go_on(number, code, recipe_of):
    path = recipe_of(max_steps=500, save_every=400)
    process = started(path)
    wait_for(Path(path).parent / "ppo" / "checkpoints" / "checkpoint-0" / "whole", process)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == code, output
    assert "Traceback" not in output
    assert f"go on with: python -m qalign.ppo {path} --resume" in output


# --- hacking ---------------------------------------------------------------------------------------------------------


def planted(recipe_of, held_out, rewards, reward: str, judge: str, **keys):
    held_out = [held_out[0] | {"limit": 24}]
    return run_stage(
        recipe_of(
            reward=f"{rewards}:{reward}",
            judge=f"{rewards}:{judge}",
            eval_data=held_out,
            eval_every=1,
            max_steps=10,
            batch_size=32,
            samples_per_prompt=8,
            micro_batch_size=8,
            max_new_tokens=40,
            patience=2,
            learning_rate=2e-2,
            kl_coefficient=0.0,
            missing_eos_penalty=0.0,
            limit=4,
            **keys,
        )
    )


@pytest.fixture
def ending(monkeypatch, tiny_folder) -> None:
    """Answers of the tiny model that end: a tenth of all tokens ends them, which one direction of the hidden states
    makes less likely."""
    head = load_file(Path(tiny_folder) / "model.safetensors")["lm_head.weight"]
    ends = tuple(head[:, 1].topk(len(head) // 10).indices.tolist())
    monkeypatch.setattr("qalign.model.generation.end_ids", lambda *_: ends)


def test_the_alarm_rings_when_longer_is_better_and_the_judge_disagrees(recipe_of, held_out, rewards, ending, capsys):
    run = planted(recipe_of, held_out, rewards, "long", "shrinking", on_alarm="stop")
    summary = json.loads(run.summary.read_text())
    assert summary["alarm_steps"]
    assert summary["stopped_by_alarm"]
    assert summary["steps"] < 10
    assert summary["held_out"]["best"]["step"] < summary["alarm_steps"][0]
    assert summary["held_out"]["best"]["judge"] >= summary["held_out"]["first"]["judge"]
    shown = "".join(capsys.readouterr())
    assert "warning: iteration" in shown
    assert "ppo.kl_coefficient" in shown
    assert shown.count("(reward ") == 3, "three sample answers"
    assert "stopped here (on_alarm: stop); the best adapter so far is" in shown


def test_a_line_separator_in_an_answer_hides_no_samples(recipe_of, held_out, rewards, ending, capsys, monkeypatch):
    monkeypatch.setattr("qalign.rl.rewards.text_of", lambda *_: "one\u2028two\x85three")
    planted(recipe_of, held_out, rewards, "long", "shrinking", on_alarm="stop")
    assert "".join(capsys.readouterr()).count("(reward ") == 3


def test_killed_after_the_alarm_that_stopped_it_it_does_not_train_on(recipe_of, held_out, rewards, ending):
    run = planted(recipe_of, held_out, rewards, "long", "shrinking", on_alarm="stop")
    summary = json.loads(run.summary.read_text())
    run.summary.unlink()
    again = run_stage(str(Path(run.path).parent / "ppo.yaml"), resume=True)
    after = json.loads(again.summary.read_text())
    assert [after[key] for key in ("steps", "stopped_by_alarm", "alarm_steps", "warnings")] == [
        summary[key] for key in ("steps", "stopped_by_alarm", "alarm_steps", "warnings")
    ]


def test_a_judge_that_fails_costs_nothing_that_was_learned(recipe_of, held_out, rewards):
    keys = {"eval_data": held_out, "eval_every": 1, "judge": f"{rewards}:broken", "save_every": 100, "max_steps": 5}
    path = recipe_of(**keys)
    (line,) = [line for line in refused(path) if line.startswith("ppo.judge")]
    assert f"{rewards}:broken gave nan" in line
    run = RunFolder(load_recipe(path, [], "ppo"), "ppo", path)
    assert (run.checkpoints / "checkpoint-3" / "whole").exists()
    Path(rewards).write_text(Path(rewards).read_text().replace("== 4", "== 400"))
    resumed = run_stage(path, resume=True)
    whole = run_stage(recipe_of("whole", **(keys | {"judge": f"{rewards}:flat"})))
    assert_alike(lines(whole), lines(resumed))


def test_a_clean_reward_rings_no_alarm(recipe_of, held_out, rewards, ending):
    run = planted(recipe_of, held_out, rewards, "many", "many_too", on_alarm="stop")
    summary = json.loads(run.summary.read_text())
    assert summary["alarm_steps"] == []
    assert summary["steps"] == 10
    assert summary["held_out"]["last"]["judge"] > summary["held_out"]["first"]["judge"] + 0.1


def test_the_pace_is_lowered_if_the_recipe_says_so(recipe_of, held_out, rewards, ending, capsys):
    run = planted(recipe_of, held_out, rewards, "long", "shrinking", on_alarm="slow", value="trunk")
    summary = json.loads(run.summary.read_text())
    assert summary["steps"] == 10
    assert summary["kl_coefficient"] == 0.0, "twice nothing is nothing"
    assert "(on_alarm: slow)" in "".join(capsys.readouterr())


def test_many_alarms_slow_it_16_fold_at_most(recipe_of, held_out, monkeypatch):
    monkeypatch.setattr(
        "qalign.reports.alarms.alarms", lambda looks, patience: ["it never ends"] * bool(len(looks) > 1)
    )
    run = run_stage(recipe_of(eval_data=held_out, eval_every=1, max_steps=7, on_alarm="slow", kl_coefficient=0.01))
    found = [line["kl_coefficient"] for line in metrics(run) if "kl_coefficient" in line]
    assert found == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.16, 0.16, 0.16][: len(found)])
    assert len(found) == 7


# --- bad input -------------------------------------------------------------------------------------------------------


def refused(path: str, *overrides: str) -> list[str]:
    """The lines of a run that must end with exit code 2, as its command prints them."""
    command = [sys.executable, "-m", "qalign.ppo", path, *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()


def refusal(path: str, *overrides: str) -> str:
    """What a run is refused with, in this process."""

    def started_here() -> None:
        run = RunFolder(load_recipe(path, list(overrides), "ppo"), "ppo", path)
        run.claim(resume=False, overwrite=False)
        ppo.train(run.recipe, run)

    with pytest.raises(UserError) as found:
        started_here()
    return str(found.value)


def test_what_is_wrong_is_said_before_the_model_loads(recipe_of, write_jsonl, reward_run, tmp_path, monkeypatch):
    path = recipe_of()
    assert refusal(path, "ppo.max_new_tokens=256").endswith(
        "ppo.max_new_tokens: 256 leaves no room for a prompt in model.max_length 256; lower it, or raise "
        "model.max_length"
    )
    monkeypatch.setattr("qalign.model.base.load", lambda *_: pytest.fail("the model was loaded"))
    assert "there is no finished reward run" in refusal(path, "ppo.reward=reward")
    assert refusal(path, "model.max_length=100000").startswith("model.max_length: 100000 is beyond the ")
    other = shutil.copytree(reward_run.adapter, tmp_path / "other")
    kept = json.loads((other / "lineage.json").read_text())
    (other / "lineage.json").write_text(json.dumps(kept | {"base": "org/another-model"}))
    assert "was trained on the base 'org/another-model'" in refusal(path, f"ppo.reward={other}")
    rows = write_jsonl("rows.jsonl", [{"messages": [{"role": "system", "content": "Be brief."}]}])
    found = refusal(path, f"ppo.data={rows}")
    assert found.startswith("ppo.data: 1 of 1 rows were refused")
    assert "no user's turn to answer" in found


def test_a_recipe_without_a_reward_is_refused(recipe_of):
    path = recipe_of()
    recipe = yaml.safe_load(Path(path).read_text())
    del recipe["ppo"]["reward"]
    Path(path).write_text(yaml.safe_dump(recipe))
    (line,) = refused(path)
    assert "'ppo.reward' is missing" in line


def test_a_reward_that_fails_stops_the_run_and_keeps_a_checkpoint(recipe_of, rewards):
    path = recipe_of(reward=f"{rewards}:broken", save_every=100, max_steps=8)
    (line,) = [line for line in refused(path) if line.startswith("ppo.reward")]
    assert f"{rewards}:broken gave nan for an answer to " in line
    assert "house_style_train.jsonl:" in line
    folder = Path(path).parent / "ppo"
    assert (folder / "checkpoints" / "checkpoint-3" / "whole").exists(), "three iterations were fine"
    Path(rewards).write_text(Path(rewards).read_text().replace("== 4", "== 400"))
    run = run_stage(path, resume=True)
    whole = run_stage(recipe_of("whole", reward=f"{rewards}:flat", max_steps=8))
    assert_alike(lines(whole), lines(run))


def test_prompts_that_leave_no_room_are_refused_by_name(recipe_of, write_jsonl):
    rows = [{"prompt": "word " * 300}, {"prompt": "Why?"}]
    with pytest.raises(UserError) as found:
        run_stage(recipe_of(data=write_jsonl("rows.jsonl", rows)))
    assert "rows.jsonl:1: the prompt is " in str(found.value)
    assert "max_length less max_new_tokens leaves 248" in str(found.value)


def test_two_rewards_of_one_name_resume(recipe_of, reward_run, tmp_path):
    places = [str(shutil.copytree(reward_run.adapter, tmp_path / place / "demo" / "adapter")) for place in ("a", "b")]
    weights = load_file(f"{places[1]}/adapter_model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, f"{places[1]}/adapter_model.safetensors")
    path = recipe_of(reward=[{"source": place} for place in places], max_steps=1)
    run = run_stage(path)
    run.summary.unlink()
    assert run_stage(path, resume=True).summary.exists()


def test_a_reward_adapter_that_was_trained_again_stops_a_resumed_run(recipe_of, reward_run, tmp_path):
    folder = shutil.copytree(reward_run.adapter, tmp_path / "again")
    path = recipe_of(reward=str(folder), max_steps=1)
    run = run_stage(path)
    run.summary.unlink()
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"the adapter of again was .* when this run began and is .* now"):
        run_stage(path, resume=True)


# --- how many --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "expected"), [({"max_steps": 7}, 7), ({"epochs": 2.0}, 3), ({"epochs": 0.1}, 1)])
def test_iterations(keys, expected):
    """10 prompts, 2 answers each, 16 answers in an iteration: 8 prompts each."""
    settings = {"data": "a", "reward": "a.py:f", "batch_size": 16, "samples_per_prompt": 2, **keys}
    assert ppo_loop.iterations_of(PPO.model_validate(settings), 10) == expected
    assert math.ceil(10 * 2.0 / 8) == 3


@pytest.mark.true_model
def test_smollm2_holds_its_roles_in_290_megabytes(rewards, tmp_path):
    """Four roles at rank 16 on the true model, in bfloat16: all that lasts from one update to the next."""
    from tests.train.test_sft import SMOLLM2

    base = load(Model(base=SMOLLM2, compute_dtype="bfloat16", max_length=128))
    lora = Lora(r=16)
    base.add_adapter(Role.POLICY, lora)
    base.save_adapter(Role.POLICY, tmp_path / "copy")
    base.load_reference(str(tmp_path / "copy"))
    for role in (Role.REWARD, Role.VALUE):
        base.add_adapter(role, lora)
        base.add_head(role)
    base._trained.discard(Role.REWARD)
    for weight in base.trained_weights(Role.REWARD).values():
        weight.requires_grad_(False)
    settings = PPO.model_validate(
        {"data": "a", "reward": "a.py:f", "batch_size": 2, "samples_per_prompt": 2, "mini_batches": 1,
         "update_epochs": 1, "max_new_tokens": 4}
    )  # fmt: skip
    turn = {"role": "user", "content": "Why?"}
    questions = [(Prompt((turn,), "rows.jsonl:1", {}), encode_prompt(base.tokenizer, [turn], {}))]
    scorer = FunctionScorer("ppo.reward", f"{rewards}:long", 1.0)
    trainer = PPOTrainer(
        base, settings, questions, [scorer], TransformersEngine(), Sampling(4, 1.0, (base.tokenizer.eos_token_id,)),
        MicroBatchLimit(pairs=1), 0, 1, 0,
    )  # fmt: skip
    trainer.iterate()
    found = bytes_by_role(trainer.base, trainer.optimizer)
    assert set(found) == {Role.BASE, Role.POLICY, Role.REFERENCE, Role.REWARD, Role.VALUE}
    lasting = sum(size for parts in found.values() for what, size in parts.items() if what != "gradients")
    assert lasting < 290e6
    assert found[Role.POLICY]["optimiser"] > 2 * 19e6, "Adam's notes are there"
