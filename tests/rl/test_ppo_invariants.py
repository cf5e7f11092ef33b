"""What must hold exactly in PPO: first ratio 1, first KL 0, gradients by the formulas, no number from the layout."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qalign.config.recipe import Lora
from qalign.data.collate import MicroBatchLimit
from qalign.errors import UserError
from qalign.losses import policy_gradient as losses
from qalign.model.base import Role, load
from qalign.rl import ppo_trainer
from qalign.rl.ppo_setup import make_deterministic
from qalign.rl.ppo_trainer import PPOTrainer
from tests.helpers import base_digest, scramble, slow
from tests.rl.conftest import assert_alike, collected


@pytest.mark.parametrize("value", ["trunk", "adapter"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_before_the_first_update_the_ratio_is_1_and_kl_is_0(dtype, value, temperature, trainer_of):
    trainer = trainer_of(dtype, value=value, temperature=temperature)
    rollout = collected(trainer)
    assert torch.equal(rollout.old_logps, rollout.reference_logps)
    assert not rollout.kl.any()
    with trainer.base.packed_attention():
        trainer.base.model.train()
        found = [trainer._gradients(rollout, mini) for mini in trainer._mini_batches(rollout, epoch=0)]
    assert [part["furthest"].item() for part in found] == [0.0, 0.0]
    assert [part["val/ratio"].item() for part in found] == pytest.approx([1.0, 1.0], abs=1e-6)
    assert not any(part["policy/clipfrac_avg"] for part in found)


def test_old_log_probs_are_those_of_the_distribution_that_was_sampled(trainer_of):
    """Against full logits at the temperature, one answer at a time; values and entropies at the same positions."""
    trainer = trainer_of(temperature=0.6)
    scramble(trainer.base)
    trainer.base._heads[Role.VALUE].weight.data.normal_(0, 0.1)
    rollout = collected(trainer, advantages=False)
    answers = [(row.tokens.prompt_ids, ids) for row in rollout.rows for ids in row.tokens.answers]
    for answer, (prompt, ids) in enumerate(answers):
        sequence, places = torch.tensor([prompt + ids]), slice(len(prompt) - 1, -1)
        with torch.no_grad(), trainer.base.acting_as(Role.POLICY) as lm:
            logps = (lm(sequence).logits[0, places] / 0.6).log_softmax(-1)
            hidden = lm.base_model(sequence).last_hidden_state[0, places]
        assert rollout.mask[answer].tolist() == [token < len(ids) for token in range(rollout.mask.shape[1])]
        expected = {
            "old_logps": logps.gather(1, torch.tensor(ids)[:, None])[:, 0],
            "entropies": -(logps.exp() * logps).sum(-1),
            "values": hidden @ trainer.base._heads[Role.VALUE].weight[0],
        }
        for name, tensor in expected.items():
            assert torch.allclose(getattr(rollout, name)[answer, : len(ids)], tensor, atol=1e-4), name
            assert not getattr(rollout, name)[answer, len(ids) :].any()


def test_a_model_that_cannot_repeat_its_log_probs_is_refused(trainer_of, monkeypatch):
    trainer, plain = trainer_of(), ppo_trainer.state_logps
    trainer.done = 1  # not the first iteration, which compares with the reference
    shaken = lambda lm, states, *more: plain(lm, states + 0.01 * states.requires_grad, *more)  # noqa: E731
    monkeypatch.setattr(ppo_trainer, "state_logps", shaken)
    before = {name: weight.clone() for name, weight in trainer.weights.items()}
    with pytest.raises(UserError, match="can't be repeated"):
        trainer.iterate()
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.weights.items())


def test_a_policy_that_is_not_its_reference_is_refused_at_the_start(trainer_of):
    trainer = trainer_of()
    scramble(trainer.base)
    with pytest.raises(UserError, match=r"nats a token from its reference before the first update"):
        trainer.iterate()


def test_dropout_of_an_adapter_that_was_trained_with_it_is_off(tmp_path, tiny_base):
    tiny_base.add_adapter(Role.POLICY, Lora(r=4, dropout=0.5))
    tiny_base.save_adapter(Role.POLICY, tmp_path / "a")
    base = load(tiny_base.spec)
    base.load_adapter(Role.POLICY, str(tmp_path / "a"), trainable=True)
    rates = lambda: {module.p for module in base.model.modules() if isinstance(module, nn.Dropout)}  # noqa: E731
    assert 0.5 in rates()
    make_deterministic(base, 0)
    assert rates() == {0.0}


def plain_gradients(trainer: PPOTrainer, rollout) -> dict[str, torch.Tensor]:
    """The gradients of the first mini-batch from the formulas: each answer alone, full logits, one loss."""
    base, settings, count = trainer.base, trainer.settings, rollout.num_samples
    numbers = [n for micro in trainer._mini_batches(rollout, epoch=0)[0] for n in micro]
    tokens = sum(int(rollout.mask[n * count + k].sum()) for n in numbers for k in range(count))
    total = torch.zeros(())
    for n in numbers:
        for k, ids in enumerate(rollout.rows[n].tokens.answers):
            at = n * count + k, slice(0, len(ids))
            old, adv, old_values, returns = (
                getattr(rollout, name)[at] for name in ("old_logps", "advantages", "values", "returns")
            )
            start = len(rollout.rows[n].tokens.prompt_ids) - 1
            sequence = torch.tensor([rollout.rows[n].tokens.prompt_ids + ids])
            with base.acting_as(Role.POLICY) as lm:
                logps = lm(sequence).logits[0, start:-1].log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
                ratio = (logps - old).exp()
                total = total - torch.min(ratio * adv, ratio.clamp(0.8, 1.2) * adv).sum() / tokens
            with base.acting_as(Role.VALUE) as lm:
                values = base.head_scores(Role.VALUE, lm.base_model(sequence).last_hidden_state[0, start:-1])
                clipped = old_values + (values - old_values).clamp(-0.2, 0.2)
                error = torch.max((values - returns) ** 2, (clipped - returns) ** 2)
                total = total + settings.value_coefficient * 0.5 * error.sum() / tokens
    return dict(zip(trainer.weights, torch.autograd.grad(total, list(trainer.weights.values())), strict=True))


def test_gradients_of_policy_and_value_model_are_those_of_the_formulas(trainer_of):
    trainer = trainer_of(value="adapter")
    trainer.iterate()  # the policy leaves its reference, so that ratios differ from 1 below
    rollout = collected(trainer, seed=7)
    scramble(trainer.base, scale=0.02)
    expected = plain_gradients(trainer, rollout)
    with trainer.base.packed_attention():
        found = trainer._gradients(rollout, trainer._mini_batches(rollout, epoch=0)[0])
    assert found["policy/clipfrac_avg"] > 0
    for name, weight in trainer.weights.items():
        assert torch.allclose(weight.grad, expected[name], atol=1e-5 * expected[name].abs().max().item() + 1e-8), name
        assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("value", ["trunk", slow("adapter")])
def test_micro_batches_padding_and_checkpointing_change_no_number(value, trainer_of):
    curves = []
    limits = (MicroBatchLimit(pairs=1), MicroBatchLimit(pairs=4), MicroBatchLimit(tokens=40), MicroBatchLimit(pairs=2))
    for limit, layers, padded in zip(limits, (0, 0, 2, 0), (False, False, False, True), strict=True):
        trainer = trainer_of(limit=limit, value=value, layers=layers)
        if padded:
            trainer.base.__dict__["padding_reason"] = "to see whether it matters"
        curves.append([trainer.iterate()[1] for _ in range(2)])
    for other in curves[1:]:
        for steps in (curves[0], other):  # a ratio that rounding takes across the bound is a token more or less
            shares = [
                step.pop(name) for step in steps for name in ("policy/clipfrac_avg", "val/clipfrac_avg") if name in step
            ]
            assert all(0 <= share < 1 for share in shares)
        assert_alike(curves[0], other, 2e-4)


class Waits(TorchDispatchMode):
    """Counts where the host would wait for a device to read a number or to copy a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("value", ["trunk", "adapter"])
def test_the_host_waits_for_the_device_no_more_often_with_more_micro_batches(value, trainer_of, monkeypatch):
    """Figures are read, and tensors of a rollout copied, once for all micro-batches."""
    waits, copies, cpu = [], [], torch.Tensor.cpu
    for pairs in (4, 1):
        trainer = trainer_of(limit=MicroBatchLimit(pairs=pairs), value=value, mini_batches=1)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "cpu", lambda tensor, pairs=pairs: copies.append(pairs) or cpu(tensor))
            rollout = collected(trainer)
        with Waits() as found:
            trainer.update(rollout)
        waits.append(found.count)
    assert (copies.count(4), copies.count(1)) == (4, 4), "values, log-probs of two roles, entropies"
    assert waits[0] == waits[1]


def test_training_changes_policy_and_value_model_and_nothing_else(trainer_of, reward_run):
    trainer = trainer_of(value="adapter")
    trainer.base.load_adapter(Role.REWARD, str(reward_run.adapter), trainable=False)
    frozen = lambda: [base_digest(trainer.base), *(w.sum() for w in trainer.base.trained_weights("reward").values())]  # noqa: E731
    before, start = frozen(), {name: weight.clone() for name, weight in trainer.weights.items()}
    trainer.iterate()
    assert frozen() == before
    moved = {name.partition("/")[0] for name, weight in trainer.weights.items() if not torch.equal(weight, start[name])}
    assert moved == {"policy", "value"}


def test_the_rewarded_becomes_more_likely_and_with_the_sign_flipped_less(trainer_of):
    def gain() -> float:
        keys = {"batch_size": 64, "samples_per_prompt": 16, "kl_coefficient": 0.0, "missing_eos_penalty": 0.0}
        trainer = trainer_of(limit=MicroBatchLimit(pairs=4), **keys)
        first, *_, beforelast, last = (trainer.iterate()[1]["objective/scores"] for _ in range(9))
        return (beforelast + last) / 2 - first

    assert gain() > 0.08  # 0.17 here
    plain = losses.clipped_policy_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "clipped_policy_loss", lambda ratio, adv, *bounds: plain(ratio, -adv, *bounds))
        assert gain() < -0.15  # -0.29 here
