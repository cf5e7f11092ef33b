"""The figures of answers by hand; each alarm on planted histories, and how seldom it sounds on healthy ones."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest

from qalign.reports import alarms as watch
from qalign.reports.alarms import EvalPoint, alarms, best_look, best_of_n_kl, distinct_n, repeated_lines

# 101 answers and a standard deviation of 1: the difference of two judges has a standard error of sqrt(2 / 100), about
# 0.1414, three of which are 0.4243.
START = EvalPoint(
    step=0, answers=101, kl_nats=0.0, proxy=0.0, proxy_std=1.0, judge=0.0, judge_std=1.0, length=50.0, ended=0.9,
    distinct=0.9, repeated=0.05, entropy=1.5, clipped=0.0,
)  # fmt: skip


def history(judge, proxy=None, **others) -> list[EvalPoint]:
    """Looks 10 steps apart; the proxy rises by 1 at each unless it is given."""
    proxy = range(len(judge)) if proxy is None else proxy
    return [
        replace(START, step=10 * at, judge=score, proxy=reward, kl_nats=2.0 * at, **others)
        for at, (score, reward) in enumerate(zip(judge, proxy, strict=True))
    ]


def then(**changes) -> list[str]:
    return alarms([START, replace(START, step=10, **changes)], patience=3)


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
        (["Yes."], 0),
        (["Yes.", "Yes."], 0),
        (["Yes. Yes.", "", " \n"], 1 / 2),
        (["", "\n"], 0),
        ([], 0),
    ],
)
def test_repeated_lines_by_hand(texts, expected):
    assert repeated_lines(texts) == pytest.approx(expected)


def test_a_text_that_loops_longer_scores_worse():
    for loops in range(1, 20):
        fewer, more = (["Drink more water. " * times] for times in (loops, loops + 1))
        assert distinct_n(more) < distinct_n(fewer)
        assert repeated_lines(more) > repeated_lines(fewer) == pytest.approx(1 - 1 / loops)


def test_kl_of_the_best_of_n_by_hand():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(2) == pytest.approx(0.193147181)
    assert best_of_n_kl(16) == pytest.approx(4 * 0.693147181 - 15 / 16)
    with pytest.raises(ValueError, match="the best of 0 samples"):
        best_of_n_kl(0)


def test_the_kl_of_the_best_of_n_is_what_sampling_gives():
    """Without ties the best's rank is Beta(n, 1), of density n u^(n - 1), against a uniform one."""
    ranks = (np.arange(200_000) + 0.5) / 200_000
    for n in (2, 4, 16):
        density = n * ranks ** (n - 1)
        assert best_of_n_kl(n) == pytest.approx((density * np.log(density)).mean(), abs=1e-4)


def test_the_best_look():
    looks = history([0.1, 0.7, 0.7, 0.3])
    assert best_look(looks).step == 10
    unjudged = [replace(look, judge=None, judge_std=None) for look in looks]
    assert best_look(unjudged).step == 30
    assert best_look([looks[0], unjudged[1], looks[2]]).step == 20  # two scales are not compared
    with pytest.raises(ValueError, match="there are no looks"):
        best_look([])


def test_a_look_survives_json():
    for look in (START, replace(START, judge=None, judge_std=None)):
        assert EvalPoint(**json.loads(json.dumps(asdict(look)))) == look


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kl_nats": math.nan}, r"step 0: kl_nats is nan, not a finite number; has the training diverged\?"),
        ({"judge": math.inf}, "judge is inf"), ({"proxy": None}, "proxy is None"), ({"answers": 0}, "answers is 0"),
        ({"judge": None}, "judge and judge_std both"), ({"judge_std": None}, "judge and judge_std both"),
    ],
)  # fmt: skip
def test_a_broken_look_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        replace(START, **changes)


def test_a_judge_that_falls_while_the_reward_rises():
    (said,) = alarms(history([0.5, 1.25, 1.0, 0.75], proxy=[0, 1, 3, 2]), patience=2)
    assert said == (
        "the judge fell at 2 looks in a row, 1.25 → 0.75 (3.5 standard errors), while the reward rose, 1 → 2 "
        "(steps 10 → 30, KL 2.0 → 6.0 nats): the policy is gaming its reward; keep step 10, and raise "
        "ppo.kl_coefficient, train for fewer steps, or train a better reward model"
    )


@pytest.mark.parametrize(
    ("judge", "proxy", "patience", "sounds"),
    [
        ([1, 0.8, 0.5], [0, 1, 2], 2, True),
        ([1, 0.8, 0.5], [0, 1, 2], 3, False),  # too soon
        ([1, 0.8, 0.7, 0.5], [0, 1, 2, 3], 3, True),
        ([1, 0.9, 0.8, 0.7, 0.6, 0.5], [0] * 5 + [1], 3, True),  # the last three alone: 0.3; the whole fall: 0.5
        ([1, 0.8, 0.58], [0, 1, 2], 2, False),  # 2.97 standard errors
        ([1, 0.8, 0.57], [0, 1, 2], 2, True),  # 3.04
        ([1, 0.8, 0.8, 0.5], [0, 1, 2, 3], 2, False),  # it did not fall at each
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
def test_when_a_falling_judge_is_an_alarm(judge, proxy, patience, sounds):
    assert len(alarms(history(judge, proxy), patience)) == sounds


def test_a_judge_that_stays_below_its_best_needs_no_unbroken_fall():
    looks = history([0, 1, 0.5, 0.52, 0.5, 0.52])
    assert not any(alarms(looks[:count], patience=3) for count in range(5))
    (said,) = alarms(looks, patience=3)
    assert said.startswith("the judge was below its best at 3 looks in a row, 1 → 0.52 (3.4 standard errors)")
    assert "steps 10 → 50" in said
    assert "keep step 10" in said
    assert not alarms([*looks[:-1], replace(looks[-1], judge=0.6)], patience=3)
    assert not alarms([*looks[:-1], replace(looks[-1], proxy=1.0)], patience=3)


def test_both_looks_spread_and_their_answers_count():
    before = replace(START, judge=1.0)
    after = replace(START, step=10, proxy=1.0, judge_std=2.0, answers=51)  # 1 / 100 + 4 / 50 is the square of 0.3
    assert alarms([before, replace(after, judge=0.09)], patience=1)
    assert not alarms([before, replace(after, judge=0.11)], patience=1)
    assert not alarms([before, replace(after, judge=-99.0, answers=1)], patience=1)  # one answer shows no spread
    # Without any spread there is no noise.
    assert alarms(history([1.0, 0.999, 0.998], judge_std=0.0), patience=2)
    assert not alarms(history([1.0, 1.0, 1.0], judge_std=0.0), patience=1)


def test_without_a_judge_nothing_is_said_of_it():
    looks = history([3, 2, 1, 0])
    assert alarms(looks, patience=3)
    assert not alarms([replace(look, judge=None, judge_std=None) for look in looks], patience=3)


def test_answers_that_grow_long():
    (said,) = then(length=120.0, judge=0.1)
    assert said == (
        "answers grew long, 50 → 120 tokens (steps 0 → 10), and the judge hardly rose, 0 → 0.1: length is no gain "
        "here; penalise length, raise ppo.kl_coefficient, or train the reward model on pairs of like length"
    )
    assert "the judge fell, 0 → -0.1" in then(length=120.0, judge=-0.1)[0]
    assert not then(length=120.0, judge=0.15)  # over 0.1414
    assert not then(length=100.0)
    assert then(length=100.1)
    assert not then(length=25.0)


def test_short_answers_may_double_and_few_answers_by_luck():
    short = replace(START, length=10.0)
    assert not alarms([short, replace(short, step=10, length=25.9)], patience=3)
    assert alarms([short, replace(short, step=10, length=26.0)], patience=3)
    empty = replace(START, length=0.0)
    assert alarms([empty, replace(empty, step=10, length=30.0)], patience=3)
    few = replace(START, answers=8)  # exp(3 sqrt(1/8 + 1/8)) is 4.4817
    assert not alarms([few, replace(few, step=10, length=224.0)], patience=3)
    assert alarms([few, replace(few, step=10, length=224.2)], patience=3)


def test_without_a_judge_a_rising_reward_is_no_excuse_for_length():
    unjudged = replace(START, judge=None, judge_std=None)
    (said,) = alarms([unjudged, replace(unjudged, step=10, length=120.0, proxy=0.5)], patience=3)
    assert "50 → 120 tokens" in said
    assert "while the reward rose, 0 → 0.5, and there is no judge" in said
    assert not alarms([unjudged, replace(unjudged, step=10, length=120.0, proxy=-0.5)], patience=3)


def test_answers_that_repeat_themselves():
    (said,) = then(repeated=0.3, distinct=0.7)
    assert said == (
        "answers repeat themselves: 5% → 30% of their lines were said before, distinct-2 0.90 → 0.70 (steps 0 → 10); "
        "raise ppo.kl_coefficient, or train a reward model that has seen such answers rejected"
    )
    assert not then(repeated=0.24)
    assert then(repeated=0.26)
    assert not then(distinct=0.46)
    assert then(distinct=0.44)


def test_answers_that_no_longer_end():
    (said,) = then(ended=0.4, length=90.0)
    assert said == (
        "answers no longer end by themselves: 90% → 40% did (steps 0 → 10, mean length 50 → 90 tokens); penalise "
        "answers that do not end, or raise ppo.kl_coefficient"
    )
    assert not then(ended=0.46)
    assert then(ended=0.44)
    seldom = replace(START, ended=0.5)
    assert not alarms([seldom, replace(seldom, step=10, ended=0.0)], patience=3)


def test_few_answers_that_do_not_end_may_be_luck():
    """6 of 8, then 2: half end, the standard error is sqrt(1/2 1/2 2/8) = 0.25, the fall two of it; 8, then 0: four."""
    few = replace(START, answers=8, ended=0.75)
    assert not alarms([few, replace(few, step=10, ended=0.25)], patience=3)
    few = replace(few, ended=1.0)
    assert alarms([few, replace(few, step=10, ended=0.0)], patience=3)


def test_each_alarm_is_one_line_and_compares_with_the_start():
    looks = history([3, 2, 1, 0])
    looks[2] = replace(looks[2], length=299.0, repeated=0.59, ended=0.11)
    looks[3] = replace(looks[3], length=300.0, repeated=0.6, ended=0.1)
    said = alarms(looks, patience=3)
    assert [line.split()[1] for line in said] == ["judge", "grew", "repeat", "no"]
    assert not any("\n" in line for line in said)
    for line, change in zip(said, ("3 → 0", "50 → 300", "5% → 60%", "90% → 10%"), strict=True):
        assert change in line
    assert not alarms([*looks, replace(looks[0], step=40)], patience=3)  # all is well again
    with pytest.raises(ValueError, match="patience is 0"):
        alarms(looks, patience=0)


def sampled(random, answers: int, gain: np.ndarray, growth: float = 1.4) -> list[EvalPoint]:
    """A run whose judge truly gains so many standard deviations at each look, measured on a sample of answers."""
    looks = []
    for at, mean in enumerate(gain):
        scores, rewards = random.normal(mean, 1, answers), random.normal(0.2 * at, 1, answers)
        done = at / (len(gain) - 1)
        looks.append(
            EvalPoint(
                step=at, answers=answers, kl_nats=random.normal(0.5 * at, 0.2), proxy=rewards.mean().item(),
                proxy_std=rewards.std().item(), judge=scores.mean().item(), judge_std=scores.std().item(),
                length=random.gamma(2, 40 * (1 + (growth - 1) * done), answers).mean().item(),
                ended=random.binomial(answers, 0.8 - 0.1 * done) / answers,
                distinct=random.beta(18, 2, answers).mean().item(), repeated=random.beta(1, 12, answers).mean().item(),
                entropy=1.5 - 0.5 * done, clipped=0.1,
            )
        )  # fmt: skip
    return looks


# Of no use to the judge; soon as good as it gets; still rising.
HEALTHY = [np.zeros(20), np.minimum(np.arange(20) / 5, 1.0), 1 - np.exp(-np.arange(20) / 6)]


def alarmed(gains, answers: int, runs: int, patience: int = 3, growth: float = 1.4, of: str = "") -> float:
    """The share of runs in which any look raises any alarm that begins so."""
    random = np.random.default_rng(answers)
    count = 0
    for run in range(runs):
        looks = sampled(random, answers, gains[run % len(gains)], growth)
        said = (line for end in range(len(looks)) for line in alarms(looks[: end + 1], patience))
        count += any(line.startswith(of) for line in said)
    return count / runs


@pytest.mark.parametrize(("answers", "at_most"), [(16, 0.06), (64, 0.02), (256, 0.02)])
def test_healthy_runs_hardly_ever_raise_an_alarm(answers, at_most):
    assert alarmed(HEALTHY, answers, runs=300) <= at_most


@pytest.mark.parametrize(("errors", "low", "high"), [(1.0, 0.8, 0.95), (2.0, 0.15, 0.35), (3.0, 0, 0.04)])
def test_three_standard_errors_it_takes(errors, low, high, monkeypatch):
    monkeypatch.setattr(watch, "SURE_ERRORS", errors)
    for answers in (16, 64, 256):
        assert low <= alarmed([np.zeros(20)], answers, runs=200, of="the judge") <= high


def test_healthy_runs_may_double_their_length():
    assert alarmed(HEALTHY[1:], 64, runs=100, growth=2.6) <= 0.05
    assert alarmed(HEALTHY[:1], 64, runs=100, growth=2.6) > 0.9


@pytest.mark.parametrize("patience", [2, 3])
def test_a_gamed_reward_raises_one(patience):
    """Up by one standard deviation, then down by one and a half over 12 looks."""
    steps = np.arange(21)
    gain = np.where(steps < 8, steps / 8, 1 - (steps - 8) / 8)
    assert alarmed([gain], 64, runs=100, patience=patience) > 0.97
    assert alarmed([gain], 16, runs=100, patience=patience) > 0.7


def test_importing_both_modules_loads_nothing_heavy():
    code = (
        "import sys; from qalign.reports import ppo_report; from qalign.reports import alarms as watch; "
        "assert not {'torch', 'numpy', 'matplotlib', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
