import gzip
import json

import numpy as np
import pytest

from qalign.judge.logistic import fit, sigmoid
from qalign.judge.win_rate import design, win_rate
from tests.judge import alpaca_eval_package

RECORDED = json.loads(alpaca_eval_package.FIGURES.read_text())


@pytest.mark.parametrize("name", RECORDED)
def test_figures_are_those_that_alpaca_eval_gave(name):
    kept = RECORDED[name]

    found = win_rate(kept["preferences"], kept["a"], kept["b"])

    expected = kept["expected"]
    assert found.rate == pytest.approx(expected["win_rate"], abs=1e-9)
    assert found.controlled == pytest.approx(expected["controlled"], abs=1e-3)
    assert (found.wins, found.ties, found.losses) == (expected["wins"], expected["ties"], expected["losses"])


@pytest.mark.slow
def test_figures_are_those_of_the_installed_alpaca_eval(tmp_path):
    alpaca_eval_package.run("figures", tmp_path / "figures.json")

    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures.keys() == RECORDED.keys()
    for name, kept in figures.items():
        found = win_rate(kept["preferences"], kept["a"], kept["b"])
        assert found.controlled == pytest.approx(kept["expected"]["controlled"], abs=1e-3), name


def test_a_judge_that_sees_only_length_is_near_a_half_once_controlled(shared_data):
    with gzip.open(shared_data / "alpaca_eval_prefs.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    a, b = (np.array([len(row[side][-1]["content"]) for row in rows]) for side in ("chosen", "rejected"))

    found = win_rate(a > b, a, b)

    assert found.rate == pytest.approx(419 / 605)
    assert found.controlled == pytest.approx(0.49967, abs=1e-3)  # what alpaca_eval 0.6.6 gives
    assert found.controlled_interval[0] < 0.5 < found.controlled_interval[1]
    assert found.follows_length


def test_a_penalised_fit_is_where_its_derivative_is_the_penalty():
    # One constant input, 3 wins of 4, C = 2: 2 · 4 · (σ(θ) − 3/4) = −1, so σ(θ) = 5/8.
    (theta,) = fit(np.ones((4, 1)), np.array([1.0, 1, 1, 0]), np.ones(4), 2.0, 0)

    assert sigmoid(theta) == pytest.approx(5 / 8, abs=1e-4)


def test_a_fit_takes_weights_as_so_many_rows():
    draw = np.random.default_rng(0)
    x, p = design(draw.integers(1, 90, 12), draw.integers(1, 90, 12)), draw.random(12)
    twice = np.array([2.0, 1, 1, 0, 1, 1, 3, 1, 1, 0, 1, 1])
    rows = np.repeat(np.arange(12), twice.astype(int))

    assert fit(x, p, twice, 20.0, 0) == pytest.approx(fit(x[rows], p[rows], np.ones(len(rows)), 20.0, 0), abs=1e-3)


def test_without_a_difference_in_length_control_changes_little():
    won = np.array([1.0] * 60 + [0.0] * 40)[np.random.default_rng(0).permutation(100)]

    found = win_rate(won, [50] * 100, [50] * 100)

    assert found.rate == 0.6
    assert found.controlled == pytest.approx(0.6, abs=0.02)
    assert found.length_weight == 0


def test_sides_that_change_places_have_the_opposite_rate():
    kept = RECORDED["many, ties"]
    p, a, b = (np.array(kept[name]) for name in ("preferences", "a", "b"))

    one, other = win_rate(p, a, b), win_rate(1 - p, b, a)

    assert one.rate + other.rate == pytest.approx(1)
    assert one.controlled + other.controlled == pytest.approx(1, abs=1e-3)
    assert one.length_weight == pytest.approx(other.length_weight, abs=1e-2)


def test_the_interval_is_two_standard_errors_wide_on_each_side():
    won = np.arange(100) < 60

    low, high = win_rate(won, [50] * 100, [50] * 100).interval

    assert low < 0.6 < high
    assert high - low == pytest.approx(2 * 1.96 * (0.6 * 0.4 / 100) ** 0.5, rel=0.1)


@pytest.mark.parametrize(("count", "low"), [(1, 0.207), (4, 0.510), (40, 0.912)])
def test_judgements_that_are_all_alike_are_no_certainty(count, low):
    """Every resample is the same; Wilson's interval of n of n is [n / (n + 1.96²), 1]."""
    found = win_rate([1.0] * count, [5] * count, [9] * count)

    assert found.rate == 1
    assert found.interval == pytest.approx((low, 1), abs=1e-3)
    assert count == 1 or found.controlled_interval == found.interval


def test_judgements_of_one_prompt_are_resampled_together():
    p = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0] * 5
    alone, together = (win_rate(p, p, p, names) for names in (None, [place // 4 for place in range(40)]))

    assert alone.rate == together.rate == 0.5
    assert together.prompts == 10
    width, wider = (high - low for low, high in (alone.interval, together.interval))
    assert wider == pytest.approx(2 * width, rel=0.25)  # a standard error of 0.5 / √10 instead of 0.5 / √40


def test_a_judgement_that_is_missing_is_left_out():
    found = win_rate([1.0, np.nan, 0.0, 0.5], [1, 2, 3, 4], [4, 3, 2, 2])

    assert (found.wins, found.ties, found.losses, found.prompts) == (1, 1, 1, 3)


def test_one_prompt_has_no_controlled_rate():
    found = win_rate([1.0], [3], [4])

    assert (found.rate, found.controlled, found.controlled_interval) == (1.0, None, None)


@pytest.mark.parametrize("wrong", [[], [np.nan], [1.2], [-0.1, 0.5]])
def test_what_is_no_preference_is_refused(wrong):
    with pytest.raises(ValueError, match="from 0 to 1"):
        win_rate(wrong, [1] * len(wrong), [1] * len(wrong))
