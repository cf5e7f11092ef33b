"""Losses on preference pairs, for policies and for reward models: pure functions of tensors.

They take log-probs in nats, float32 `(pairs, 2)`: column 0 is the chosen answer, column 1 the rejected one, each summed
over the tokens of the completion (end of turn included). `lengths` are these token counts, in the same shape. `policy`
is log pi(y|x), `reference` is log pi_ref(y|x). Every loss returns `(pairs,)`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHOSEN, REJECTED = 0, 1


def margin(log_ratios: Tensor) -> Tensor:
    """Chosen minus rejected: `(pairs, 2)` to `(pairs,)`."""
    return log_ratios[:, CHOSEN] - log_ratios[:, REJECTED]


def sigmoid(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7): -log sigma(beta (log-ratio_w - log-ratio_l))."""
    return -F.logsigmoid(beta * margin(policy - reference))


def ipo(policy: Tensor, reference: Tensor, lengths: Tensor, tau: float) -> Tensor:
    """IPO (Azar et al. 2023, arXiv:2310.12036, eq. 17): (h - 1/(2 tau))^2.

    The log-ratios are means over tokens, as the authors confirmed; with sums, long answers would dominate.
    """
    return (margin((policy - reference) / lengths) - 1 / (2 * tau)) ** 2


def hinge(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """SLiC's hinge (Zhao et al. 2023, arXiv:2305.10425, eq. 1) on DPO's reward: max(0, 1 - beta h)."""
    return torch.relu(1 - beta * margin(policy - reference))


def robust(policy: Tensor, reference: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409, eq. 12): unbiased if labels flip with probability eps."""
    reward = beta * margin(policy - reference)
    eps = label_smoothing
    return (-(1 - eps) * F.logsigmoid(reward) + eps * F.logsigmoid(-reward)) / (1 - 2 * eps)


def sigmoid_norm(policy: Tensor, reference: Tensor, lengths: Tensor, beta: float) -> Tensor:
    """Length-normalised DPO (Lambert et al. 2024, Tulu 3, arXiv:2411.15124, eq. 6): DPO on log-ratios per token."""
    return -F.logsigmoid(beta * margin((policy - reference) / lengths))


def apo_zero(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7): raises the chosen and lowers the rejected one."""
    rewards = beta * (policy - reference)
    return 1 - torch.sigmoid(rewards[:, CHOSEN]) + torch.sigmoid(rewards[:, REJECTED])


def simpo(policy: Tensor, lengths: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO (Meng et al. 2024, arXiv:2405.14734, eq. 6): mean log-probs as reward, a target margin, no reference."""
    return -F.logsigmoid(beta * margin(policy / lengths) - gamma)


def orpo(policy: Tensor, lengths: Tensor, lam: float) -> Tensor:
    """ORPO (Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7): chosen NLL plus lambda times the odds-ratio loss.

    odds(y|x) = P / (1 - P) with P the geometric mean of the token probabilities; no reference.
    """
    mean = policy / lengths
    below_one = mean.clamp(max=-1e-6)  # probability 1 in float32 has infinite odds and no gradient
    log_odds = below_one - torch.log(-torch.expm1(below_one))
    return -mean[:, CHOSEN] - lam * F.logsigmoid(margin(log_odds))


def sft(policy: Tensor, lengths: Tensor) -> Tensor:
    """Mean negative log-likelihood of the chosen answer (Pang et al. 2024, arXiv:2404.19733, eq. 1)."""
    return -(policy / lengths)[:, CHOSEN]


def preference_loss(
    name: str,
    policy: Tensor,
    reference: Tensor | None,
    lengths: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    gamma: float = 0.5,
    sft_weight: float = 0.0,
) -> Tensor:
    """The preference loss of a recipe by its name, plus `sft_weight` times the SFT loss of the chosen answer.

    Raises:
        ValueError: there is no loss of this name, or it needs a reference and gets None.
    """
    known = {
        "simpo": lambda: simpo(policy, lengths, beta, gamma),
        "orpo": lambda: orpo(policy, lengths, beta),
    }
    if reference is not None:
        known |= {
            "sigmoid": lambda: sigmoid(policy, reference, beta),
            "ipo": lambda: ipo(policy, reference, lengths, beta),
            "hinge": lambda: hinge(policy, reference, beta),
            "robust": lambda: robust(policy, reference, beta, label_smoothing),
            "sigmoid_norm": lambda: sigmoid_norm(policy, reference, lengths, beta),
            "apo_zero": lambda: apo_zero(policy, reference, beta),
        }
    if name not in known:
        raise _unknown(name, reference)
    loss = known[name]()
    return loss + sft_weight * sft(policy, lengths) if sft_weight else loss


def rewards(name: str, policy: Tensor, reference: Tensor | None, lengths: Tensor, beta: float) -> Tensor:
    """Implicit rewards `(pairs, 2)` of a preference loss by its name: the loss trains their margin.

    They are beta times the log-ratio of policy and reference (DPO, eq. 5), or without a reference beta times the
    log-prob (SimPO, eq. 4); a mean over tokens where the loss takes one. ORPO's log-odds rise and fall with that mean.

    Raises:
        ValueError: there is no loss of this name, or it needs a reference and gets None.
    """
    known = {"simpo": policy / lengths, "orpo": policy / lengths}
    if reference is not None:
        ratio = policy - reference
        known |= dict.fromkeys(("sigmoid", "hinge", "robust", "apo_zero"), ratio)
        known |= dict.fromkeys(("ipo", "sigmoid_norm"), ratio / lengths)
    if name not in known:
        raise _unknown(name, reference)
    return beta * known[name]


def _unknown(name: str, reference: Tensor | None) -> ValueError:
    without = " without a reference" if reference is None else ""
    return ValueError(f"there is no preference loss '{name}'{without}")


def shares(leads: Tensor) -> Tensor:
    """What each pair counts in an accuracy: 1 where chosen leads rejected, 0 where it trails, one half at a tie."""
    return (1 + leads.sign()) / 2


def bradley_terry(scores: Tensor, margins: Tensor | None = None, *, centering: float = 0.0) -> Tensor:
    """Reward-model loss on scores `(pairs, 2)`: -log sigma(r_w - r_l - m) (Ouyang et al. 2022, arXiv:2203.02155, eq. 1;
    margins `(pairs,)` as in Touvron et al. 2023, arXiv:2307.09288, eq. 2), plus centering * (r_w + r_l)^2 (Eisenstein
    et al. 2023, arXiv:2312.09244)."""
    gap = margin(scores) if margins is None else margin(scores) - margins
    return centering * scores.sum(dim=1) ** 2 - F.logsigmoid(gap)
