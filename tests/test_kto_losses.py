"""Losses on labelled answers: values worked out by hand, and what must hold of them."""

import math

import pytest
import torch

from qalign.losses.kto import apo_zero_unpaired, kl_estimate, kto, label_loss

POLICY = torch.tensor([-10.0, -12.0, -8.0])
REFERENCE = torch.tensor([-12.0, -11.0, -8.0])  # log-ratios 2, -1, 0
GOOD = torch.tensor([True, False, True])


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_kl_estimate_is_a_mean_not_below_zero():
    assert kl_estimate(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0])).item() == 1.5  # (1 + 2) / 2
    assert kl_estimate(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0])).item() == 0.0


def test_the_kl_estimate_carries_no_gradient():
    policy = POLICY.clone().requires_grad_()
    assert not kl_estimate(policy, REFERENCE).requires_grad


def test_kto_by_hand():
    """beta 0.5, z_0 = 1: gains 0.5 (2 - 1) = 0.5, 0.5 (-1 - 1) = -1, 0.5 (0 - 1) = -0.5. A good answer loses what its
    gain lacks, a bad one what it has."""
    found = kto(POLICY, REFERENCE, GOOD, torch.tensor(1.0), beta=0.5)
    expected = [1 - sigma(0.5), 1 - sigma(1.0), 1 - sigma(-0.5)]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert found.tolist() == pytest.approx([0.37754, 0.26894, 0.62246], abs=1e-5)


def test_apo_zero_by_hand():
    """beta 1: 1 - sigma(2) for the good answer, sigma(-1) for the bad one, 1 - sigma(0)."""
    found = apo_zero_unpaired(POLICY, REFERENCE, GOOD, beta=1.0)
    assert found.tolist() == pytest.approx([0.119203, 0.268941, 0.5], abs=1e-6)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_an_unchanged_policy_loses_a_half_and_weights_multiply(name):
    keys = {"beta": 0.1, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    found = label_loss(name, POLICY, POLICY, GOOD, torch.tensor(0.0), **keys)
    assert found.tolist() == [0.75, 0.25, 0.75]


def test_good_answers_are_raised_and_bad_ones_lowered():
    policy = POLICY.clone().requires_grad_()
    label_loss("kto", policy, REFERENCE, GOOD, torch.tensor(0.3), beta=0.1).sum().backward()
    assert (policy.grad < 0).tolist() == GOOD.tolist()  # descent raises where the gradient is negative


def test_an_unknown_loss_is_named():
    with pytest.raises(ValueError, match="kto2"):
        label_loss("kto2", POLICY, REFERENCE, GOOD, torch.tensor(0.0), beta=0.1)
