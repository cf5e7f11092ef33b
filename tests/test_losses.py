"""Each loss against values worked out by hand, and the properties that make it the loss it claims to be."""

import math
from typing import get_args

import pytest
import torch

from qalign.config.stages import DPO_LOSSES, REFERENCE_FREE
from qalign.losses import preference as losses

LN2 = math.log(2)
# One pair: log pi = (-10, -12) for chosen and rejected, log pi_ref = (-11, -9), 5 and 4 tokens.
POLICY = torch.tensor([[-10.0, -12.0]], dtype=torch.float64)
REFERENCE = torch.tensor([[-11.0, -9.0]], dtype=torch.float64)
LENGTHS = torch.tensor([[5, 4]])
RATIOS = POLICY - REFERENCE
# Log-ratios: +1 and -3, so the margin h is 4; means a token: 0.2 and -0.75, so 0.95.
ALL = sorted(get_args(DPO_LOSSES))
OVER_ALL_PAIRS = ["aot", "aot_unpaired"]
OF_EACH_PAIR = [name for name in ALL if name not in OVER_ALL_PAIRS]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def nll(x: float) -> float:
    """-log sigma(x)"""
    return math.log1p(math.exp(-x))


def odds(mean: float) -> float:
    return math.exp(mean) / (1 - math.exp(mean))


def of(weights, **settings) -> losses.PreferenceLoss:
    weights = {weights: 1.0} if isinstance(weights, str) else weights
    smoothed = {"robust", "exo_pair"} & {*weights}
    return losses.PreferenceLoss(weights, **{"beta": 0.1, "label_smoothing": 0.1 if smoothed else 0.0} | settings)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("sigmoid", {"beta": 0.5}, nll(2.0)),
        ("sigmoid", {"beta": 0.5, "label_smoothing": 0.25}, 0.75 * nll(2.0) + 0.25 * nll(-2.0)),
        ("ipo", {"beta": 0.5}, (0.95 - 1) ** 2),
        ("ipo", {"beta": 0.5, "label_smoothing": 0.25}, (0.95 - 0.5) ** 2),
        ("hinge", {"beta": 0.1}, 0.6),
        ("hinge", {"beta": 0.5}, 0.0),
        ("robust", {"beta": 0.5, "label_smoothing": 0.1}, (0.9 * 0.126928011 - 0.1 * 2.126928011) / 0.8),
        ("sigmoid_norm", {"beta": 2.0}, nll(1.9)),
        # softmax of the rewards is (sigma(2), sigma(-2)), the labels' distribution (0.9, 0.1).
        ("exo_pair", {"beta": 0.5, "label_smoothing": 0.1},
         sigma(2) * math.log(sigma(2) / 0.9) + sigma(-2) * math.log(sigma(-2) / 0.1)),
        ("discopop", {"beta": 0.1}, nll(0.4) * sigma(-8) + math.exp(-0.4) * sigma(8)),
        ("discopop", {"beta": 0.1, "discopop_tau": 0.4}, nll(0.4) * sigma(-1) + math.exp(-0.4) * sigma(1)),
        ("bco_pair", {"beta": 0.5}, nll(0.5) + nll(1.5)),
        ("nca_pair", {"beta": 0.5}, nll(0.5) + 0.5 * nll(-0.5) + 0.5 * nll(1.5)),
        ("sppo_hard", {"beta": 0.25}, (1 - 2) ** 2 + (-3 + 2) ** 2),
        ("apo_zero", {"beta": 0.5}, (1 - sigma(0.5)) + sigma(-1.5)),
        ("apo_down", {"beta": 0.5}, sigma(0.5) + (1 - sigma(2.0))),
        ("aot", {"beta": 0.5}, nll(2.0)),  # of one pair: DPO
        ("aot_unpaired", {"beta": 0.5, "label_smoothing": 0.25}, 0.75 * nll(2.0) + 0.25 * nll(-2.0)),
        # mean log-probs -2 and -3: beta * 1 - gamma = 1.5
        ("simpo", {"beta": 2.0, "gamma": 0.5}, nll(1.5)),
        ("orpo", {"beta": 0.25}, 2.0 - 0.25 * math.log(sigma(math.log(odds(-2.0) / odds(-3.0))))),
        ("sft", {}, 2.0),
        ({"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, {"beta": 0.5}, 0.8 * nll(2) + 0.2 * (nll(0.5) + nll(1.5)) + 2),
        # f'(u) of log u = 1 and -3: 1 - e^-1 and 1 - e^3
        ("sigmoid", {"beta": 0.01, "divergence": "forward_kl"}, nll(0.01 * (math.exp(3) - math.exp(-1)))),
        # log 2u/(1+u): ln 2 + ln sigma(1), ln 2 + ln sigma(-3)
        ("hinge", {"beta": 0.1, "divergence": "js"}, 1 - 0.1 * (nll(-3) - nll(1))),
        # (u^-0.5 - 1) / -0.5, over 5 and 4 tokens
        ("ipo", {"beta": 0.5, "divergence": "alpha", "divergence_alpha": 0.5},
         (-2 * (math.exp(-0.5) - 1) / 5 + 2 * (math.exp(1.5) - 1) / 4 - 1) ** 2),
        ("sigmoid", {"beta": 0.5, "divergence": "alpha", "divergence_alpha": 1.0}, nll(2.0)),
        # R-DPO: the chosen answer is a token longer, so its lead counts 0.3 more.
        ("sigmoid", {"beta": 0.5, "length_penalty": 0.3}, nll(2.3)),
        ("hinge", {"beta": 0.1, "length_penalty": 0.3}, 0.3),
    ],
)  # fmt: skip
def test_each_loss_by_hand(name, settings, expected):
    assert of(name, **settings)(POLICY, REFERENCE, LENGTHS).tolist() == pytest.approx([expected], rel=1e-8)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("sigmoid", {"beta": 0.5}, 0.7 * nll(2) + 0.3 * nll(-2)),
        # The label is right with 0.9: the chosen answer is the better one with 0.7 * 0.9 + 0.3 * 0.1.
        ("sigmoid", {"beta": 0.5, "label_smoothing": 0.1}, 0.66 * nll(2) + 0.34 * nll(-2)),
        ("sigmoid_norm", {"beta": 2.0}, 0.7 * nll(1.9) + 0.3 * nll(-1.9)),
        ("ipo", {"beta": 0.5}, (0.95 - 0.4) ** 2),
        ("exo_pair", {"beta": 0.5, "label_smoothing": 0.1},
         sigma(2) * math.log(sigma(2) / 0.66) + sigma(-2) * math.log(sigma(-2) / 0.34)),
        ("sft", {}, 0.7 * 2 + 0.3 * 3),
    ],
)  # fmt: skip
def test_a_probability_by_hand(name, settings, expected):
    """A probability of 0.7 of the chosen answer; of the two answers swapped, 0.3 says the same."""
    loss, likely = of(name, **settings), torch.tensor([0.7], dtype=torch.float64)
    assert loss(POLICY, REFERENCE, LENGTHS, likely).tolist() == pytest.approx([expected], rel=1e-8)
    swapped = loss(POLICY.flip(1), REFERENCE.flip(1), LENGTHS.flip(1), 1 - likely)
    assert swapped.tolist() == pytest.approx([expected], rel=1e-8)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "ipo", "exo_pair"])
def test_a_tie_is_best_without_a_lead_and_a_probability_at_its_log_odds(name):
    """DPO's best gap is the logit of the probability; a tie pulls back whatever leads."""
    even = torch.tensor([0.5], dtype=torch.float64)
    at_reference = of(name)(REFERENCE, REFERENCE, LENGTHS, even)
    assert at_reference < of(name)(POLICY, REFERENCE, LENGTHS, even)
    assert at_reference < of(name)(POLICY.flip(1), REFERENCE.flip(1), LENGTHS.flip(1), even)
    gap = torch.tensor([math.log(0.7 / 0.3)], dtype=torch.float64, requires_grad=True)
    losses.sigmoid(gap, torch.tensor([0.7], dtype=torch.float64)).backward()
    assert gap.grad.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "ipo", "sft"])
def test_a_probability_of_1_is_a_hard_label_to_the_bit(name):
    """Loss and gradient of the plain formulas, as they are in the papers."""
    torch.manual_seed(0)
    policy, reference, lengths = -torch.rand(50, 2) * 90, -torch.rand(50, 2) * 90, torch.randint(1, 30, (50, 2))
    plain = {
        "sigmoid": lambda p: -torch.nn.functional.logsigmoid(0.3 * losses.margin(p - reference)),
        "sigmoid_norm": lambda p: -torch.nn.functional.logsigmoid(0.3 * losses.margin((p - reference) / lengths)),
        "ipo": lambda p: (losses.margin((p - reference) / lengths) - 1 / (2 * 0.3)) ** 2,
        "sft": lambda p: -(p / lengths)[:, 0],
    }[name]
    given = lambda p: of(name, beta=0.3)(p, reference, lengths, torch.ones(50))  # noqa: E731
    found = []
    for loss in (plain, given):
        leaf = policy.clone().requires_grad_()
        value = loss(leaf)
        value.sum().backward()
        found.append((value, leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_ipo_with_a_probability_is_the_mean_over_labels_but_for_a_constant():
    policy = POLICY.clone().requires_grad_()
    ratios, likely = (policy - REFERENCE) / LENGTHS, 0.8
    mean = likely * losses.ipo(ratios, 0.5) + (1 - likely) * losses.ipo(ratios.flip(1), 0.5)
    (expected,) = torch.autograd.grad(mean.sum(), policy, retain_graph=True)
    (found,) = torch.autograd.grad(losses.ipo(ratios, 0.5, torch.tensor([likely])).sum(), policy)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_robust_is_unbiased():
    """Its mean over labels flipped with probability eps is the clean loss (arXiv:2403.00409, eq. 11)."""
    eps, gap = 0.2, torch.tensor([2.0], dtype=torch.float64)
    noisy = (1 - eps) * losses.robust(gap, eps) + eps * losses.robust(-gap, eps)
    assert noisy.item() == pytest.approx(losses.sigmoid(gap).item(), rel=1e-12)


@pytest.mark.parametrize("name", OVER_ALL_PAIRS)
def test_aot_compares_ranks_by_hand(name):
    """Three pairs. AOT: the policy's margins (1, 9, 4) are of rank 1, 3, 2, so they meet the reference's (2, 3, 7) as
    2, 7, 3. Unpaired: the chosen answers' rewards (3, 1, 2) meet the rejected ones' (0, 5, 4) as 5, 0, 4."""
    if name == "aot":
        policy = torch.tensor([[1.0, 0.0], [9.0, 0.0], [4.0, 0.0]])
        reference = torch.tensor([[3.0, 0.0], [7.0, 0.0], [2.0, 0.0]])
        leads = (1 - 2, 9 - 7, 4 - 3)
    else:
        policy, reference = torch.tensor([[3.0, 0.0], [1.0, 5.0], [2.0, 4.0]]), torch.zeros(3, 2)
        leads = (3 - 5, 1 - 0, 2 - 4)
    found = of(name, beta=0.5)(policy, reference, torch.ones(3, 2))
    assert found.tolist() == pytest.approx([nll(0.5 * lead) for lead in leads])


def test_bco_subtracts_its_shift():
    found = losses.bco_pair(0.5 * RATIOS, shift=-0.5)
    assert found.item() == pytest.approx(nll(1.0) + nll(1.0))


def test_simpo_orpo_and_cdpo_equal_trl():
    """TRL's CPO and ORPO trainers, their loss methods called on the same log-probs. (CPO's sigmoid is DPO's without a
    reference; TRL's DPOTrainer has no label smoothing on it.)"""
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
    settings.loss_type, settings.label_smoothing, settings.beta = "sigmoid", 0.2, 0.3
    theirs = cpo.cpo_loss(settings, policy[:, 0], policy[:, 1])[0]
    ours = of("sigmoid", beta=0.3, label_smoothing=0.2)(policy, torch.zeros(6, 2), lengths)
    torch.testing.assert_close(ours, theirs)
    each = of("sigmoid", beta=0.3)(policy, torch.zeros(6, 2), lengths, torch.full((6,), 0.8))
    torch.testing.assert_close(each, theirs)


def test_orpo_of_a_certain_answer_is_finite():
    """Float32 log-probs of a confident model are exactly 0, whose odds are infinite."""
    policy = torch.tensor([[0.0, -20.0], [-1e-8, -3.0], [-2.0, 0.0]], requires_grad=True)
    loss = losses.orpo(policy, torch.tensor([[1, 4], [2, 3], [3, 2]]), lam=0.5)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert policy.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "settings"),
    [("discopop", {}), *(("sigmoid", {"divergence": name}) for name in ("forward_kl", "js", "alpha"))],
)
def test_far_from_the_reference_loss_and_gradient_are_finite(name, settings):
    policy = torch.tensor([[-2000.0, -1.0], [-1.0, -2000.0]], requires_grad=True)
    loss = of(name, **settings)(policy, torch.full((2, 2), -600.0), torch.ones(2, 2))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert policy.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("sft", "apo_down")])
def test_gradient_pushes_chosen_up_and_rejected_down(name):
    policy = POLICY.clone().requires_grad_()
    of(name)(policy, REFERENCE, LENGTHS).sum().backward()
    assert policy.grad[0, losses.CHOSEN] < 0 < policy.grad[0, losses.REJECTED]


def test_apo_down_pushes_both_down():
    policy = REFERENCE.clone().requires_grad_()
    of("apo_down")(policy, REFERENCE, LENGTHS).sum().backward()
    assert policy.grad[0, losses.CHOSEN] == pytest.approx(0, abs=1e-12)  # at the reference the two terms are even
    assert policy.grad[0, losses.REJECTED] > 0
    moved = (REFERENCE + torch.tensor([[1.0, -40.0]])).requires_grad_()
    of("apo_down")(moved, REFERENCE, LENGTHS).sum().backward()
    assert moved.grad[0, losses.CHOSEN] > 0


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "robust", "aot", "aot_unpaired"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_policy_equal_to_reference_gives_ln_2(name, divergence):
    loss = of(name, label_smoothing=0.0, divergence=divergence)(POLICY, POLICY, LENGTHS)
    assert loss.item() == pytest.approx(LN2, abs=1e-15)


@pytest.mark.parametrize("name", OF_EACH_PAIR)
def test_pairs_do_not_meet(name):
    """The loss of a pair is the same alone and in a batch, in any order."""
    torch.manual_seed(1)
    policy, reference, lengths = -torch.rand(5, 2) * 30 - 1, -torch.rand(5, 2) * 30 - 1, torch.randint(10, 30, (5, 2))
    together = of(name)(policy, reference, lengths)
    alone = torch.cat([of(name)(policy[i : i + 1], reference[i : i + 1], lengths[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone)
    backwards = of(name)(policy.flip(0), reference.flip(0), lengths.flip(0))
    torch.testing.assert_close(together, backwards.flip(0))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, [0.5, -1.5]) for name in ALL if name not in {*losses.PER_TOKEN, "sft"}),
        ("ipo", [0.1, -0.375]), ("sigmoid_norm", [0.1, -0.375]), ("simpo", [-1.0, -1.5]), ("orpo", [-1.0, -1.5]),
    ],
)  # fmt: skip
def test_the_reward_of_each_loss_by_hand(name, expected):
    reference = None if name in REFERENCE_FREE else REFERENCE
    swapped = None if reference is None else reference.flip(1)
    for loss in (of(name, beta=0.5), of({name: 1.0, "sft": 0.1}, beta=0.5), of(name, beta=0.5, length_penalty=0.3)):
        assert loss.rewards(POLICY, reference, LENGTHS).tolist() == [pytest.approx(expected)]
        found = loss.rewards(POLICY.flip(1), swapped, LENGTHS.flip(1))
        assert losses.margin(found).item() == pytest.approx(expected[1] - expected[0])


def test_the_reward_of_a_sum_takes_means_only_if_all_its_losses_do():
    sums, means = [pytest.approx([0.5, -1.5])], [pytest.approx([0.1, -0.375])]
    assert of({"ipo": 1.0, "sigmoid": 1.0}, beta=0.5).rewards(POLICY, REFERENCE, LENGTHS).tolist() == sums
    assert of({"ipo": 1.0, "sigmoid_norm": 1.0}, beta=0.5).rewards(POLICY, REFERENCE, LENGTHS).tolist() == means


@pytest.mark.parametrize("name", [name for name in OF_EACH_PAIR if name not in ("sppo_hard", "sft", "apo_down")])
def test_a_loss_is_a_function_of_its_rewards_alone(name):
    """Other answers, whose log-probs and lengths differ but whose rewards don't, have the same loss. A step down the
    loss raises the reward's margin. (ORPO adds the chosen answer's likelihood, which is the same here.)"""
    longer, loss = LENGTHS * 2, of(name)
    policy, reference = (t * 2 if name in losses.PER_TOKEN else t + 7.0 for t in (POLICY, REFERENCE))
    held = (lambda tensor: None) if name in REFERENCE_FREE else (lambda tensor: tensor)
    before = loss.rewards(POLICY, held(REFERENCE), LENGTHS)
    torch.testing.assert_close(loss.rewards(policy, held(reference), longer), before)
    torch.testing.assert_close(loss(policy, reference, longer), loss(POLICY, REFERENCE, LENGTHS))
    moved = POLICY.clone().requires_grad_()
    loss(moved, REFERENCE, LENGTHS).sum().backward()
    after = loss.rewards((POLICY - 0.1 * moved.grad), held(REFERENCE), LENGTHS)
    assert losses.margin(after) > losses.margin(before)


def test_a_tie_counts_a_half_and_a_probability_below_a_half_the_other_way_round():
    assert losses.shares(torch.tensor([2.0, 0.0, -0.1])).tolist() == [1.0, 0.5, 0.0]
    leads, likely = torch.tensor([2.0, 2.0, 2.0, -1.0, 0.0]), torch.tensor([0.9, 0.5, 0.2, 0.2, 0.2])
    assert losses.shares(leads, likely).tolist() == [1.0, 0.5, 0.0, 1.0, 0.5]


def test_bradley_terry_with_a_probability_by_hand():
    """Scores 3 and 1; a lead of 2."""
    scores, likely = torch.tensor([[3.0, 1.0]], dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    expected = 0.7 * nll(2) + 0.3 * nll(-2) + 0.01 * 16
    assert losses.bradley_terry(scores, likely, centering=0.01).item() == pytest.approx(expected)
    hard = losses.bradley_terry(scores, torch.ones(1, dtype=torch.float64), torch.tensor([0.5]))
    assert hard.item() == pytest.approx(nll(1.5))


def test_the_recipes_losses_are_all_there_and_no_others():
    """With a reference all names are known; without one, only the losses that need none."""
    assert set(losses.REFERENCE_FREE) == set(REFERENCE_FREE)
    for name in ALL:
        of(name)(POLICY, REFERENCE, LENGTHS)
        if name in REFERENCE_FREE:
            of(name)(POLICY, None, LENGTHS)
            continue
        with pytest.raises(ValueError, match=f"'{name}' without a reference"):
            of(name)(POLICY, None, LENGTHS)
        with pytest.raises(ValueError, match=f"'{name}' without a reference"):
            of(name).rewards(POLICY, None, LENGTHS)
    with pytest.raises(ValueError, match=r"there is no preference loss 'dpo'$"):
        of({"sft": 1.0, "dpo": 1.0})(POLICY, REFERENCE, LENGTHS)
