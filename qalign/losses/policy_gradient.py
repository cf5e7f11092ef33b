"""The maths of PPO, GRPO and RLOO: pure functions of tensors.

They take float32 `(answers, tokens)`, with a `mask` that is True on the tokens of an answer, which come first in their
row; functions of single tokens take any shape.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def log_ratio(policy: Tensor, reference: Tensor) -> Tensor:
    """k1 (Schulman 2020, "Approximating KL Divergence"): log pi - log pi_ref of each sampled token, an unbiased
    estimate of KL(pi || pi_ref). PPO's KL penalty uses it (Ziegler et al. 2019, arXiv:1909.08593, eq. 2)."""
    return policy - reference


def kl_k3(policy: Tensor, reference: Tensor) -> Tensor:
    """k3 (same source): r - 1 - log r with r = pi_ref / pi. Also unbiased, never negative, with less variance."""
    back = reference - policy
    return torch.expm1(back) - back


def kl_loss(policy: Tensor, reference: Tensor, log_ratio: Tensor) -> Tensor:
    """k3 as a loss, times the ratio pi / pi_old (DeepSeek-V3.2, arXiv:2512.02556; TRL's default): so its gradient is
    that of KL(pi || pi_ref), on samples of pi_old too. k3 alone, as in GRPO's eq. 4, has the same value at ratio 1
    and the gradient of another divergence."""
    return torch.exp(log_ratio) * kl_k3(policy, reference)


def token_rewards(scores: Tensor, log_ratios: Tensor, mask: Tensor, kl_coefficient: float) -> Tensor:
    """Rewards per token: -beta (log pi - log pi_ref), plus the score `(answers,)` at the last token (Ouyang et al.
    2022, arXiv:2203.02155, eq. 2)."""
    rewards = -kl_coefficient * log_ratios * mask
    last = mask.sum(dim=1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16): A_t = delta_t + gamma lambda
    A_{t+1} with delta_t = r_t + gamma V_{t+1} - V_t; everything after an answer's end is 0, and so is the padding."""
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(values)
    after = value_after = values.new_zeros(len(values))
    for token in reversed(range(values.shape[1])):
        delta = rewards[:, token] + gamma * value_after - values[:, token]
        after = (delta + gamma * lam * after) * mask[:, token]
        advantages[:, token], value_after = after, values[:, token]
    return advantages


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Whitening to mean 0 and variance 1 over all tokens of the batch; 0 outside the mask (Huang et al. 2023, "The N
    Implementation Details of RLHF with PPO")."""
    count = mask.sum()
    centred = (values - (values * mask).sum() / count) * mask
    return centred * torch.rsqrt((centred**2).sum() / count + 1e-8)


def rloo(scores: Tensor, num_samples: int) -> Tensor:
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740): each score `(answers,)` minus the mean
    of the other answers to its prompt, whose `num_samples` >= 2 answers are adjacent."""
    return centred(scores, num_samples) * (num_samples / (num_samples - 1))


def grpo(scores: Tensor, num_samples: int) -> Tensor:
    """Group-relative advantages (Shao et al. 2024, arXiv:2402.03300, section 4.1.2): each score `(answers,)` in
    standard deviations from the mean of its prompt's answers. The variance divides by n - 1, and 1e-4 is added to its
    root, as in TRL. Without the division it is Dr. GRPO's (Liu et al. 2025, arXiv:2503.20783), which is `centred`."""
    std = scores.view(-1, num_samples).std(dim=1, keepdim=True)
    return (centred(scores, num_samples).view(-1, num_samples) / (std + 1e-4)).flatten()


def tells_apart(scores: Tensor, num_samples: int) -> Tensor:
    """Whether the answers to each prompt have different scores: bool `(prompts,)`. Where they have not, group-relative
    advantages are 0 (DAPO: Yu et al. 2025, arXiv:2503.14476, eq. 11)."""
    groups = scores.view(-1, num_samples)
    return groups.amax(dim=1) - groups.amin(dim=1) > 1e-8


def log_ratios(policy: Tensor, old: Tensor, owners: Tensor, lengths: Tensor, kind: str) -> Tensor:
    """log of the probability ratio that each token's loss has, `(tokens,)`.

    Args:
        owners: int64 `(tokens,)`, the number of the answer that each token belongs to.
        lengths: `(answers,)`, tokens of each answer.
        kind: `token` for pi / pi_old of each token; `sequence` for the geometric mean over its answer (GSPO: Zheng et
            al. 2025, arXiv:2507.18071); `product` for that of the whole answer (RLOO).
    """
    change = policy - old
    if kind == "token":
        return change
    sums = change.new_zeros(len(lengths)).index_add(0, owners, change)
    return (sums / lengths if kind == "sequence" else sums)[owners]


def truncated_ratio(policy: Tensor, sampler: Tensor, cap: float) -> Tensor:
    """Truncated importance sampling: min(pi / mu, cap) for each token, where mu is the model as another engine ran it
    when it sampled (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training",
    https://fengyao.notion.site/off-policy-rl). Times the policy loss, it makes an expectation over mu's tokens one over
    pi's; the cap bounds the variance and costs a bias where it is reached."""
    return torch.exp(policy - sampler).clamp(max=cap)


def token_weights(mask: Tensor, average: str, longest: int) -> Tensor:
    """What the loss of each token is multiplied by before all are summed, 0 outside the `mask` of a mini-batch.

    Args:
        average: `token` for the mean over all tokens (PPO; DAPO eq. 8); `answer` for the mean over answers of the mean
            over an answer's tokens (GRPO eq. 3); `constant` for the sum divided by answers x `longest` (Dr. GRPO).
    """
    lengths = mask.sum(dim=1, keepdim=True)
    answers = int((lengths > 0).sum())
    if average == "token":
        return mask / mask.sum()
    return mask / (answers * (lengths.clamp(min=1) if average == "answer" else longest))


def clipped_policy_loss(
    log_ratio: Tensor, advantages: Tensor, clip: float, clip_high: float | None = None, ratio_max: float | None = None
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate objective as a loss (Schulman et al. 2017, arXiv:1707.06347, eq. 7): -min(r A, clip(r) A)
    per token, with r = pi / pi_old within [1 - clip, 1 + clip_high] (DAPO eq. 8; `clip` if left out). Where A is
    negative, r counts up to `ratio_max` (two-sided clipping: INTELLECT-2, arXiv:2505.07291). Returns (the loss, a bool
    tensor that is True where the ratio was clipped)."""
    ratio = torch.exp(log_ratio)
    bounded = -ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high)) * advantages
    free = -(ratio if ratio_max is None else ratio.clamp(max=ratio_max)) * advantages
    return torch.maximum(free, bounded), bounded > free


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Clipped value loss (Huang et al. 2022, "The 37 Implementation Details of PPO", detail 9): per token, half the
    squared error of the value, or of the value clipped to [old - clip, old + clip], whichever is larger. Returns (the
    loss, a bool tensor that is True where the clipped value was used)."""
    bounded = old + (values - old).clamp(-clip, clip)
    free_error, bounded_error = (values - returns) ** 2, (bounded - returns) ** 2
    return 0.5 * torch.maximum(free_error, bounded_error), bounded_error > free_error


@dataclass(frozen=True)
class Moments:
    """Running mean and variance of scores."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared distances from the mean."""

    def updated(self, scores: Tensor) -> "Moments":
        """The moments after more scores `(answers,)` (Chan et al. 1983): exact in any order and in any batches."""
        scores = scores.double()
        count, mean = len(scores), scores.mean().item()
        total, gap = self.count + count, mean - self.mean
        squares = self.squares + ((scores - mean) ** 2).sum().item() + gap**2 * self.count * count / total
        return Moments(total, self.mean + gap * count / total, squares)

    @property
    def std(self) -> float:
        return (self.squares / self.count) ** 0.5 if self.count else 0.0


def normalised(scores: Tensor, moments: Moments, clip: float) -> Tensor:
    """Scores in standard deviations from the running mean, clipped to [-clip, clip] (Zheng et al. 2023, "Secrets of
    RLHF", arXiv:2307.04964, eq. 17)."""
    return ((scores - moments.mean) / (moments.std + 1e-8)).clamp(-clip, clip)


def centred(scores: Tensor, num_samples: int) -> Tensor:
    """Scores `(answers,)` minus the mean score of their prompt, whose `num_samples` answers are adjacent: the
    baseline of GRPO (Shao et al. 2024, arXiv:2402.03300, eq. 3) without the division by the standard deviation."""
    groups = scores.view(-1, num_samples)
    return (groups - groups.mean(dim=1, keepdim=True)).flatten()


def adapted_kl_coefficient(coefficient: float, kl: float, target: float) -> float:
    """The next KL coefficient (Ziegler et al. 2019, arXiv:1909.08593, eq. 3, K = 0.1): it changes by 2% at most."""
    error = max(-0.2, min(0.2, kl / target - 1))
    return coefficient * (1 + 0.1 * error)
