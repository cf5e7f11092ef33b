"""PPO's maths: each piece by hand, in float64 against an independent formula, and by its properties."""

import math

import pytest
import torch

from qalign.losses import policy_gradient as losses

# Two answers of three and two tokens; the last place of the second is padding and holds rubbish on purpose.
MASK = torch.tensor([[True, True, True], [True, True, False]])
RUBBISH = 1e6


def padded(*rows: list[float]) -> torch.Tensor:
    return torch.tensor([[*row, *[RUBBISH] * (3 - len(row))] for row in rows], dtype=torch.float64)


POLICY, REFERENCE = padded([-1.0, -2.0, -0.5], [-3.0, -1.0]), padded([-1.5, -1.0, -0.5], [-2.0, -1.25])
VALUES = padded([0.5, -0.25, 1.0], [0.0, 2.0])


def random_batch(seed: int):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (5,), generator=generator)
    mask = torch.arange(8)[None] < lengths[:, None]
    rewards, values = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    return rewards, values, mask


# --- KL --------------------------------------------------------------------------------------------------------------


def test_k1_and_k3_by_hand():
    assert losses.log_ratio(torch.tensor(-1.0), torch.tensor(-1.5)).item() == 0.5
    assert losses.kl_k3(torch.tensor(-1.0), torch.tensor(-1.5)).item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)
    assert losses.kl_k3(torch.tensor(-2.0), torch.tensor(-1.0)).item() == pytest.approx(math.e - 1 - 1)


def test_both_estimates_are_unbiased_for_kl_of_policy_and_reference():
    """Their mean under the policy is sum p log(p / q), whichever way round p and q are."""
    p, q = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    for one, other in ((p, q), (q, p)):
        exact = (one * (one / other).log()).sum().item()
        assert (one * losses.log_ratio(one.log(), other.log())).sum().item() == pytest.approx(exact, rel=1e-12)
        assert (one * losses.kl_k3(one.log(), other.log())).sum().item() == pytest.approx(exact, rel=1e-12)


def test_k3_is_never_negative_and_exact_near_zero():
    gaps = torch.linspace(-3, 3, 61, dtype=torch.float64)
    assert (losses.kl_k3(gaps, torch.zeros_like(gaps)) >= 0).all()
    tiny = torch.tensor(1e-5)  # in float32 exp(x) - 1 - x would be 0 or rounding
    assert losses.kl_k3(tiny, torch.tensor(0.0)).item() == pytest.approx(0.5e-10, rel=0.1)


# --- rewards of tokens -----------------------------------------------------------------------------------------------


def test_token_rewards_by_hand():
    """The last token has the score; each token pays for its KL of (0.5, -1, 0) and (-1, 0.25)."""
    found = losses.token_rewards(torch.tensor([2.0, -1.0]), losses.log_ratio(POLICY, REFERENCE), MASK, 0.1)
    expected = [[-0.05, 0.1, 0.0 + 2.0], [0.1, -0.025 - 1.0, 0.0]]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64))


# --- advantages ------------------------------------------------------------------------------------------------------


def test_gae_by_hand():
    """gamma 0.9, lambda 0.5. First answer, from the end: 3 - 1 = 2; 0 + 0.9 * 1 + 0.25 = 1.15, + 0.45 * 2 = 2.05;
    1 + 0.9 * -0.25 - 0.5 = 0.275, + 0.45 * 2.05 = 1.1975. Second: 4 - 2 = 2; 0 + 1.8 - 0 = 1.8, + 0.9 = 2.7."""
    rewards = padded([1.0, 0.0, 3.0], [0.0, 4.0])
    found = losses.gae(rewards, VALUES, MASK, gamma=0.9, lam=0.5)
    expected = torch.tensor([[1.1975, 2.05, 2.0], [2.7, 2.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(found, expected)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (1.0, 1.0), (0.9, 0.0)])
def test_gae_is_the_discounted_sum_of_errors(gamma, lam):
    """The definition (eq. 16) term by term, one answer after the other."""
    rewards, values, mask = random_batch(1)
    found = losses.gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        r, v = rewards[row, :length].tolist(), [*values[row, :length].tolist(), 0.0]
        errors = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, length))
            assert found[row, t].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert not found[row, length:].any()


def test_what_stands_in_the_padding_changes_nothing():
    rewards, values, mask = random_batch(4)
    other = [torch.where(mask, tensor, RUBBISH) for tensor in (rewards, values)]
    assert torch.equal(losses.gae(rewards, values, mask, 0.9, 0.5), losses.gae(*other, mask, 0.9, 0.5))


def test_whitened_is_mean_0_and_variance_1_over_all_tokens():
    _, values, mask = random_batch(5)
    found = losses.whiten(5 + 3 * values, mask)
    assert found[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert found[mask].var(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert not found[~mask].any()
    order = values[mask].argsort()
    assert torch.equal(found[mask].argsort(), order), "the larger value stays the larger"
    assert not losses.whiten(torch.full((2, 3), 7.0), MASK).any(), "equal values have no variance"


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.1, 2.0, -2.2, False),
        (1.5, 2.0, -2.4, True),  # no gain beyond a ratio of 1.2
        (0.5, 2.0, -1.0, False),  # the other direction is not clipped
        (0.5, -2.0, 1.6, True),
        (1.5, -2.0, 3.0, False),
    ],
)
def test_clipped_policy_loss_by_hand(ratio, advantage, loss, clipped):
    log_ratio = torch.tensor(math.log(ratio), dtype=torch.float64)
    found, was = losses.clipped_policy_loss(log_ratio, torch.tensor(advantage).double(), 0.2)
    assert found.item() == pytest.approx(loss, rel=1e-12)
    assert was.item() is clipped


def test_the_first_gradient_is_the_policy_gradient():
    """At ratio 1 the gradient of the loss is -A; where the ratio was clipped it is 0."""
    policy = torch.tensor([-1.0, -2.0, -1.0], requires_grad=True)
    old, advantages = torch.tensor([-1.0, -2.0, -2.0]), torch.tensor([2.0, -3.0, 1.0])
    losses.clipped_policy_loss(policy - old, advantages, 0.2)[0].sum().backward()
    assert policy.grad.tolist() == [-2.0, 3.0, 0.0]


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "clipped"),
    [
        (1.0, 1.0, 2.0, 0.5, False),
        (1.5, 1.0, 2.0, 0.5 * 0.8**2, True),  # clipped to 1.2, which is worse
        (0.0, 1.0, 2.0, 0.5 * 2.0**2, False),  # clipped to 0.8, which would be better
        (1.1, 1.0, 2.0, 0.5 * 0.9**2, False),
    ],
)
def test_clipped_value_loss_by_hand(value, old, target, loss, clipped):
    found, was = losses.clipped_value_loss(*(torch.tensor(x).double() for x in (value, old, target)), 0.2)
    assert found.item() == pytest.approx(loss, rel=1e-6)
    assert was.item() is clipped


# --- scores and KL coefficient ---------------------------------------------------------------------------------------


def test_moments_are_those_of_all_scores_whatever_the_batches():
    scores = torch.tensor([1.0, 4.0, -2.0, 3.5, 100.0, 99.0, 101.0])
    for cuts in ([7], [3, 4], [1, 1, 5], [6, 1]):
        moments = losses.Moments()
        for part in scores.split(cuts):
            moments = moments.updated(part)
        assert moments.count == 7
        assert moments.mean == pytest.approx(scores.double().mean().item(), rel=1e-12)
        assert moments.std == pytest.approx(scores.double().std(correction=0).item(), rel=1e-12)


def test_normalised_scores_by_hand():
    moments = losses.Moments(count=4, mean=2.0, squares=16.0)  # a deviation of 2
    found = losses.normalised(torch.tensor([2.0, 4.0, 0.0, 50.0, -50.0]), moments, clip=3.0)
    assert found.tolist() == pytest.approx([0.0, 1.0, -1.0, 3.0, -3.0])
    alike = torch.full((4,), 3.0)
    assert losses.normalised(alike, losses.Moments().updated(alike), clip=5.0).tolist() == [0.0] * 4


def test_centred_scores_are_measured_from_their_prompts_mean():
    assert losses.centred(torch.tensor([1.0, 3.0, 10.0, 40.0]), num_samples=2).tolist() == [-1.0, 1.0, -15.0, 15.0]


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.1), (6.6, 0.101), (5.4, 0.099), (100.0, 0.102), (0.0, 0.098), (-3.0, 0.098)],
)
def test_adapted_kl_coefficient_by_hand(kl, expected):
    assert losses.adapted_kl_coefficient(0.1, kl, target=6.0) == pytest.approx(expected, rel=1e-9)
