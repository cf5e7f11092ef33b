"""GRPO, Dr. GRPO, RLOO, GSPO and DAPO: each function by hand, and losses, gradients and advantages equal TRL's own."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from qalign.config.stages import GRPO, PPO
from qalign.losses import policy_gradient as losses
from qalign.rl.objective import GROUP_RELATIVE, Figures, Part, Weights, policy_loss

LENGTHS = [3, 1, 4, 2, 4, 2, 1, 3]  # tokens of the answers to two prompts
MASK = torch.arange(4)[None] < torch.tensor(LENGTHS)[:, None]
NEW_TOKENS = 5  # the most that an answer may have
SCORES = torch.tensor([1.0, 0.0, 0.0, 3.0, 2.0, 2.0, 2.5, 2.0])


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    """Scores 1, 2, 6: the means of the others are 4, 3.5, 1.5, that of all is 3, and the variance (4 + 1 + 9) / 2."""
    scores = tensor(1, 2, 6, 5, 5, 5)
    assert losses.rloo(scores, 3).tolist() == pytest.approx([-3, -1.5, 4.5, 0, 0, 0])
    assert losses.centred(scores, 3).tolist() == [-2, -1, 3, 0, 0, 0]
    std = math.sqrt(7) + 1e-4
    assert losses.grpo(scores, 3).tolist() == pytest.approx([-2 / std, -1 / std, 3 / std, 0, 0, 0])
    assert losses.tells_apart(scores, 3).tolist() == [True, False]


def test_the_ratio_of_a_token_of_its_answer_and_of_the_whole_answer_by_hand():
    """Log-ratios 0.1, 0.3 and -0.2: the geometric mean of the first two is exp(0.2), their product exp(0.4)."""
    policy, old = tensor(-1.0, -2.0, -3.0), tensor(-1.1, -2.3, -2.8)
    owners, lengths = torch.tensor([0, 0, 1]), torch.tensor([2, 1])
    for kind, expected in {
        "token": (0.1, 0.3, -0.2),
        "sequence": (0.2, 0.2, -0.2),
        "product": (0.4, 0.4, -0.2),
    }.items():
        found = losses.log_ratios(policy, old, owners, lengths, kind)
        assert found.tolist() == pytest.approx(list(expected)), kind


def test_weights_of_tokens_by_hand():
    """Answers of 2 and 1 tokens; a third belongs to another mini-batch."""
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    third, tenth = pytest.approx(1 / 3), pytest.approx(0.1)
    assert losses.token_weights(mask, "token", 9).tolist() == [[third, third], [third, 0], [0, 0]]
    assert losses.token_weights(mask, "answer", 9).tolist() == [[0.25, 0.25], [0.5, 0], [0, 0]]
    assert losses.token_weights(mask, "constant", 5).tolist() == [[tenth, tenth], [tenth, 0], [0, 0]]


@pytest.mark.parametrize(
    ("ratio", "advantage", "bounds", "loss", "clipped"),
    [
        (1.25, 1.0, (0.2, 0.28), -1.25, False),  # beyond 1 + clip, within 1 + clip_high
        (1.5, 1.0, (0.2, 0.28), -1.28, True),
        (0.7, -1.0, (0.2, 0.28), 0.8, True),  # the lower bound is 1 - clip
        (0.7, 1.0, (0.2, 0.28), -0.7, False),
        (9.0, -1.0, (0.2, 0.28), 9.0, False),
        (9.0, -1.0, (0.2, 0.28, 4.0), 4.0, False),  # two-sided clipping: no more than ratio_max
        (9.0, 1.0, (0.2, 0.28, 4.0), -1.28, True),
    ],
)
def test_clip_higher_and_two_sided_clipping_by_hand(ratio, advantage, bounds, loss, clipped):
    found, was = losses.clipped_policy_loss(tensor(math.log(ratio)), tensor(advantage), *bounds)
    assert found.item() == pytest.approx(loss)
    assert was.item() is clipped


def test_the_ratio_to_the_sampler_is_truncated_from_above_alone():
    policy, sampler = tensor(0.5, 0.3, 0.1).log(), tensor(0.1, 0.3, 0.2).log()
    assert losses.truncated_ratio(policy, sampler, 2.0).tolist() == pytest.approx([2.0, 1.0, 0.5])


def test_the_gradient_of_the_kl_loss_is_that_of_kl():
    """Its mean under the policy that sampled, over all of three tokens: in logits, p (log p / q - KL)."""
    logits, q = tensor(0.3, -0.2, 0.5).requires_grad_(), tensor(0.3, 0.3, 0.4)
    old = tensor(0.2, 0.5, 0.3)  # that of another policy
    logps = logits.log_softmax(-1)
    found = (old * losses.kl_loss(logps, q.log(), logps - old.log())).sum()
    p = logps.detach().exp()
    kl = (p * (p / q).log()).sum()
    assert found.item() == pytest.approx(kl.item())
    assert torch.autograd.grad(found, logits)[0].tolist() == pytest.approx((p * ((p / q).log() - kl)).tolist())


# --- equal to TRL ----------------------------------------------------------------------------------------------------


class Given:
    """A trainer of TRL whose log-probs and answers are given."""

    given: torch.Tensor

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self.given, torch.zeros_like(self.given), None

    def _generate(self, prompts):
        ids = [[9] * length for length in LENGTHS]
        found = [[5]] * len(ids), ids, ["x"] * len(ids)
        if isinstance(self, RLOOTrainer):
            return found
        return (*found[:2], None, found[2], None, {}, None, None)


class GivenGRPO(Given, GRPOTrainer):
    pass


class GivenRLOO(Given, RLOOTrainer):
    pass


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    """Makes a trainer of TRL on the tiny model, which it never runs."""

    def make(kind: type, **keys):
        config = RLOOConfig if kind is GivenRLOO else GRPOConfig
        args = config(
            output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, report_to="none",
            activation_checkpointing=False,
            num_generations=4, per_device_train_batch_size=8, max_completion_length=NEW_TOKENS, **keys,
        )  # fmt: skip
        trainer = kind(
            model=AutoModelForCausalLM.from_pretrained(tiny_folder),
            reward_funcs=lambda completions, **row: SCORES.tolist(),
            args=args,
            train_dataset=Dataset.from_list([{"prompt": "Why?"}] * 8),
            processing_class=AutoTokenizer.from_pretrained(tiny_folder),
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
        return trainer

    return make


@pytest.fixture
def rollout() -> dict[str, torch.Tensor]:
    """Log-probs of policy, sampler and reference that are far enough apart to be clipped both ways."""
    generator = torch.Generator().manual_seed(1)
    old, change, apart = torch.randn(3, 8, 4, generator=generator)
    return {"old": old - 2, "policy": old - 2 + 0.3 * change, "reference": old - 2 + 0.5 * apart}


def ours(
    settings: PPO, rollout: dict[str, torch.Tensor], advantages: torch.Tensor, correction: float | torch.Tensor = 1
):
    """(The loss as `qalign.rl` computes it from log-probs, its gradient by them, figures.)"""
    policy = rollout["policy"].clone().requires_grad_()
    owners, lengths = MASK.nonzero()[:, 0], MASK.sum(dim=1)
    loss, mean = (losses.token_weights(MASK, kind, NEW_TOKENS) for kind in (settings.loss_average, "token"))
    weights = Weights(loss[MASK], mean[MASK], (loss * correction)[MASK])
    before, none = (rollout["old"][MASK], rollout["reference"][MASK], advantages[owners]), torch.zeros(len(owners))
    figures = Figures()
    part = Part(*before, none, none, weights, owners, lengths)
    loss = policy_loss(settings, settings.kl_coefficient, policy[MASK], part, figures)
    loss.backward()
    return loss.item(), policy.grad, figures.sums


def theirs(trainer: Given, rollout: dict[str, torch.Tensor], advantages: torch.Tensor, **more: torch.Tensor):
    policy = rollout["policy"].clone().requires_grad_()
    trainer.given = policy
    mask, ids = MASK.long(), torch.full((8, 4), 9)
    loss = trainer.compute_loss(trainer.model, {
        "prompt_ids": ids[:, :1], "prompt_mask": torch.ones(8, 1).long(), "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages, "old_per_token_logps": rollout["old"], "ref_per_token_logps": rollout["reference"],
        "old_logps": (rollout["old"] * mask).sum(dim=1), "num_items_in_batch": mask.sum(),
        **more,
    })  # fmt: skip
    loss.backward()
    return loss.item(), policy.grad


def settings_of(advantage: str, **keys) -> GRPO:
    return GRPO(data="a", reward="a.py:f", advantage=advantage, samples_per_prompt=4, **keys)


@pytest.mark.parametrize(
    ("advantage", "keys", "trl"),
    [
        ("grpo", {}, {"loss_type": "grpo", "beta": 0.04}),
        ("grpo", {"kl": "none"}, {"loss_type": "grpo", "beta": 0.0}),
        ("grpo", {"kl_coefficient": 0.5, "clip_high": 0.28}, {"loss_type": "grpo", "beta": 0.5, "epsilon_high": 0.28}),
        ("grpo", {"loss_average": "token"}, {"loss_type": "bnpo", "beta": 0.04}),
        ("grpo", {"loss_average": "token", "clip": 0.1}, {"loss_type": "dapo", "beta": 0.04, "epsilon": 0.1}),
        ("dr_grpo", {}, {"loss_type": "dr_grpo", "beta": 0.04, "scale_rewards": "none"}),
        ("grpo", {"ratio_max": 1.3}, {"loss_type": "grpo", "beta": 0.04, "delta": 1.3}),
        ("grpo", {"ratio": "sequence", "clip": 0.05}, {
            "loss_type": "grpo", "beta": 0.04, "importance_sampling_level": "sequence", "epsilon": 0.05}),
        ("dr_grpo", {"ratio": "sequence"}, {
            "loss_type": "dr_grpo", "beta": 0.04, "importance_sampling_level": "sequence", "scale_rewards": "none"}),
    ],
)  # fmt: skip
def test_losses_gradients_and_advantages_equal_those_of_trls_grpo(advantage, keys, trl, made, rollout):
    trainer, settings = made(GivenGRPO, **trl), settings_of(advantage, **keys)
    advantages = GROUP_RELATIVE[advantage](SCORES, 4)
    trainer.given = rollout["old"]
    scored = trainer._generate_and_score_completions([{"prompt": "Why?"}] * 8)
    torch.testing.assert_close(advantages, scored["advantages"], rtol=1e-5, atol=1e-5)
    loss, gradient, figures = ours(settings, rollout, advantages)
    expected, expected_gradient = theirs(trainer, rollout, advantages)
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    assert figures["policy/clipfrac_avg"].item() > 0
    assert (gradient == 0)[MASK].any() or keys.get("kl") != "none", "some tokens are clipped"


def test_truncated_importance_sampling_equals_trls(made, rollout):
    trainer, settings = made(GivenGRPO, loss_type="grpo", beta=0.0), settings_of("grpo", kl="none")
    trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True  # which it takes from its own engine
    sampler = rollout["old"] + 0.5 * torch.randn(8, 4, generator=torch.Generator().manual_seed(2))
    ratio = losses.truncated_ratio(rollout["old"], sampler, 1.2)
    advantages = losses.grpo(SCORES, 4)
    loss, gradient, _ = ours(settings, rollout, advantages, ratio)
    expected, expected_gradient = theirs(trainer, rollout, advantages, importance_sampling_ratio=ratio)
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(gradient, ours(settings, rollout, advantages)[1], atol=1e-3)


@pytest.mark.parametrize("keys", [{}, {"clip": 0.4, "clip_high": 0.6}])
def test_losses_gradients_and_advantages_equal_those_of_trls_rloo(keys, made, rollout):
    names = {"clip": "epsilon", "clip_high": "epsilon_high"}
    trainer = made(GivenRLOO, beta=0.05, **{names[key]: value for key, value in keys.items()})
    settings = settings_of("rloo", **keys)
    kl = ((rollout["old"] - rollout["reference"]) * MASK).sum(dim=1)
    advantages = losses.rloo(SCORES - 0.05 * kl, 4)
    given = iter([rollout["old"], rollout["reference"]])
    trainer._get_per_token_logps_and_entropies = lambda *args, **more: (next(given), None, None)
    scored = trainer._generate_and_score_completions([{"prompt": "Why?"}] * 8)
    del trainer._get_per_token_logps_and_entropies
    torch.testing.assert_close(advantages, scored["advantages"], rtol=1e-5, atol=1e-5)
    loss, gradient, _ = ours(settings, rollout, advantages)
    expected, expected_gradient = theirs(trainer, rollout, advantages)
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    assert (gradient != 0)[MASK].any()


def test_with_the_sign_of_the_advantages_flipped_they_are_not_equal(made, rollout):
    trainer, advantages = made(GivenGRPO, loss_type="grpo", beta=0.04), losses.grpo(SCORES, 4)
    loss, gradient, _ = ours(settings_of("grpo"), rollout, -advantages)
    expected, expected_gradient = theirs(trainer, rollout, advantages)
    assert loss != pytest.approx(expected, rel=1e-2)
    assert not torch.allclose(gradient, expected_gradient, atol=1e-3)
