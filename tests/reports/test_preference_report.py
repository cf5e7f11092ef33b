"""The alarms of a run that learns from given answers, each by hand; how often healthy runs raise one; the picture."""

from dataclasses import replace

import numpy as np
import pytest

from qalign.reports.preference_report import PREFIX, PreferencePoint, alarms, as_metrics, draw, point_of
from tests.reports.test_plots import assert_png

START = PreferencePoint(
    step=0, answers=24, kl_nats=0.0, length=60.0, length_low=20.0, length_high=110.0, ended=1.0, looping=0.0,
    distinct=0.9, repeated=0.05, rows=64, chosen_tokens=40.0, chosen_logps=-80.0, rejected_logps=-100.0, accuracy=0.5,
    margin=0.0,
)  # fmt: skip
NO_PAIRS = replace(START, accuracy=None, margin=None, kl_nats=None, rejected_logps=None)


def then(first: PreferencePoint = START, **changes) -> list[str]:
    return alarms([first, replace(first, step=12, **changes)], "dpo", {"sigmoid": 1.0})


@pytest.mark.parametrize(
    ("first", "changes", "parts"),
    [
        (START, {}, None),
        # 40 tokens at half a nat each.
        (START, {"chosen_logps": -99.9, "rejected_logps": -300.0, "margin": 20.0}, None),
        (START, {"chosen_logps": -115.0, "rejected_logps": -170.0},
         ["fell by 35 nats, -80 → -115 (0.88 a token, steps 0 → 12, those of rejected answers by 70)", "dpo.beta",
          "set dpo.loss='{sigmoid: 1.0, sft: 0.1}'"]),
        (START, {"chosen_logps": -20.0}, None),
        (NO_PAIRS, {"chosen_logps": -115.0}, ["0.88 a token, steps 0 → 12)"]),
        # With 24 answers, exp(3 sqrt(2/24)) is 2.38: the mean of 60 tokens may reach 142.7 by chance.
        (START, {"length": 142.0}, None),
        (START, {"length": 180.0}, ["60 → 180 tokens", "chosen answers of the data have 40", "sigmoid_norm"]),
        (replace(START, chosen_tokens=200.0), {"length": 180.0}, None),  # it learns the length that the data shows
        # 0 of 24, then k: three standard errors are 0.303 for 7 (0.292), 0.323 for 8 (0.333).
        (START, {"looping": 7 / 24}, None),
        (START, {"looping": 8 / 24}, ["8 of 24 answers loop (0 before training", "raise dpo.beta"]),
        (replace(START, answers=1000), {"looping": 0.2}, None),  # sure, but a fifth is needed
        (replace(START, looping=8 / 24), {"looping": 8 / 24}, None),
        (START, {"ended": 0.4, "length": 90.0}, ["100% → 40% did", "mean length 60 → 90", "raise dpo.beta"]),
        (START, {"ended": 0.6}, None),
        (replace(START, ended=0.4), {"ended": 0.0}, None),  # few ended before: max_new_tokens is too small to tell
    ],
)  # fmt: skip
def test_when_an_alarm_is_raised_and_what_it_says(first, changes, parts):
    found = then(first, **changes)
    assert len(found) == (parts is not None), found
    for part in parts or ():
        assert part in found[0]
    assert not any("\n" in line for line in found)


def test_a_stage_without_an_sft_term_is_not_told_to_set_one():
    worst = {"chosen_logps": -200.0, "length": 400.0, "looping": 0.9, "ended": 0.1}
    points = [NO_PAIRS, replace(NO_PAIRS, step=9, **worst)]
    found = alarms(points, "kto")
    assert len(found) == 4
    assert not any("sft" in line or "dpo" in line or "sigmoid" in line for line in found)
    assert all("kto.beta" in line for line in found)
    assert not alarms(points[:1], "kto")
    assert not alarms([*points, replace(NO_PAIRS, step=10)], "kto"), "all is well again"


@pytest.mark.parametrize("point", [START, NO_PAIRS, replace(START, length=1 / 3, kl_nats=-0.1)])
def test_a_point_is_read_back_from_the_metrics_as_it_was(point):
    line = as_metrics(point)
    assert all(name.startswith(PREFIX) for name in line)
    assert None not in line.values()
    assert point_of({"step": 0, **line}) == point


def healthy(random, answers: int, rows: int, growth: float) -> list[PreferencePoint]:
    """A run whose chosen answers lose 0.15 nats a token on average, and whose answers grow by a fifth."""
    noise, points = random.normal(0, 0.3, rows), []
    for at in range(6):
        lengths = random.geometric(1 / (60 * (1 + (growth - 1) * at / 5)), answers)
        points.append(
            replace(
                START, step=at, answers=answers, rows=rows, length=lengths.mean().item(),
                ended=random.binomial(answers, 0.95 - 0.01 * at) / answers,
                looping=random.binomial(answers, 0.02 + 0.01 * at) / answers,
                chosen_logps=-80 - 40 * (0.15 * at / 5 + (noise.mean() * at / 5).item()),
            )
        )  # fmt: skip
    return points


@pytest.mark.parametrize(("answers", "rows", "at_most"), [(8, 8, 0.06), (24, 64, 0.04), (64, 64, 0.02)])
def test_healthy_runs_hardly_ever_raise_an_alarm(answers, rows, at_most):
    random, count = np.random.default_rng(answers), 0
    for _ in range(400):
        points = healthy(random, answers, rows, growth=1.2)
        count += any(alarms(points[: end + 1], "dpo", {"sigmoid": 1.0}) for end in range(6))
    assert count <= at_most * 400


@pytest.mark.parametrize(("answers", "looping", "at_least"), [(24, 0.5, 0.9), (24, 0.25, 0.1), (64, 0.4, 0.95)])
def test_runs_whose_answers_come_to_loop_raise_one(answers, looping, at_least):
    random, count = np.random.default_rng(1), 0
    for _ in range(200):
        shares = [random.binomial(answers, share) / answers for share in (0.02, looping)]
        first, last = (replace(START, answers=answers, looping=share) for share in shares)
        count += bool(alarms([first, last], "dpo", {"sigmoid": 1.0}))
    assert count >= at_least * 200


@pytest.mark.pictures
@pytest.mark.parametrize(
    ("first", "count"), [(START, 6), (START, 1), (NO_PAIRS, 3), (replace(START, answers=1, rows=1), 2)]
)
def test_the_picture_is_drawn_from_any_points(tmp_path, first, count):
    points = [replace(first, step=4 * at, length=60.0 + at, chosen_logps=-80.0 - 9 * at) for at in range(count)]
    draw(points, tmp_path / "dpo_report.png", "dpo", alarm_steps=[4] if count > 1 else [])
    assert_png(tmp_path / "dpo_report.png", 1500, 900)
