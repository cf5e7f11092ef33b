"""What the picture of a PPO run shows, read back from its axes."""

import math
from dataclasses import replace

import pytest
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from qalign.reports.alarms import EvalPoint, best_of_n_kl
from qalign.reports.plots import BLUE, ORANGE, RED
from qalign.reports.ppo_report import BestOf, draw, fill
from qalign.reports.reward_report import wilson

START = EvalPoint(
    step=0, answers=8, kl_nats=-0.01, proxy=1.0, proxy_std=2.0, judge=50.0, judge_std=4.0, length=40.0, ended=0.9,
    distinct=0.8, repeated=0.1, entropy=1.5, clipped=0.0,
)  # fmt: skip
THREE = [
    START,
    replace(START, step=10, kl_nats=4.0, proxy=3.0, judge=54.0, length=60.0, ended=0.7, entropy=1.2, clipped=0.2),
    replace(START, step=20, kl_nats=9.0, proxy=7.0, judge=48.0, length=90.0, ended=0.5, entropy=1.0, clipped=0.1),
]
SEARCH = [BestOf(1, 0.0, 1.0, 50.0), BestOf(4, best_of_n_kl(4), 4.0, 53.0)]
GAINS = "What the distance buys (darker is later)"


def unjudged(points: list[EvalPoint]) -> list[EvalPoint]:
    return [replace(point, judge=None, judge_std=None) for point in points]


def panels(points, best_of=(), alarm_steps=()) -> dict:
    """Axes by title; a second scale by its label."""
    figure = Figure(figsize=(15, 9), layout="constrained")
    fill(figure, points, best_of, alarm_steps)
    return {axes.get_title() or axes.get_ylabel(): axes for axes in figure.axes}


def curves(axes, colour: str, marker: str) -> list[list[tuple[float, float]]]:
    """Points of the axes' own curves of this colour and marker; curves without points are in the legend only."""
    found = [line for line in axes.lines if (to_hex(line.get_color()), line.get_marker()) == (colour.lower(), marker)]
    points = [list(zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True)) for line in found]
    return [curve for curve in points if curve]


def dots_of(axes) -> list[PathCollection]:
    return [found for found in axes.collections if isinstance(found, PathCollection)]


def bars(axes) -> list[list[list[float]]]:
    """The ends of the upright lines of each set of error bars."""
    return [found.get_segments() for found in axes.collections if isinstance(found, LineCollection)]


def test_intervals_of_95_percent_by_hand():
    """Half of one is 1.96 standard deviations over the root of 7, one less than the answers."""
    found, half = panels(THREE), 1.96 * 2.0 / math.sqrt(7)
    proxy, judge = bars(found[GAINS])
    assert [end[1] for end in proxy[1]] == pytest.approx([1 - half / 2, 1 + half / 2])  # in standard deviations, 2.0
    assert [end[1] for end in judge[2]] == pytest.approx([-0.5 - half / 2, -0.5 + half / 2])
    (band,) = found["Rewards as the models give them"].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (min(heights), max(heights)) == pytest.approx((1 - half, 7 + half))
    (ended,) = bars(found["Do answers end, and do they loop?"])
    assert [end[1] for end in ended[2]] == pytest.approx(wilson(0.5, 8))
    single = panels([replace(START, answers=1)])
    assert [end[1] for end in bars(single[GAINS])[0][0]] == [0.0, 0.0], "one answer has no known spread"


def test_every_panel_says_how_to_read_it_below_it():
    for axes in [axes for axes in panels(THREE).values() if axes.get_title()]:
        (note,) = (text for text in axes.texts if not isinstance(text, Annotation))
        assert len(note.get_text()) > 60, axes.get_title()
        assert note.get_position()[1] < 0
        assert max(map(len, note.get_text().splitlines())) <= 75  # the panel's width


def upright(axes, style: str) -> list[float]:
    return [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == style and line.get_marker() == "None"]


def test_both_rewards_are_drawn_against_the_root_of_the_kl():
    axes = panels(THREE, SEARCH)[GAINS]
    proxy, judge = ([tuple(point) for point in dots.get_offsets().tolist()] for dots in dots_of(axes))
    assert proxy == [(0, 0), (2, 1), (3, 3)]  # the KL before training, a little below 0, is 0
    assert judge == [(0, 0), (2, 1), (3, -0.5)]
    assert curves(axes, BLUE, "*") == curves(axes, ORANGE, "*") == [[(2, 1)]]
    root = math.sqrt(best_of_n_kl(4))
    assert curves(axes, BLUE, "D") == [[(0, 0), (root, 1.5)]]
    assert curves(axes, ORANGE, "D") == [[(0, 0), (root, 0.75)]]
    assert {text.get_text(): text.xy for text in axes.texts if isinstance(text, Annotation)} == {
        "n=1": (0, 0),
        "n=4": (root, 1.5),
    }
    assert "standard deviations" in axes.get_ylabel()
    assert [dots.get_alpha().tolist() for dots in dots_of(axes)] == [[0.25, 0.625, 1.0]] * 2


@pytest.mark.parametrize(
    ("title", "colour", "values"),
    [
        ("Rewards as the models give them", BLUE, [1, 3, 7]), ("held-out judge", ORANGE, [50, 54, 48]),
        ("Distance from the reference", BLUE, [-0.01, 4, 9]), ("Length of the answers", BLUE, [40, 60, 90]),
        ("Do answers end, and do they loop?", BLUE, [0.9, 0.7, 0.5]), ("Entropy and clipping", BLUE, [1.5, 1.2, 1.0]),
    ],
)  # fmt: skip
def test_each_panel_shows_its_figures_at_their_steps(title, colour, values):
    assert curves(panels(THREE)[title], colour, "o") == [list(zip((0, 10, 20), values, strict=True))]


def test_clipped_ratios_begin_at_the_first_update_and_the_shares_are_named():
    axes = panels(THREE)
    assert curves(axes["clipped ratios"], ORANGE, "o") == [[(10, 0.2), (20, 0.1)]]
    shares = axes["Do answers end, and do they loop?"]
    labelled = {line.get_label(): line.get_ydata()[0] for line in shares.lines if line.get_marker() == "o"}
    assert labelled == {"answers that end": 0.9, "distinct-2": 0.8, "repeated lines": 0.1}


def test_alarms_and_the_best_point_are_marked_at_their_steps():
    axes_of_steps = [axes for axes in panels(THREE, alarm_steps=[10, 20]).values() if "iter" in axes.get_xlabel()]
    assert len(axes_of_steps) == 5
    for axes in axes_of_steps:
        assert upright(axes, ":") == [10, 20], axes.get_title()
        assert {line.get_color() for line in axes.lines if line.get_linestyle() == ":"} == {RED}
        assert upright(axes, "--") == [10], axes.get_title()


def test_without_a_judge_there_is_no_second_scale_and_the_reward_tells_the_best():
    axes = panels(unjudged(THREE), [BestOf(2, 0.2, 2.0, None)])
    assert "held-out judge" not in axes
    assert len(axes) == 7  # six panels, and the scale of clipped ratios
    assert not curves(axes[GAINS], ORANGE, "D") + curves(axes[GAINS], ORANGE, "*")
    assert curves(axes[GAINS], BLUE, "*") == [[(3, 3)]]


def test_answers_that_all_score_alike_give_no_unit():
    axes = panels([replace(point, proxy_std=0.0) for point in THREE])[GAINS]
    assert dots_of(axes)[0].get_offsets().tolist() == [[0, 0], [2, 2], [3, 6]]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["reward trained on (proxy), in its own units", "held-out judge"]


def test_no_points_is_an_error_and_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        draw([], tmp_path / "ppo.png")
    assert not list(tmp_path.iterdir())


def test_a_point_without_a_judge_among_others_is_left_out():
    axes = panels([*THREE[:2], *unjudged(THREE[2:])])[GAINS]
    proxy, judge = bars(axes)
    assert (len(proxy), len(judge)) == (3, 2)
