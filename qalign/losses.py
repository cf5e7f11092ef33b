"""Pure maths of preference losses and the reward model's: tensors in, one loss a pair out.

Log-probs are float32 in nats, shape `(pairs, 2)`: column 0 holds the chosen answer's, column 1 the rejected one's, each
summed over its completion tokens (end of turn included). `lengths` are those token counts, same shape.

`policy` is log pi(y|x), `reference` is log pi_ref(y|x). Every function returns `(pairs,)` and raises nothing.
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

    The log-ratios are means over tokens, as its authors confirmed they used; summed ones would let length decide.
    """
    return (margin((policy - reference) / lengths) - 1 / (2 * tau)) ** 2


def hinge(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """SLiC's hinge (Zhao et al. 2023, arXiv:2305.10425, eq. 1) on DPO's reward: max(0, 1 - beta h)."""
    return torch.relu(1 - beta * margin(policy - reference))


def robust(policy: Tensor, reference: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409, eq. 12): unbiased where labels flip with probability eps."""
    reward = beta * margin(policy - reference)
    eps = label_smoothing
    return (-(1 - eps) * F.logsigmoid(reward) + eps * F.logsigmoid(-reward)) / (1 - 2 * eps)


def sigmoid_norm(policy: Tensor, reference: Tensor, lengths: Tensor, beta: float) -> Tensor:
    """Length-normalised DPO (Lambert et al. 2024, Tulu 3, arXiv:2411.15124, eq. 6): DPO on mean log-ratios a token."""
    return -F.logsigmoid(beta * margin((policy - reference) / lengths))


def apo_zero(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7): pushes chosen up and rejected down, each alone."""
    rewards = beta * (policy - reference)
    return 1 - torch.sigmoid(rewards[:, CHOSEN]) + torch.sigmoid(rewards[:, REJECTED])


def simpo(policy: Tensor, lengths: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO (Meng et al. 2024, arXiv:2405.14734, eq. 6): mean log-probs as reward, a target margin, no reference."""
    return -F.logsigmoid(beta * margin(policy / lengths) - gamma)


def orpo(policy: Tensor, lengths: Tensor, lam: float) -> Tensor:
    """ORPO (Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7): NLL of the chosen plus lambda times the odds-ratio loss.

    odds(y|x) = P / (1 - P) with P the geometric mean of the token probabilities; no reference.
    """
    mean = policy / lengths
    below_one = mean.clamp(max=-1e-6)  # an answer that is certain in float32 has infinite odds and no gradient
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
    """The loss of a recipe: the one named, plus `sft_weight` times the chosen answer's.

    Raises:
        ValueError: there is no loss of this name.
    """
    match name:
        case "sigmoid":
            loss = sigmoid(policy, reference, beta)
        case "ipo":
            loss = ipo(policy, reference, lengths, beta)
        case "hinge":
            loss = hinge(policy, reference, beta)
        case "robust":
            loss = robust(policy, reference, beta, label_smoothing)
        case "sigmoid_norm":
            loss = sigmoid_norm(policy, reference, lengths, beta)
        case "apo_zero":
            loss = apo_zero(policy, reference, beta)
        case "simpo":
            loss = simpo(policy, lengths, beta, gamma)
        case "orpo":
            loss = orpo(policy, lengths, beta)
        case _:
            raise ValueError(f"there is no preference loss '{name}'")
    return loss + sft_weight * sft(policy, lengths) if sft_weight else loss


def rewards(policy: Tensor, reference: Tensor | None, lengths: Tensor, beta: float) -> Tensor:
    """The implicit reward a loss trains, `(pairs, 2)`: beta times the log-ratio (DPO, eq. 5), or, without a
    reference, beta times the mean log-prob a token (SimPO, eq. 4)."""
    return beta * (policy / lengths if reference is None else policy - reference)


def bradley_terry(scores: Tensor, margins: Tensor | None = None, *, centering: float = 0.0) -> Tensor:
    """A reward model's loss on scores `(pairs, 2)`: -log sigma(r_w - r_l - m) (Ouyang et al. 2022, arXiv:2203.02155,
    eq. 1; margins `(pairs,)` by Touvron et al. 2023, arXiv:2307.09288, eq. 2), plus centering * (r_w + r_l)^2
    (Eisenstein et al. 2023, arXiv:2312.09244)."""
    gap = margin(scores) if margins is None else margin(scores) - margins
    return centering * scores.sum(dim=1) ** 2 - F.logsigmoid(gap)
