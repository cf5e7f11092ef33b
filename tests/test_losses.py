"""Each loss against values worked out by hand, and the properties that make it the loss it claims to be."""

import math

import pytest
import torch

from qalign.losses import preference as losses

LN2 = math.log(2)
# One pair: log pi = (-10, -12) for chosen and rejected, log pi_ref = (-11, -9), 5 and 4 tokens.
POLICY = torch.tensor([[-10.0, -12.0]], dtype=torch.float64)
REFERENCE = torch.tensor([[-11.0, -9.0]], dtype=torch.float64)
LENGTHS = torch.tensor([[5, 4]])
# Log-ratios: +1 and -3, so the margin h is 4; means a token: 0.2 and -0.75, so 0.95.


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def odds(mean: float) -> float:
    return math.exp(mean) / (1 - math.exp(mean))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (losses.sigmoid(POLICY, REFERENCE, beta=0.5), math.log1p(math.exp(-2))),
        (losses.ipo(POLICY, REFERENCE, LENGTHS, tau=0.5), (0.95 - 1) ** 2),
        (losses.hinge(POLICY, REFERENCE, beta=0.1), 0.6),
        (losses.hinge(POLICY, REFERENCE, beta=0.5), 0.0),
        # eps = 0.1, reward 2: (0.9 ln(1 + e^-2) - 0.1 ln(1 + e^2)) / 0.8
        (losses.robust(POLICY, REFERENCE, 0.5, label_smoothing=0.1), (0.9 * 0.126928011 - 0.1 * 2.126928011) / 0.8),
        (losses.sigmoid_norm(POLICY, REFERENCE, LENGTHS, beta=2.0), math.log1p(math.exp(-1.9))),
        (losses.apo_zero(POLICY, REFERENCE, beta=0.5), (1 - sigma(0.5)) + sigma(-1.5)),
        # mean log-probs -2 and -3: beta * 1 - gamma = 1.5
        (losses.simpo(POLICY, LENGTHS, beta=2.0, gamma=0.5), math.log1p(math.exp(-1.5))),
        (losses.orpo(POLICY, LENGTHS, lam=0.25), 2.0 - 0.25 * math.log(sigma(math.log(odds(-2.0) / odds(-3.0))))),
        (losses.sft(POLICY, LENGTHS), 2.0),
    ],
)
def test_each_loss_by_hand(loss, expected):
    assert loss.tolist() == pytest.approx([expected], rel=1e-8)


def test_robust_is_unbiased():
    """Its mean over labels flipped with probability eps is the clean loss (arXiv:2403.00409, eq. 11)."""
    eps, flipped = 0.2, [t.flip(1) for t in (POLICY, REFERENCE)]
    noisy = (1 - eps) * losses.robust(POLICY, REFERENCE, 0.5, eps) + eps * losses.robust(*flipped, 0.5, eps)
    assert noisy.item() == pytest.approx(losses.sigmoid(POLICY, REFERENCE, 0.5).item(), rel=1e-12)


def test_simpo_and_orpo_equal_trl():
    """TRL's CPO and ORPO trainers, their loss methods called on the same mean log-probs."""
    from types import SimpleNamespace

    cpo = pytest.importorskip("trl.experimental.cpo", reason="TRL moved its experimental CPO trainer").CPOTrainer
    orpo = pytest.importorskip("trl.experimental.orpo", reason="TRL moved its experimental ORPO trainer").ORPOTrainer
    torch.manual_seed(0)
    policy, lengths = -torch.rand(6, 2) * 40 - 1, torch.randint(5, 30, (6, 2))
    mean = policy / lengths
    settings = SimpleNamespace(
        beta=2.0, loss_type="simpo", simpo_gamma=0.7, gamma_beta_ratio=0.35, label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"), alpha=0.0, cpo_alpha=0.0,
    )  # fmt: skip
    theirs = cpo.cpo_loss(settings, mean[:, 0], mean[:, 1])[0]
    torch.testing.assert_close(losses.simpo(policy, lengths, beta=2.0, gamma=0.7), theirs)
    ratio_loss = orpo.odds_ratio_loss(settings, mean[:, 0], mean[:, 1])[0]  # beta * log sigma(log odds ratio)
    torch.testing.assert_close(losses.orpo(policy, lengths, lam=2.0), losses.sft(policy, lengths) - ratio_loss)


def test_orpo_of_a_certain_answer_is_finite():
    """Float32 log-probs of a confident model are exactly 0, whose odds are infinite."""
    policy = torch.tensor([[0.0, -20.0], [-1e-8, -3.0], [-2.0, 0.0]], requires_grad=True)
    loss = losses.orpo(policy, torch.tensor([[1, 4], [2, 3], [3, 2]]), lam=0.5)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert policy.grad.isfinite().all()


ALL = ["sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "apo_zero", "simpo", "orpo"]


def total(name, policy, reference, lengths, **settings):
    return losses.preference_loss(name, policy, reference, lengths, **{"beta": 0.1, "label_smoothing": 0.1} | settings)


@pytest.mark.parametrize("name", ALL)
def test_gradient_pushes_chosen_up_and_rejected_down(name):
    policy = POLICY.clone().requires_grad_()
    total(name, policy, REFERENCE, LENGTHS).sum().backward()
    assert policy.grad[0, losses.CHOSEN] < 0 < policy.grad[0, losses.REJECTED]


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "robust"])
def test_policy_equal_to_reference_gives_ln_2(name):
    loss = total(name, POLICY, POLICY, LENGTHS, label_smoothing=0.0)
    assert loss.item() == pytest.approx(LN2, abs=1e-15)


@pytest.mark.parametrize("name", ALL)
def test_pairs_do_not_meet(name):
    """The loss of a pair is the same alone and in a batch, in any order."""
    torch.manual_seed(1)
    policy, reference, lengths = -torch.rand(5, 2) * 30 - 1, -torch.rand(5, 2) * 30 - 1, torch.randint(10, 30, (5, 2))
    together = total(name, policy, reference, lengths)
    alone = torch.cat([total(name, policy[i : i + 1], reference[i : i + 1], lengths[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone)
    backwards = total(name, policy.flip(0), reference.flip(0), lengths.flip(0))
    torch.testing.assert_close(together, backwards.flip(0))


def test_sft_weight_adds_the_chosen_answers_mean_nll():
    plain, with_sft = (total("sigmoid", POLICY, REFERENCE, LENGTHS, sft_weight=weight) for weight in (0.0, 0.3))
    assert (with_sft - plain).item() == pytest.approx(0.3 * 2.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sigmoid", [0.5, -1.5]), ("hinge", [0.5, -1.5]), ("robust", [0.5, -1.5]), ("apo_zero", [0.5, -1.5]),
        ("ipo", [0.1, -0.375]), ("sigmoid_norm", [0.1, -0.375]), ("simpo", [-1.0, -1.5]), ("orpo", [-1.0, -1.5]),
    ],
)  # fmt: skip
def test_the_reward_of_each_loss_by_hand(name, expected):
    assert losses.rewards(name, POLICY, REFERENCE, LENGTHS, beta=0.5).tolist() == [pytest.approx(expected)]
    swapped = losses.rewards(name, POLICY.flip(1), REFERENCE.flip(1), LENGTHS.flip(1), beta=0.5)
    assert losses.margin(swapped).item() == pytest.approx(expected[1] - expected[0])


@pytest.mark.parametrize("name", ALL)
def test_a_loss_is_a_function_of_its_rewards_alone(name):
    """Other answers, whose log-probs and lengths differ but whose rewards don't, have the same loss. A step down the
    loss raises the reward's margin. (ORPO adds the chosen answer's likelihood, which is the same here.)"""
    longer = LENGTHS * 2
    per_token = name in ("ipo", "sigmoid_norm", "simpo", "orpo")
    policy, reference = (t * 2 if per_token else t + 7.0 for t in (POLICY, REFERENCE))
    before = losses.rewards(name, POLICY, REFERENCE, LENGTHS, 0.5)
    torch.testing.assert_close(losses.rewards(name, policy, reference, longer, 0.5), before)
    assert total(name, policy, reference, longer).item() == pytest.approx(
        total(name, POLICY, REFERENCE, LENGTHS).item()
    )
    moved = POLICY.clone().requires_grad_()
    total(name, moved, REFERENCE, LENGTHS).sum().backward()
    after = losses.rewards(name, (POLICY - 0.1 * moved.grad), REFERENCE, LENGTHS, 0.5)
    assert losses.margin(after) > losses.margin(before)


def test_a_tie_counts_a_half():
    assert losses.shares(torch.tensor([2.0, 0.0, -0.1])).tolist() == [1.0, 0.5, 0.0]


def test_unknown_loss_is_an_error():
    with pytest.raises(ValueError, match="there is no preference loss 'dpo'"):
        total("dpo", POLICY, REFERENCE, LENGTHS)
    with pytest.raises(ValueError, match="'sigmoid' without a reference"):
        total("sigmoid", POLICY, None, LENGTHS)
    with pytest.raises(ValueError, match="'ipo' without a reference"):
        losses.rewards("ipo", POLICY, None, LENGTHS, beta=0.1)
