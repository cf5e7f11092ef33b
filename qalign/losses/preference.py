"""Losses on preference pairs, for policies and for reward models: pure functions of tensors.

They begin with log-probs in nats, float32 `(pairs, 2)`: column 0 is the chosen answer, column 1 the rejected one, each
summed over the tokens of the completion (end of turn included). `lengths` are these token counts, in the same shape.
A log-ratio is log pi(y|x) - log pi_ref(y|x), and `rewards` are beta times it. A `gap` is chosen minus rejected, times
beta: `(pairs,)`. `probability` is the probability, `(pairs,)`, that the chosen answer is the better one; 1 is a hard
label, 0.5 a tie. Every loss returns `(pairs,)`.
"""

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHOSEN, REJECTED = 0, 1
REFERENCE_FREE = frozenset({"simpo", "orpo", "sft"})
PER_TOKEN = frozenset({"ipo", "sigmoid_norm", "simpo", "orpo"})  # their rewards are means over tokens
MAX_EXPONENT = 80.0  # exp of it is finite in float32; TRL's bound


def margin(values: Tensor) -> Tensor:
    """Chosen minus rejected: `(pairs, 2)` to `(pairs,)`."""
    return values[:, CHOSEN] - values[:, REJECTED]


# --- losses of the gap alone -----------------------------------------------------------------------------------------


def sigmoid(gap: Tensor, probability: Tensor | float = 1.0) -> Tensor:
    """DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7): -log sigma(beta (log-ratio_w - log-ratio_l)). With a
    probability the cross entropy of cDPO (Mitchell 2023, "A note on DPO with noisy preferences")."""
    return -probability * F.logsigmoid(gap) - (1 - probability) * F.logsigmoid(-gap)


def hinge(gap: Tensor) -> Tensor:
    """SLiC's hinge (Zhao et al. 2023, arXiv:2305.10425, eq. 1) on DPO's reward: max(0, 1 - beta h)."""
    return torch.relu(1 - gap)


def robust(gap: Tensor, label_smoothing: float) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409, eq. 12): unbiased if labels flip with probability eps."""
    eps = label_smoothing
    return (-(1 - eps) * F.logsigmoid(gap) + eps * F.logsigmoid(-gap)) / (1 - 2 * eps)


def exo_pair(gap: Tensor, better: Tensor, worse: Tensor) -> Tensor:
    """EXO of a pair (Ji et al. 2024, arXiv:2402.00856, eq. 16): KL from softmax of the rewards to the labels'
    distribution, which is `better`, the probability of the chosen answer, and `worse` = 1 - `better`; both above 0."""
    chosen, rejected = F.logsigmoid(gap), F.logsigmoid(-gap)
    return chosen.exp() * (chosen - better.log()) + rejected.exp() * (rejected - worse.log())


def discopop(gap: Tensor, tau: float) -> Tensor:
    """DiscoPOP's LRML (Lu et al. 2024, arXiv:2406.08414, eq. 5): blends the logistic and the exponential loss by
    sigma(gap / tau). exp(-gap) is multiplied in the exponent, so that it can't overflow beside a weight of 0."""
    weight = torch.sigmoid(gap / tau)
    return -F.logsigmoid(gap) * (1 - weight) + torch.exp(F.logsigmoid(gap / tau) - gap)


# --- losses of each answer's own log-ratio ---------------------------------------------------------------------------


def ipo(log_ratios: Tensor, tau: float, probability: Tensor | float = 1.0) -> Tensor:
    """IPO (Azar et al. 2023, arXiv:2310.12036, eq. 17): (h - 1/(2 tau))^2, on log-ratios that are means over tokens, as
    the authors confirmed; with sums, long answers would dominate.

    With a probability p the goal is (2p - 1)/(2 tau) (cIPO: Furuta et al. 2024, arXiv:2409.06691). It is the mean of
    eq. 17 over labels that say w > l with probability p, but for a constant.
    """
    return (margin(log_ratios) - (2 * probability - 1) * (1 / (2 * tau))) ** 2


def bco_pair(rewards: Tensor, shift: float = 0.0) -> Tensor:
    """BCO (Jung et al. 2024, arXiv:2404.04656): tells chosen from rejected answers by their reward minus the
    `shift` delta, the mean reward of both."""
    return -F.logsigmoid(rewards[:, CHOSEN] - shift) - F.logsigmoid(shift - rewards[:, REJECTED])


def nca_pair(rewards: Tensor) -> Tensor:
    """NCA (Chen et al. 2024, arXiv:2402.05369) for a pair: raises the chosen answer, and holds both near the
    reference."""
    return -F.logsigmoid(rewards[:, CHOSEN]) - 0.5 * F.logsigmoid(-rewards).sum(dim=1)


def sppo_hard(log_ratios: Tensor, beta: float) -> Tensor:
    """SPPO (Wu et al. 2024, arXiv:2405.00675, eq. 4.7) with win rates of 1 and 0: log-ratios of +-1/(2 beta)."""
    goal = 0.5 / beta
    return (log_ratios[:, CHOSEN] - goal) ** 2 + (log_ratios[:, REJECTED] + goal) ** 2


def apo_zero(rewards: Tensor) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7): raises the chosen and lowers the rejected one."""
    return 1 - torch.sigmoid(rewards[:, CHOSEN]) + torch.sigmoid(rewards[:, REJECTED])


def apo_down(rewards: Tensor) -> Tensor:
    """APO-down (the same paper, eq. 8), for chosen answers that are worse than the model's own: lowers both, the
    rejected one more."""
    return torch.sigmoid(rewards[:, CHOSEN]) + 1 - torch.sigmoid(margin(rewards))


# --- losses over all pairs of an optimiser step ----------------------------------------------------------------------


def aot(policy: Tensor, reference: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT on pairs (Melnyk et al. 2024, arXiv:2406.05882): the margins of the policy's log-probs should lead the
    reference's in every quantile, so each is compared with the reference's of the same rank."""
    policy_margins = margin(policy)
    return sigmoid(beta * (policy_margins - _of_equal_rank(policy_margins, margin(reference))), 1 - label_smoothing)


def aot_unpaired(rewards: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Unpaired AOT (the same paper): the rewards of chosen answers should lead those of rejected ones in every
    quantile."""
    chosen, rejected = rewards[:, CHOSEN], rewards[:, REJECTED]
    return sigmoid(chosen - _of_equal_rank(chosen, rejected), 1 - label_smoothing)


def _of_equal_rank(values: Tensor, others: Tensor) -> Tensor:
    """For each of `values` the one of `others` that has the same rank, both `(pairs,)`."""
    return others.sort().values[values.argsort().argsort()]


# --- losses without a reference --------------------------------------------------------------------------------------


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


def sft(policy: Tensor, lengths: Tensor, probability: Tensor | float = 1.0) -> Tensor:
    """Mean negative log-likelihood of the chosen answer (Pang et al. 2024, arXiv:2404.19733, eq. 1); with a probability
    of the better one, in expectation. The mean is over the tokens of each answer, so that pairs count alike whatever
    their length and micro-batches change nothing; TRL's (1.16) is over all chosen tokens of a batch."""
    mean = policy / lengths
    return -probability * mean[:, CHOSEN] - (1 - probability) * mean[:, REJECTED]


# --- a recipe's loss -------------------------------------------------------------------------------------------------


def divergence_scores(log_ratios: Tensor, divergence: str, alpha: float) -> Tensor:
    """f-DPO (Wang et al. 2023, arXiv:2309.16240): f'(u) of u = pi / pi_ref, by log u, where f is the
    divergence that holds the policy to the reference. Reverse KL is DPO: log u. All are 0 at u = 1."""
    if divergence == "js":
        return math.log(2) + F.logsigmoid(log_ratios)
    power = {"reverse_kl": 0.0, "forward_kl": -1.0, "alpha": alpha - 1}[divergence]
    if abs(power) < 1e-6:  # the limit of what follows
        return log_ratios
    return (torch.exp((power * log_ratios).clamp(max=MAX_EXPONENT)) - 1) / power


@dataclass(frozen=True)
class PreferenceLoss:
    """A recipe's preference loss: a weighted sum of losses by their names.

    `weights` are those of the sum, as in MPO (Wang et al. 2024, arXiv:2411.10442). `length_penalty` is R-DPO's
    alpha in nats a token (Park et al. 2024, arXiv:2403.19159): it adds alpha (|y_w| - |y_l|) to the gap.
    """

    weights: Mapping[str, float]
    beta: float
    label_smoothing: float = 0.0
    gamma: float = 0.5
    divergence: str = "reverse_kl"
    divergence_alpha: float = 0.5
    length_penalty: float = 0.0
    discopop_tau: float = 0.05

    def __call__(
        self,
        policy: Tensor,
        reference: Tensor | None,
        lengths: Tensor,
        probability: Tensor | None = None,
        shift: float = 0.0,
    ) -> Tensor:
        """The loss of each pair. `shift` is BCO's.

        Raises:
            ValueError: there is no loss of one of the names, or it needs a reference and gets None.
        """
        labels = policy.new_ones(len(policy)) if probability is None else probability
        parts: dict[str, Callable[[], Tensor]] = {
            "simpo": lambda: simpo(policy, lengths, self.beta, self.gamma),
            "orpo": lambda: orpo(policy, lengths, self.beta),
            "sft": lambda: sft(policy, lengths, labels),
        }
        if reference is not None:
            parts |= self._with_reference(policy, reference, lengths, labels, shift)
        self._check(parts, reference)
        return torch.stack([weight * parts[name]() for name, weight in self.weights.items()]).sum(dim=0)

    def _with_reference(
        self, policy: Tensor, reference: Tensor, lengths: Tensor, labels: Tensor, shift: float
    ) -> dict[str, Callable[[], Tensor]]:
        beta, eps = self.beta, self.label_smoothing
        ratios = policy - reference
        scores = divergence_scores(ratios, self.divergence, self.divergence_alpha)
        gap, of_tokens = beta * margin(scores), scores / lengths
        if self.length_penalty:
            gap = gap + self.length_penalty * margin(lengths).to(gap)
        # The chosen answer is the better one if the label is right and names it, or is wrong and names the other.
        better, worse = labels * (1 - eps) + (1 - labels) * eps, labels * eps + (1 - labels) * (1 - eps)
        return {
            "sigmoid": lambda: sigmoid(gap, better),
            "hinge": lambda: hinge(gap),
            "robust": lambda: robust(gap, eps),
            "exo_pair": lambda: exo_pair(gap, better, worse),
            "discopop": lambda: discopop(gap, self.discopop_tau),
            "sigmoid_norm": lambda: sigmoid(beta * margin(of_tokens), better),  # Tulu 3: arXiv:2411.15124, eq. 6
            "ipo": lambda: ipo(of_tokens, beta, better),
            "bco_pair": lambda: bco_pair(beta * ratios, shift),
            "nca_pair": lambda: nca_pair(beta * ratios),
            "sppo_hard": lambda: sppo_hard(ratios, beta),
            "apo_zero": lambda: apo_zero(beta * ratios),
            "apo_down": lambda: apo_down(beta * ratios),
            "aot": lambda: aot(policy, reference, beta, eps),
            "aot_unpaired": lambda: aot_unpaired(beta * ratios, eps),
        }

    def rewards(self, policy: Tensor, reference: Tensor | None, lengths: Tensor) -> Tensor:
        """Implicit rewards `(pairs, 2)`: the loss trains their margin.

        They are beta times the log-ratio of policy and reference (DPO, eq. 5), or f' of it, or without a reference beta
        times the log-prob (SimPO, eq. 4); a mean over tokens where all parts of the loss take one. ORPO's log-odds rise
        and fall with that mean. R-DPO's length term is no part of them: it would count before anything is learned.

        Raises:
            ValueError: one of the losses needs a reference and gets None.
        """
        if reference is None:
            self._check(REFERENCE_FREE, reference)
            values = policy
        else:
            values = divergence_scores(policy - reference, self.divergence, self.divergence_alpha)
        per_token = PER_TOKEN.issuperset(name for name in self.weights if name != "sft")
        return self.beta * (values / lengths if per_token else values)

    def _check(self, known: Container[str], reference: Tensor | None) -> None:
        if unknown := [name for name in self.weights if name not in known]:
            without = " without a reference" if reference is None else ""
            raise ValueError(f"there is no preference loss '{unknown[0]}'{without}")


def shares(leads: Tensor, probability: Tensor | float = 1.0) -> Tensor:
    """What each pair counts in an accuracy: 1 where the better answer leads, 0 where it trails, one half if none leads
    or, with a probability of 0.5, none is better."""
    return (1 + (leads * (2 * probability - 1)).sign()) / 2


def bradley_terry(
    scores: Tensor, probability: Tensor | float = 1.0, margins: Tensor | None = None, *, centering: float = 0.0
) -> Tensor:
    """Reward-model loss on scores `(pairs, 2)`: the cross entropy of sigma(r_w - r_l - m) and the probability, with a
    hard label -log sigma(r_w - r_l - m) (Ouyang et al. 2022, arXiv:2203.02155, eq. 1; margins `(pairs,)` as in Touvron
    et al. 2023, arXiv:2307.09288, eq. 2), plus centering * (r_w + r_l)^2 (Eisenstein et al. 2023, arXiv:2312.09244)."""
    gap = margin(scores) if margins is None else margin(scores) - margins
    return centering * scores.sum(dim=1) ** 2 + sigmoid(gap, probability)
