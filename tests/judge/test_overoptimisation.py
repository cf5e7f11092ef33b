"""Gao et al.'s laws: fits recover what made the curves, and peaks are where the derivative is 0."""

import math

import pytest

from qalign.judge.overoptimisation import Law, Point, Track, draw, fit, pooled

DISTANCES = (0.0, 0.5, 1.0, 1.5, 2.5, 4.0)


def test_laws_worked_out_by_hand():
    # d = 2: best of n 2 (3 - 0.5 * 2) = 4; RL 2 (3 - 0.5 log 2) = 6 - log 2.
    assert Law("best_of", 3.0, 0.5, 1.0).gain(4.0) == pytest.approx(4.0)
    assert Law("rl", 3.0, 0.5, 1.0).gain(4.0) == pytest.approx(6.0 - math.log(2))
    assert Law("rl", 3.0, 0.5, 1.0).gain(0.0) == Law("best_of", 3.0, 0.5, 1.0).gain(-0.1) == 0.0


@pytest.mark.parametrize(("method", "bend"), [("best_of", lambda d: d), ("rl", lambda d: math.log(d) if d else 0.0)])
@pytest.mark.parametrize(("alpha", "beta"), [(1.5, 0.4), (0.3, 0.9), (-0.2, 0.1), (0.5, -0.2)])
def test_a_fit_recovers_what_made_the_curve(method, bend, alpha, beta):
    gains = [d * (alpha - beta * bend(d)) for d in DISTANCES]
    law = fit(method, [d * d for d in DISTANCES], gains)
    assert (law.alpha, law.beta, law.r_squared) == pytest.approx((alpha, beta, 1.0))


def test_a_fit_is_that_of_least_squares():
    # d = 1, 2: R = (1, 0) gives α - β = 1 and 2α - 4β = 0, so α = 2, β = 1. A second point at d = 1 with 0 pulls the
    # first equation to its mean, 0.5: α = 1, β = 0.5; then 0.5 of the variance of (1, 0, 0), 2/3, is left.
    law = fit("best_of", [1.0, 4.0], [1.0, 0.0])
    assert (law.alpha, law.beta) == pytest.approx((2.0, 1.0))
    law = fit("best_of", [1.0, 1.0, 4.0], [1.0, 0.0, 0.0])
    assert (law.alpha, law.beta, law.r_squared) == pytest.approx((1.0, 0.5, 1 - 0.5 / (2 / 3)))


def test_too_few_points_have_no_law():
    assert fit("rl", [0.0, 4.0, 4.0, -1.0], [0.0, 1.0, 2.0, 3.0]) is None


@pytest.mark.parametrize("method", ["best_of", "rl"])
def test_the_law_is_highest_at_its_peak(method):
    law = Law(method, 1.5, 0.7, 1.0)
    top = law.gain(law.peak_kl_nats)
    assert top > max(law.gain(0.9 * law.peak_kl_nats), law.gain(1.1 * law.peak_kl_nats), 0)
    d = 1.5 / 1.4 if method == "best_of" else math.exp(1.5 / 0.7 - 1)
    assert law.peak_kl_nats == pytest.approx(d * d)


def test_a_law_that_never_turns():
    assert Law("best_of", 1.0, 0.0, 1.0).peak_kl_nats == math.inf
    assert Law("rl", 1.0, -0.5, 1.0).peak_kl_nats == math.inf
    assert Law("best_of", -1.0, 0.5, 1.0).peak_kl_nats == 0.0
    assert Law("rl", 900.0, 0.5, 1.0).facts["peak_kl_nats"] is None, "JSON has no infinity"


def track(method: str, members: int, seed: int = 1, **more) -> Track:
    beta = 0.8 / members
    points = [Point(d * d, d, d - beta * d * (d if method == "best_of" else math.log(d or 1))) for d in DISTANCES]
    return Track(method, seed, 32, members, tuple(points), **more)


def test_tracks_have_their_peak_and_share_a_law():
    one = track("rl", 1)
    assert one.peak.kl_nats == 1.5**2, "1.5 (1 - 0.8 log 1.5) = 1.01, before it 1 and after it 0.67"
    assert pooled([one, track("rl", 1, seed=2)]).beta == pytest.approx(0.8)
    assert one.facts["law"]["beta"] == pytest.approx(0.8)
    assert one.facts["gold_peak_kl_nats"] == one.peak.kl_nats


@pytest.mark.pictures
def test_the_picture_shows_every_size_method_and_alarm(tmp_path, monkeypatch):
    shown = {}
    real = draw.__globals__["_panel"]
    monkeypatch.setitem(draw.__globals__, "_panel", lambda axes, some: (real(axes, some), shown.update({axes: some})))
    tracks = [track(method, members) for method in ("best_of", "rl") for members in (1, 4)]
    tracks += [track("rl", 1, seed=2, alarm_kl_nats=6.25, alarm="the judge fell")]
    draw(tracks, "min", tmp_path / "goodhart.png")
    assert (tmp_path / "goodhart.png").stat().st_size > 10_000
    best_of, rl = shown
    assert [len(some) for some in shown.values()] == [2, 3]
    assert "Best of n" in best_of.get_title()
    assert "32 pairs" in rl.get_title()
    alarms = [line for line in rl.lines if line.get_marker() == "v"]
    assert [float(line.get_xdata()[0]) for line in alarms] == [2.5]
