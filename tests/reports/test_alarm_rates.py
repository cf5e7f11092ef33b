"""How often simulated healthy and gamed PPO runs raise an alarm."""

import numpy as np
import pytest

from qalign.reports import alarms as module
from qalign.reports.alarms import EvalPoint, alarms


def sampled(random, answers: int, gain: np.ndarray, growth: float) -> list[EvalPoint]:
    """A run whose judge truly gains this many standard deviations at each point, measured on a sample of answers."""
    points = []
    for at, mean in enumerate(gain):
        scores, rewards = random.normal(mean, 1, answers), random.normal(0.2 * at, 1, answers)
        done = at / (len(gain) - 1)
        points.append(
            EvalPoint(
                step=at, answers=answers, kl_nats=random.normal(0.5 * at, 0.2), proxy=rewards.mean().item(),
                proxy_std=rewards.std().item(), judge=scores.mean().item(), judge_std=scores.std().item(),
                length=random.gamma(2, 40 * (1 + (growth - 1) * done), answers).mean().item(),
                ended=random.binomial(answers, 0.8 - 0.1 * done) / answers,
                distinct=random.beta(18, 2, answers).mean().item(), repeated=random.beta(1, 12, answers).mean().item(),
                entropy=1.5 - 0.5 * done, clipped=0.1,
            )
        )  # fmt: skip
    return points


def alarmed(gains, answers: int, runs: int, patience: int = 3, growth: float = 1.4, of: str = "") -> float:
    """The share of runs in which any point raises any alarm that begins with `of`."""
    random = np.random.default_rng(answers)
    count = 0
    for run in range(runs):
        points = sampled(random, answers, gains[run % len(gains)], growth)
        found = (line for end in range(len(points)) for line in alarms(points[: end + 1], patience))
        count += any(line.startswith(of) for line in found)
    return count / runs


# The judge gains nothing; soon all that it can; more and more.
HEALTHY = [np.zeros(20), np.minimum(np.arange(20) / 5, 1.0), 1 - np.exp(-np.arange(20) / 6)]


@pytest.mark.parametrize(("answers", "at_most"), [(16, 0.06), (64, 0.02), (256, 0.02)])
def test_healthy_runs_hardly_ever_raise_an_alarm(answers, at_most):
    assert alarmed(HEALTHY, answers, runs=300) <= at_most


@pytest.mark.parametrize(("errors", "low", "high"), [(1.0, 0.8, 0.95), (2.0, 0.15, 0.35), (3.0, 0, 0.04)])
def test_three_standard_errors_are_needed(errors, low, high, monkeypatch):
    monkeypatch.setattr(module, "SURE_ERRORS", errors)
    for answers in (16, 64, 256):
        assert low <= alarmed([np.zeros(20)], answers, runs=200, of="the judge") <= high


def test_healthy_runs_may_double_their_length():
    assert alarmed(HEALTHY[1:], 64, runs=100, growth=2.6) <= 0.05
    assert alarmed(HEALTHY[:1], 64, runs=100, growth=2.6) > 0.9


@pytest.mark.parametrize("patience", [2, 3])
def test_a_gamed_reward_raises_an_alarm(patience):
    """Up by one standard deviation, then down by one and a half over 12 points."""
    steps = np.arange(21)
    gain = np.where(steps < 8, steps / 8, 1 - (steps - 8) / 8)
    assert alarmed([gain], 64, runs=100, patience=patience) > 0.97
    assert alarmed([gain], 16, runs=100, patience=patience) > 0.7
