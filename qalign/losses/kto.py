"""Losses on single answers that are labelled desirable or undesirable: pure functions of tensors.

They take log-probs in nats, float32 `(rows,)`, each summed over the tokens of the completion (end of turn included):
`policy` is log pi(y|x), `reference` is log pi_ref(y|x). `desirable` is bool `(rows,)`. Every loss returns `(rows,)`.
"""

import torch
from torch import Tensor


def kl_estimate(policy: Tensor, reference: Tensor) -> Tensor:
    """The reference point z_0 of KTO (Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1), a scalar in nats:
    max(0, mean of log pi(y'|x) - log pi_ref(y'|x)), where y' is the answer to another prompt of the same step.

    The loss takes it as a constant, so it carries no gradient.
    """
    return (policy - reference).mean().clamp(min=0).detach()


def kto(policy: Tensor, reference: Tensor, desirable: Tensor, kl: Tensor, beta: float) -> Tensor:
    """KTO (arXiv:2402.01306, eq. 7): 1 - sigma(beta (r - z_0)) for a desirable answer, 1 - sigma(beta (z_0 - r)) for an
    undesirable one. r is the log-ratio, z_0 the `kl_estimate`."""
    gain = beta * (policy - reference - kl)
    return 1 - torch.sigmoid(torch.where(desirable, gain, -gain))


def apo_zero_unpaired(policy: Tensor, reference: Tensor, desirable: Tensor, beta: float) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7), each of its two terms on rows of its own: KTO with
    z_0 = 0."""
    return kto(policy, reference, desirable, policy.new_zeros(()), beta)


def label_loss(
    name: str,
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """The loss of a recipe by its name, times the weight of each answer's label: lambda_D and lambda_U in eq. 7 of
    arXiv:2402.01306.

    Raises:
        ValueError: there is no loss of this name.
    """
    known = {
        "kto": lambda: kto(policy, reference, desirable, kl, beta),
        "apo_zero_unpaired": lambda: apo_zero_unpaired(policy, reference, desirable, beta),
    }
    if name not in known:
        raise ValueError(f"there is no loss on labelled answers '{name}'")
    return torch.where(desirable, desirable_weight, undesirable_weight) * known[name]()
