"""The figures of answers by hand, and each alarm on made-up histories: what it says, and exactly when it is raised."""

import math
from dataclasses import replace

import numpy as np
import pytest

from qalign.reports.alarms import EvalPoint, alarms, best_of_n_kl, best_point, distinct_n, repeated_lines

# With 101 answers and a standard deviation of 1, the difference of two judges has a standard error of sqrt(2 / 100),
# about 0.1414, three of which are 0.4243.
START = EvalPoint(
    step=0, answers=101, kl_nats=0.0, proxy=0.0, proxy_std=1.0, judge=0.0, judge_std=1.0, length=50.0, ended=0.9,
    distinct=0.9, repeated=0.05, entropy=1.5, clipped=0.0,
)  # fmt: skip
UNJUDGED = replace(START, judge=None, judge_std=None)


def history(judge, proxy=None, **others) -> list[EvalPoint]:
    """Points 10 steps apart; the proxy rises by 1 at each unless it is given."""
    proxy = range(len(judge)) if proxy is None else proxy
    return [
        replace(START, step=10 * at, judge=score, proxy=reward, kl_nats=2.0 * at, **others)
        for at, (score, reward) in enumerate(zip(judge, proxy, strict=True))
    ]


def then(first: EvalPoint = START, **changes) -> list[str]:
    """The alarms 10 steps after `first`."""
    return alarms([first, replace(first, step=10, **changes)], patience=3)


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["a b a b a"], 2, 2 / 4),
        (["a b a b a"], 1, 2 / 5),
        (["a b a b a"], 3, 2 / 3),
        (["a b a b a", "x y z"], 2, (0.5 + 1) / 2),  # over both texts at once it were 4 of 6
        (["a b", "a b", "a b"], 2, 1.0),  # alike, but none repeats itself
        (["a  b\na\tb"], 2, 2 / 3),
        (["a b a b a", "x", ""], 2, 0.5),
        (["x", ""], 2, 1.0),
        ([], 2, 1.0),
    ],
)
def test_distinct_by_hand(texts, n, expected):
    assert distinct_n(texts, n) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["Go.\nStop."], 0),
        (["Go\n\n  go \nStop"], 1 / 3),
        (["I am. I am. I am not."], 1 / 3),
        (["Why? Why? Oh! Why?"], 2 / 4),
        (["1. Rest.\n2. Rest.\n- Rest.\n* Eat."], 2 / 4),
        (["It is 3.14, not 3.14159."], 0),
        (["好。好。"], 1 / 2),
        (["if a {\n}\nif b {\n}\n---\n---"], 0),
        (["Yes.\nYes.", "A.\nB."], (1 / 2 + 0) / 2),
        (["Yes.", "Yes."], 0),
        (["Yes. Yes.", "", " \n"], 1 / 2),
        (["", "\n"], 0),
        ([], 0),
    ],
)
def test_repeated_lines_by_hand(texts, expected):
    assert repeated_lines(texts) == pytest.approx(expected)


def test_the_kl_of_best_of_n_by_hand_and_as_sampling_gives_it():
    """Without ties the rank of the best has the density n u^(n - 1) against a uniform one: Beta(n, 1)."""
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(2) == pytest.approx(0.193147181)
    assert best_of_n_kl(16) == pytest.approx(4 * 0.693147181 - 15 / 16)
    ranks = (np.arange(200_000) + 0.5) / 200_000
    for n in (2, 4, 16):
        density = n * ranks ** (n - 1)
        assert best_of_n_kl(n) == pytest.approx((density * np.log(density)).mean(), abs=1e-4)


def test_the_best_point_is_the_judges_or_without_one_the_rewards():
    points = history([0.1, 0.7, 0.7, 0.3])
    assert best_point(points).step == 10
    unjudged = [replace(point, judge=None, judge_std=None) for point in points]
    assert best_point(unjudged).step == 30
    assert best_point([points[0], unjudged[1], points[2]]).step == 20  # two scales are not compared


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"kl_nats": math.nan}, r"step 0: kl_nats is nan, .+; has the training diverged\?"),
        ({"judge": math.inf}, "judge is inf"), ({"proxy": None}, "proxy is None"), ({"answers": 0}, "answers is 0"),
        ({"judge": None}, "both judge and judge_std"), ({"judge_std": None}, "both judge and judge_std"),
    ],
)  # fmt: skip
def test_a_broken_point_is_refused(changes, found):
    with pytest.raises(ValueError, match=found):
        replace(START, **changes)


def test_a_judge_that_falls_while_the_reward_rises():
    (warning,) = alarms(history([0.5, 1.25, 1.0, 0.75], proxy=[0, 1, 3, 2]), patience=2)
    assert warning.startswith("the judge fell at 2 evaluations in a row, 1.25 → 0.75 (3.5 standard errors)")
    for part in ("reward rose, 1 → 2 ", "steps 10 → 30, KL 2.0 → 6.0 nats", "keep step 10", "raise kl_coefficient"):
        assert part in warning


@pytest.mark.parametrize(
    ("judge", "proxy", "patience", "raised"),
    [
        ([1, 0.8, 0.5], [0, 1, 2], 2, True),
        ([1, 0.8, 0.5], [0, 1, 2], 3, False),  # too soon
        ([1, 0.8, 0.7, 0.5], [0, 1, 2, 3], 3, True),
        ([1, 0.9, 0.8, 0.7, 0.6, 0.5], [0] * 5 + [1], 3, True),  # the last three alone: 0.3; the whole fall: 0.5
        ([1, 0.8, 0.58], [0, 1, 2], 2, False),  # 2.97 standard errors
        ([1, 0.8, 0.57], [0, 1, 2], 2, True),  # 3.04
        ([1, 0.8, 0.8, 0.5], [0, 1, 2, 3], 2, False),  # an interrupted fall
        ([0.5, 0.8, 1], [0, 1, 2], 2, False),
        ([1, 0.8, 0.5], [2, 1, 0], 2, False),  # the reward falls too: bad, but no gaming
        ([1, 0.8, 0.5], [1, 9, 1], 2, False),  # no rise over the span
        ([1, 0.8, 0.5], [0, -1, 1], 2, True),
        ([1, 0.8, 0.5, 0.6], [0, 1, 2, 3], 2, False),  # recovering, though still 2.8 below
        ([1, 0.4], [0, 1], 1, True),
        ([1], [0], 1, False),
        ([], [], 1, False),
    ],
)
def test_when_a_falling_judge_is_an_alarm(judge, proxy, patience, raised):
    assert len(alarms(history(judge, proxy), patience)) == raised


def test_a_judge_that_stays_below_its_best_needs_no_unbroken_fall():
    points = history([0, 1, 0.5, 0.52, 0.5, 0.52])
    assert not any(alarms(points[:count], patience=3) for count in range(5))
    (warning,) = alarms(points, patience=3)
    assert warning.startswith("the judge was below its best at 3 evaluations in a row, 1 → 0.52 (3.4 standard errors)")
    assert "steps 10 → 50" in warning
    assert "keep step 10" in warning
    assert not alarms([*points[:-1], replace(points[-1], judge=0.6)], patience=3)
    assert not alarms([*points[:-1], replace(points[-1], proxy=1.0)], patience=3)


def test_both_points_spreads_and_numbers_of_answers_count():
    before = replace(START, judge=1.0)
    after = replace(START, step=10, proxy=1.0, judge_std=2.0, answers=51)  # 1 / 100 + 4 / 50 is the square of 0.3
    assert alarms([before, replace(after, judge=0.09)], patience=1)
    assert not alarms([before, replace(after, judge=0.11)], patience=1)
    assert not alarms([before, replace(after, judge=-99.0, answers=1)], patience=1)  # one answer shows no spread
    # Without any spread there is no noise.
    assert alarms(history([1.0, 0.999, 0.998], judge_std=0.0), patience=2)
    assert not alarms(history([1.0, 1.0, 1.0], judge_std=0.0), patience=1)


@pytest.mark.parametrize(
    ("first", "changes", "raised"),
    [
        (START, {"length": 120.0, "judge": 0.1}, ["50 → 120 tokens", "the judge hardly rose, 0 → 0.1", "penalise"]),
        (START, {"length": 120.0, "judge": -0.1}, ["the judge fell, 0 → -0.1"]),
        (START, {"length": 120.0, "judge": 0.15}, None),  # over 0.1414
        (START, {"length": 100.0}, None),
        (START, {"length": 100.1}, ["length"]),
        (START, {"length": 25.0}, None),
        (replace(START, length=10.0), {"length": 25.9}, None),  # short answers may double
        (replace(START, length=10.0), {"length": 26.0}, ["length"]),
        (replace(START, length=0.0), {"length": 30.0}, ["length"]),
        (replace(START, answers=8), {"length": 224.0}, None),  # exp(3 sqrt(1/8 + 1/8)) is 4.4817
        (replace(START, answers=8), {"length": 224.2}, ["length"]),
        (UNJUDGED, {"length": 120.0, "proxy": 0.5}, ["50 → 120 tokens", "rose, 0 → 0.5, and there is no judge"]),
        (UNJUDGED, {"length": 120.0, "proxy": -0.5}, None),
        (START, {"repeated": 0.3, "distinct": 0.7}, ["5% → 30% of their lines", "distinct-2 0.90 → 0.70", "rejected"]),
        (START, {"repeated": 0.24}, None),
        (START, {"repeated": 0.26}, ["repeat"]),
        (START, {"distinct": 0.46}, None),
        (START, {"distinct": 0.44}, ["repeat"]),
        (START, {"ended": 0.4, "length": 90.0}, ["90% → 40% did", "mean length 50 → 90 tokens", "kl_coefficient"]),
        (START, {"ended": 0.46}, None),
        (START, {"ended": 0.44}, ["no longer end"]),
        (replace(START, ended=0.5), {"ended": 0.0}, None),  # few ended before
        (replace(START, spread=0.5), {"spread": 1.01}, ["disagree more, 0.50 → 1.01", "set reward_combine: min"]),
        (replace(START, spread=0.5), {"spread": 1.0}, None),
        (replace(START, spread=0.5, answers=8), {"spread": 2.2}, None),  # by chance: exp(3 / 2) times 0.5 is 2.24
        (replace(START, spread=0.5, answers=8), {"spread": 2.3}, ["members of the reward"]),
        # 6 of 8, then 2: the standard error is sqrt(1/2 1/2 2/8) = 0.25, the fall two of it; 8, then 0: four.
        (replace(START, answers=8, ended=0.75), {"ended": 0.25}, None),
        (replace(START, answers=8, ended=1.0), {"ended": 0.0}, ["no longer end"]),
    ],
)
def test_when_long_repeating_or_unending_answers_are_an_alarm(first, changes, raised):
    found = then(first, **changes)
    assert len(found) == (raised is not None)
    for part in raised or ():
        assert part in found[0]


def test_every_alarm_is_one_line_and_compares_with_the_start():
    points = history([3, 2, 1, 0])
    points[2] = replace(points[2], length=299.0, repeated=0.59, ended=0.11)
    points[3] = replace(points[3], length=300.0, repeated=0.6, ended=0.1)
    found = alarms(points, patience=3)
    assert [line.split()[1] for line in found] == ["judge", "grew", "repeat", "no"]
    assert not any("\n" in line for line in found)
    for line, change in zip(found, ("3 → 0", "50 → 300", "5% → 60%", "90% → 10%"), strict=True):
        assert change in line
    assert not alarms([*points, replace(points[0], step=40)], patience=3)  # all is well again
    unjudged = [replace(point, judge=None, judge_std=None) for point in history([3, 2, 1, 0])]
    assert not alarms(unjudged, patience=3)  # without a judge, nothing is said of it
