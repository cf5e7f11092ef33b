"""What PPO and GRPO optimise: from the scores of answers to advantages, and from log-probs to the loss."""

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qalign.config.stages import PPO
from qalign.losses import policy_gradient as losses
from qalign.rl.rollout_batch import RolloutBatch

GROUP_RELATIVE = {"rloo": losses.rloo, "grpo": losses.grpo, "dr_grpo": losses.centred}


def shaped(rollout: RolloutBatch, settings: PPO, moments: losses.Moments) -> tuple[Tensor, losses.Moments]:
    """(Scores `(answers,)` after `reward_scaling` and the missing-EOS penalty; the running moments with them.)"""
    scores = rollout.scores
    if settings.reward_scaling != "none":
        moments = moments.updated(scores)
        scores = losses.normalised(scores, moments, settings.reward_clip)
    scores = _charged(scores, rollout, settings)
    if settings.reward_scaling == "prompt":
        scores = losses.centred(scores, rollout.num_samples)
    return scores, moments


def _charged(scores: Tensor, rollout: RolloutBatch, settings: PPO) -> Tensor:
    return scores - settings.missing_eos_penalty * ~rollout.ended


def informative(rollout: RolloutBatch, settings: PPO) -> list[int]:
    """The numbers of the prompts whose answers don't all score alike."""
    found = losses.tells_apart(_charged(rollout.scores, rollout, settings), rollout.num_samples)
    return found.nonzero()[:, 0].tolist()


def set_advantages(rollout: RolloutBatch, scores: Tensor, settings: PPO, kl_coefficient: float) -> dict[str, float]:
    """Sets the advantages of a rollout from shaped scores, and returns figures about them. With `gae` they come from
    rewards per token and the value model, and are whitened over the whole batch; otherwise all tokens of an answer have
    that of the answer."""
    charged = kl_coefficient if settings.kl == "in_reward" else 0.0
    log_ratios = losses.log_ratio(rollout.old_logps, rollout.reference_logps)
    rewards = losses.token_rewards(scores, log_ratios, rollout.mask, charged)
    total = rewards.sum(dim=1)
    figures = {
        "objective/rlhf_reward": total.mean().item(),
        "objective/non_score_reward": (total - scores).mean().item(),
        "kl_coefficient": kl_coefficient,
    }
    if settings.advantage != "gae":
        of_answers = GROUP_RELATIVE[settings.advantage](total, rollout.num_samples)
        rollout.advantages = of_answers[:, None] * rollout.mask
        alike = ~losses.tells_apart(scores, rollout.num_samples)
        left_out = {"dynamic_sampling/left_out": len(rollout.rows) - len(rollout.used)}
        return (
            figures
            | {"frac_reward_zero_std": alike.float().mean().item()}
            | (left_out if settings.dynamic_sampling else {})
        )
    raw = losses.gae(rewards, rollout.values, rollout.mask, settings.gamma, settings.gae_lambda)
    rollout.returns = (raw + rollout.values) * rollout.mask
    rollout.advantages = losses.whiten(raw, rollout.mask)
    returns, values = rollout.returns[rollout.mask], rollout.values[rollout.mask]
    explained = 1 - ((returns - values).var(correction=0) / (returns.var(correction=0) + 1e-8)).item()
    return figures | {"val/explained": explained}


def value_units(rollout: RolloutBatch, scores: Tensor, weight: float) -> tuple[float, float]:
    """(shift, factor) that give the first values the mean and the standard deviation of the scores that they predict;
    `weight` is that of the reward model which the value model is a copy of.

    The copy starts in the reward model's units, and before an answer's last token a reward model's level means nothing.
    An offset would remain on the advantage of every last token, whatever the score: the policy would learn to end at
    once, or never.
    """
    values = rollout.values[rollout.mask]
    score_std, value_std = scores.std(correction=0).item(), values.std(correction=0).item()
    known = min(score_std, value_std) > 1e-3  # scores that are all alike don't tell a unit
    factor = math.copysign(score_std / value_std if known else 1.0, weight)
    return values.mean().item() - scores.mean().item() / factor, factor


# --- losses ----------------------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """What the values of tokens are multiplied by before they are summed."""

    loss: Tensor  # as `loss_average` says
    mean: Tensor  # for the mean over all tokens of a mini-batch
    policy: Tensor  # `loss` times the correction for the engine that sampled


class Part(NamedTuple):
    """A micro-batch: values of its answers' tokens, `(tokens,)`."""

    old_logps: Tensor
    reference_logps: Tensor
    advantages: Tensor
    old_values: Tensor
    returns: Tensor
    weights: Weights
    owners: Tensor  # int64, the number of the answer that each token belongs to
    lengths: Tensor  # `(answers,)`, tokens of each answer


class Figures:
    """Sums over the tokens of a mini-batch, by metric and on the device: reading one would make the host wait.

    Attributes:
        furthest: the largest change of a log-prob in each micro-batch.
    """

    def __init__(self):
        self.sums: dict[str, Any] = defaultdict(float)
        self.furthest: list[Tensor] = []

    def add(self, weights: Tensor, figures: dict[str, Tensor]) -> None:
        for name, values in figures.items():
            self.sums[name] += (values.detach() * weights).sum(dtype=torch.float64)


def on_host(scalars: dict[str, Tensor]) -> dict[str, float]:
    """Scalars of a device in one copy."""
    return dict(zip(scalars, torch.stack([scalar.double() for scalar in scalars.values()]).tolist(), strict=True))


def over_all(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """The figures of a mini-batch from those of each process: sums, and of `furthest` the largest."""
    names = dict.fromkeys(chain(*parts))
    sums = {name: sum(part.get(name, 0.0) for part in parts) for name in names}
    return sums | {"furthest": max(part["furthest"] for part in parts)}


def weights_of(rollout: RolloutBatch, numbers: list[int], settings: PPO) -> Weights:
    """The weights of the tokens of a mini-batch of prompts, 0 elsewhere: float32 `(answers, tokens)`."""
    mask, where = torch.zeros_like(rollout.mask), rollout.token_indices(numbers)
    mask[where] = True
    of_loss = losses.token_weights(mask, settings.loss_average, settings.max_new_tokens)
    return Weights(of_loss, losses.token_weights(mask, "token", 0), of_loss * rollout.correction)


def policy_loss(settings: PPO, kl_coefficient: float, logps: Tensor, part: Part, figures: Figures) -> Tensor:
    """The policy loss of a micro-batch, and with `kl: in_loss` its KL to the reference; adds their figures. `logps` are
    the policy's, `(tokens,)`."""
    weights = part.weights
    ratios = losses.log_ratios(logps, part.old_logps, part.owners, part.lengths, settings.ratio)
    loss, clipped = losses.clipped_policy_loss(
        ratios, part.advantages, settings.clip, settings.clip_high, settings.ratio_max
    )
    figures.add(weights.policy, {"loss/policy_avg": loss})
    figures.add(weights.mean, {"policy/clipfrac_avg": clipped, "val/ratio": ratios.detach().exp()})
    figures.add(weights.mean, {"policy/approxkl_avg": losses.kl_k3(part.old_logps, logps.detach())})
    figures.furthest.append((logps.detach() - part.old_logps).abs().max())
    if settings.kl == "in_loss":
        kl = losses.kl_loss(logps, part.reference_logps, ratios)
        figures.add(weights.policy, {"loss/kl_avg": kl})
        loss = loss + kl_coefficient * kl
    figures.add(weights.policy, {"loss": loss})
    return (loss * weights.policy).sum()


def value_loss(settings: PPO, values: Tensor, part: Part, figures: Figures) -> Tensor:
    """The value loss of a micro-batch with its coefficient; adds its figures."""
    loss, clipped = losses.clipped_value_loss(values, part.old_values, part.returns, settings.value_clip)
    figures.add(part.weights.loss, {"loss/value_avg": loss})
    figures.add(part.weights.mean, {"val/clipfrac_avg": clipped})
    loss = settings.value_coefficient * loss
    figures.add(part.weights.loss, {"loss": loss})
    return (loss * part.weights.loss).sum()
