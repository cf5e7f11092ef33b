"""Each figure of the report against values worked out by hand, and what it says of models whose worth is known."""

import json
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from qalign.reports.reward_report import (
    ScoredPair,
    measure,
    members,
    members_in_words,
    quantile_groups,
    sign_test,
    spearman,
    warning,
    wilson,
)


def pair(chosen: float, rejected: float, tokens: tuple[int, int] = (10, 10), margin: float | None = None) -> ScoredPair:
    return ScoredPair(chosen, rejected, *tokens, margin)


def judged(right: int, wrong: int) -> np.ndarray:
    return np.repeat([1.0, 0.0], [right, wrong])


def simulated(count: int, *, skill: float = 0.0, by_length: float = 0.0, longer_is_better: float = 0.6, seed: int = 0):
    """Pairs of raters who prefer the longer answer with the probability given, whatever their margin.

    The model's score is `skill` times what the raters saw, plus `by_length` times the log of the length, plus noise.
    """
    random = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        short, long = np.sort(random.choice(np.arange(5, 600), 2, replace=False)).tolist()
        tokens = (long, short) if random.random() < longer_is_better else (short, long)
        margin = random.choice([0.5, 1.0, 1.5, 2.0, 3.0]).item()
        scores = random.normal(0, 1, 2) + [skill * margin, 0] + by_length * np.log(tokens)
        pairs.append(pair(*scores.tolist(), tokens, margin))
    return pairs


# Four pairs: right, wrong, a tie, right; longer is better twice, once not, and once there is no longer one.
FOUR = [
    pair(2.0, 1.0, (30, 20), 1.0),
    pair(0.0, 3.0, (40, 10), 2.0),
    pair(1.0, 1.0, (10, 20), 1.0),
    pair(5.0, 1.0, (20, 20), 4.0),
]


def test_four_pairs_by_hand():
    figures = measure(FOUR)
    assert figures["pairs"] == 4
    assert figures["accuracy"] == 2.5 / 4
    assert (figures["length_accuracy"], figures["short_accuracy"]) == (2.5 / 4, 1.5 / 4)
    assert figures["length_judge"] == {"picks": "longer", "accuracy": 2.5 / 4}
    # The model does better on the third (half a point for none) and the fourth, the length judge on the second.
    assert figures["discordant"] == {"model": 2, "length_judge": 1}
    assert figures["beats_length_judge_p"] == pytest.approx((3 + 1) / 8)
    assert figures["agreement_with_length_judge"] == (1 + 0 + 0.5 + 0.5) / 4
    misled = figures["accuracy_where_length_misleads"]
    assert (misled["pairs"], misled["accuracy"]) == (1, 0.5)
    assert figures["mean_log_loss"] == pytest.approx((0.313261688 + 3.048587352 + 0.693147181 + 0.018149928) / 4)
    assert figures["score_mean"] == 14 / 8
    assert len(figures["score_quantiles"]) == 21
    assert figures["score_quantiles"][::5] == [0, 1, 1, 2 + 0.25 * (3 - 2), 5]  # of 0, 1, 1, 1, 1, 2, 3, 5
    assert figures["score_std"] == pytest.approx(math.sqrt((4 + 1 + 0 + 9 + 1 + 1 + 25 + 1) / 8 - (14 / 8) ** 2))
    assert figures["margin_source"] == "raters"
    assert [(group["from"], group["to"], group["pairs"], group["accuracy"]) for group in figures["by_margin"]] == [
        (1, 1, 2, 0.75), (2, 2, 1, 0), (4, 4, 1, 1),
    ]  # fmt: skip
    predicted = [0.5, 0.731058579, 0.952574127, 0.982013790]  # sigmoid of 0, 1, 3 and 4
    observed = [0.5, 1, 0, 1]
    assert [group["predicted"] for group in figures["calibration"]] == pytest.approx(predicted)
    assert [group["observed"] for group in figures["calibration"]] == observed
    assert figures["calibration_error"] == pytest.approx((0 + 0.268941421 + 0.952574127 + 0.017986210) / 4)


@pytest.mark.parametrize(
    ("right", "pairs", "low", "high"),  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published_and_as_scipy_has_it(right, pairs, low, high):
    expected = binomtest(right, pairs).proportion_ci(method="wilson")
    assert wilson(right / pairs, pairs) == pytest.approx([expected.low, expected.high], abs=1e-12)
    assert wilson(right / pairs, pairs) == pytest.approx([low, high], abs=5e-5)
    assert wilson(1 - right / pairs, pairs) == pytest.approx([1 - high, 1 - low], abs=5e-5)


@pytest.mark.parametrize("pairs", [1, 2, 7, 59, 1000])
def test_wilson_stays_within_0_and_1(pairs):
    assert wilson(1.0, pairs)[1] == 1
    assert wilson(0.0, pairs)[0] == 0


def test_wilson_counts_a_half_point_as_half_a_success():
    points = np.array([1.0, 0.5, 0.5, 0.0, 1.0, 1.0, 0.5])
    low, high = wilson(points.mean(), 7)
    for end in (low, high):
        assert (end - points.mean()) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / 7, rel=1e-12)


def test_sign_test_by_hand():
    assert sign_test(8, 2) == pytest.approx((45 + 10 + 1) / 1024)
    assert sign_test(2, 8) == pytest.approx((1024 - 1 - 10) / 1024)
    assert sign_test(5, 0) == pytest.approx(1 / 32)
    assert sign_test(0, 0) == sign_test(0, 3) == 1
    exact = sum(math.comb(3000, k) for k in range(1560, 3001)) / 2**3000
    assert sign_test(1560, 1440) == pytest.approx(exact, rel=1e-9)


def test_spearman_by_hand():
    # Ranks 1, 2.5, 2.5, 4 and 1, 4, 2.5, 2.5: covariance 2.25, both variances 4.5.
    assert spearman(np.array([1.0, 2, 2, 3]), np.array([10.0, 30, 20, 20])) == pytest.approx(0.5)
    assert spearman(np.array([1.0, 5, 2]), np.array([10.0, 900, 11])) == 1
    assert spearman(np.array([1.0, 5, 2]), np.array([-1.0, -5, -2])) == -1
    assert spearman(np.array([1.0, 5, 2]), np.array([7.0, 7, 7])) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3, 1, 2, 4], [[1], [2], [3], [4]]),
        ([8, 7, 6, 5, 4, 3, 2, 1], [[1, 2], [3, 4], [5, 6], [7, 8]]),
        ([1, 2, 2, 2, 2], [[1], [2, 2, 2, 2]]),
        ([1, 1, 1, 1, 2], [[1, 1, 1, 1], [2]]),
        ([5, 5, 5, 5, 5, 5], [[5, 5, 5, 5, 5, 5]]),
        ([2, 1], [[1], [2]]),
        ([1], [[1]]),
    ],
)
def test_groups_are_about_equal_and_never_part_equal_values(values, expected):
    values = np.array(values, dtype=float)
    assert [values[rows].tolist() for rows in quantile_groups(values, 4)] == expected


def test_margins_equal_but_for_rounding_share_a_bucket():
    figures = measure([pair(1, 0, margin=0.3), pair(0, 1, margin=4.5 - 4.2)])
    assert [(group["from"], group["to"], group["pairs"]) for group in figures["by_margin"]] == [(0.3, 0.3, 2)]


def test_without_every_raters_margin_the_model_gives_it():
    figures = measure([pair(1, 0, margin=2.0), pair(0, 3)])
    assert figures["margin_source"] == "model"
    assert [(group["from"], group["accuracy"]) for group in figures["by_margin"]] == [(1, 1), (3, 0)]


def test_swapping_the_answers_mirrors_the_accuracy():
    pairs = [*FOUR, *simulated(50, skill=0.5, longer_is_better=0.8)]
    swapped = [ScoredPair(p.rejected, p.chosen, p.rejected_tokens, p.chosen_tokens, -p.margin) for p in pairs]
    before, after = measure(pairs), measure(swapped)
    assert before["accuracy"] + after["accuracy"] == pytest.approx(1)
    assert after["accuracy_interval"] == pytest.approx([1 - end for end in reversed(before["accuracy_interval"])])
    assert (before["length_judge"]["picks"], after["length_judge"]["picks"]) == ("longer", "shorter")
    assert before["length_judge"]["accuracy"] == pytest.approx(after["length_judge"]["accuracy"])
    for name in ("length_correlation", "score_mean", "score_std"):
        assert before[name] == pytest.approx(after[name])
    for was, now in zip(before["by_margin"], after["by_margin"], strict=True):
        assert (was["from"], was["pairs"]) == (now["from"], now["pairs"])
        assert was["accuracy"] + now["accuracy"] == pytest.approx(1)


def calibrated(count: int, stretch: float) -> list[ScoredPair]:
    """Labels drawn with the probability that Bradley and Terry give the scores, which are then stretched."""
    random = np.random.default_rng(3)
    gaps = random.normal(0, 2, count)
    signs = np.where(random.random(count) < 1 / (1 + np.exp(-gaps)), 1, -1)
    return [pair(stretch * gap * sign, 0.0) for gap, sign in zip(gaps.tolist(), signs.tolist(), strict=True)]


def test_calibration_of_models_known_to_be_calibrated_or_not():
    good, too_sure, unsure = (measure(calibrated(20_000, stretch)) for stretch in (1.0, 3.0, 0.2))
    assert good["calibration_error"] < 0.01
    assert good["calibration_error_by_chance"] < 0.01
    for group in good["calibration"]:
        assert group["pairs"] == 4000
        assert group["observed"] == pytest.approx(group["predicted"], abs=0.03)
    assert too_sure["calibration_error"] > 0.1 < unsure["calibration_error"]
    assert too_sure["mean_log_loss"] > good["mean_log_loss"] < unsure["mean_log_loss"]


def test_calibration_error_by_chance_is_what_calibrated_models_show():
    pairs = calibrated(20_000, 1.0)
    figures = [measure(pairs[start : start + 200]) for start in range(0, len(pairs), 200)]
    shown, expected = (
        np.mean([each[name] for each in figures]) for name in ("calibration_error", "calibration_error_by_chance")
    )
    assert shown == pytest.approx(expected, rel=0.1)


def test_a_model_that_scores_by_length_is_warned_about():
    figures = measure(simulated(400, by_length=10.0, longer_is_better=0.7))
    assert figures["length_correlation"] > 0.9
    assert figures["agreement_with_length_judge"] > 0.9
    assert figures["accuracy_where_length_misleads"]["accuracy"] < 0.2
    said = warning(figures)
    assert f"right on {figures['accuracy']:.1%} of 400 held-out pairs" in said
    assert f"always picking the longer answer on {figures['length_judge']['accuracy']:.1%}" in said
    assert "beat the length judge:" in said or "beats the length judge:" in said
    assert "\n" not in said


# Which of model and length judge is right.
BOTH, ONLY_LENGTH, ONLY_MODEL, NEITHER = (
    [pair(chosen, 1 - chosen, tokens)] for tokens in ((20, 10), (10, 20)) for chosen in (1, 0)
)


def test_leads_over_the_length_judge_that_are_no_chance_are_seen():
    good = measure(simulated(400, skill=1.0))
    assert good["accuracy_interval"][0] > good["length_interval"][1]
    assert warning(good) is None
    # Right wherever the length judge is, and on 8 of 100 pairs besides: the intervals overlap, the test is sure.
    paired = measure([*BOTH * 70, *ONLY_MODEL * 8, *NEITHER * 22])
    assert paired["accuracy_interval"][0] < paired["length_interval"][1]
    assert paired["beats_length_judge_p"] == pytest.approx(1 / 256)
    assert warning(paired) is None


def test_half_points_make_no_lead():
    """More small wins, over no choice, than full losses: the test counts wins, but the accuracies are equal."""
    figures = measure([pair(1, 0)] * 70 + [pair(0, 1)] * 30 + ONLY_LENGTH * 20)
    assert figures["accuracy"] == figures["length_judge"]["accuracy"] == 70 / 120
    assert figures["beats_length_judge_p"] < 0.05
    assert "does not beat a coin or the length judge" in warning(figures)


@pytest.mark.parametrize(
    ("pairs", "verdict", "parts", "more_pairs"),
    [
        (simulated(400, by_length=-5.0, longer_is_better=0.3), "", ["always picking the shorter answer"], None),
        # 4 to 0 discordant pairs: 1/16; 0 to 5 the other way: 1/32, so the length judge's lead is sure.
        (BOTH * 70 + ONLY_MODEL * 4 + NEITHER * 26, "hardly beats the length judge: right on 74.0% of 100",
         ["on 70.0% (p = 0.062)"], True),
        (BOTH * 70 + ONLY_LENGTH * 5 + NEITHER * 25, "does not beat the length judge: right on 70.0%",
         ["(p = 1), a coin on 50%", "more varied pairs"], False),
        ([pair(1, 0)] * 54 + [pair(0, 1)] * 46, "hardly beats a coin or the length judge: right on 54.0%", [], True),
        ([pair(0, 1)] * 30, "does not beat a coin", ["check that chosen and rejected are not swapped"], False),
    ],
    ids=["shorter", "by chance", "length judge leads", "coin", "swapped"],
)  # fmt: skip
def test_what_the_warning_says(pairs, verdict, parts, more_pairs):
    said = warning(measure(pairs))
    assert said.startswith(f"the reward model {verdict}")
    for part in parts:
        assert part in said
    if more_pairs is not None:
        assert ("more held-out pairs" in said) == more_pairs


def test_equal_scores_are_a_coin():
    figures = measure([pair(0.5, 0.5, (9, 3))] * 6)
    assert figures["accuracy"] == 0.5
    assert figures["mean_log_loss"] == pytest.approx(math.log(2))
    assert figures["calibration_error"] == 0
    assert figures["length_correlation"] is None
    assert figures["accuracy_where_length_misleads"] is None
    assert warning(figures).startswith("the reward model does not beat a coin or the length judge")


def test_figures_are_json():
    for pairs in (FOUR, FOUR[:1], simulated(30)):
        figures = measure(pairs)
        assert json.loads(json.dumps(figures, allow_nan=False)) == figures


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_scores_must_be_finite(broken):
    for name, bad in {
        "chosen": pair(broken, 0),
        "rejected": pair(0, broken),
        "margin": pair(1, 0, margin=broken),
    }.items():
        with pytest.raises(ValueError, match=rf"^pair 2 of 2: {name} is {broken}, expected a finite number; .+$"):
            measure([FOUR[0], bad])


def test_where_the_members_of_an_ensemble_disagree():
    gaps = [[1.0, 2.0, 3.0], [1.0, -4.0, 1.0], [-1.0, -1.0, -1.0], [2.0, 2.0, 0.0]]
    found = members(gaps, ["a:1", "a:2", "a:3", "a:4"])
    assert found["accuracy"] == [3 / 4, 2 / 4, (1 + 1 + 0 + 0.5) / 4]
    assert found["disagreement"] == 2 / 4
    assert found["spread"] == pytest.approx((math.sqrt(2 / 3) + math.sqrt(50 / 9) + 0 + math.sqrt(8 / 9)) / 4)
    agreed = [(group["agree"], group["pairs"], group["accuracy"]) for group in found["by_agreement"]]
    assert agreed == [(2, 2, 0.5), (3, 2, 0.5)]  # by the mean: -2/3 is wrong, 4/3 right; 2 right, -1 wrong
    assert [pair["where"] for pair in found["most_disputed"]] == ["a:2", "a:4", "a:1", "a:3"]
    assert json.loads(json.dumps(found)) == found
    lines = members_in_words(found)
    assert lines["members"] == "75.0%, 50.0%, 62.5% alone; they disagree on 50.0% of the pairs"
    assert lines["most disputed"] == "a:2, a:4, a:1"
