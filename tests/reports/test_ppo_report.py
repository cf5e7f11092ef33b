"""What the picture of a PPO run shows, read back from its axes, and that it is drawn whatever the run was."""

import math
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from qalign.reports.alarms import EvalPoint, best_of_n_kl
from qalign.reports.ppo_report import BLUE, ORANGE, RED, BestOf, above_start, draw, fill

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


def unjudged(looks: list[EvalPoint]) -> list[EvalPoint]:
    return [replace(look, judge=None, judge_std=None) for look in looks]


def panels(looks, best_of=(), alarm_steps=()) -> dict:
    """Axes by title; a second scale by its label."""
    figure = Figure(figsize=(15, 9), layout="constrained")
    fill(figure, looks, best_of, alarm_steps)
    return {axes.get_title() or axes.get_ylabel(): axes for axes in figure.axes}


def curves(axes, colour: str, marker: str) -> list[list[tuple[float, float]]]:
    """Points of the axes' own curves of this colour and marker; those without points are a legend's."""
    found = [line for line in axes.lines if (to_hex(line.get_color()), line.get_marker()) == (colour.lower(), marker)]
    points = [list(zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True)) for line in found]
    return [each for each in points if each]


def upright(axes, style: str) -> list[float]:
    return [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == style and line.get_marker() == "None"]


def test_gains_by_hand():
    assert above_start([1.0, 3.0, 0.0], 1.0, 2.0) == [0.0, 1.0, -0.5]
    assert above_start([1.0, 3.0], 1.0, 0.0) == [0.0, 2.0]


def test_both_rewards_stand_against_the_root_of_the_kl():
    axes = panels(THREE, SEARCH)["What the distance buys (darker is later)"]
    proxy, judge = ([tuple(point) for point in dots.get_offsets().tolist()] for dots in axes.collections)
    assert proxy == [(0, 0), (2, 1), (3, 3)]  # the KL before training, a little below 0, is 0
    assert judge == [(0, 0), (2, 1), (3, -0.5)]
    assert curves(axes, BLUE, "*") == curves(axes, ORANGE, "*") == [[(2, 1)]]
    root = math.sqrt(best_of_n_kl(4))
    assert curves(axes, BLUE, "D") == [[(0, 0), (root, 1.5)]]
    assert curves(axes, ORANGE, "D") == [[(0, 0), (root, 0.75)]]
    assert {text.get_text(): text.xy for text in axes.texts} == {"n=1": (0, 0), "n=4": (root, 1.5)}
    assert "standard deviations" in axes.get_ylabel()
    assert [dots.get_alpha().tolist() for dots in axes.collections] == [[0.25, 0.625, 1.0]] * 2


def test_each_panel_shows_its_figures_at_their_steps():
    axes = panels(THREE)
    assert curves(axes["Rewards as the models give them"], BLUE, "o") == [[(0, 1), (10, 3), (20, 7)]]
    assert curves(axes["held-out judge"], ORANGE, "o") == [[(0, 50), (10, 54), (20, 48)]]
    assert curves(axes["Distance from the reference"], BLUE, "o") == [[(0, -0.01), (10, 4), (20, 9)]]
    assert curves(axes["Length of the answers"], BLUE, "o") == [[(0, 40), (10, 60), (20, 90)]]
    assert curves(axes["Do answers end, and do they loop?"], BLUE, "o") == [[(0, 0.9), (10, 0.7), (20, 0.5)]]
    assert curves(axes["Entropy and clipping"], BLUE, "o") == [[(0, 1.5), (10, 1.2), (20, 1.0)]]
    assert curves(axes["clipped ratios"], ORANGE, "o") == [[(10, 0.2), (20, 0.1)]]  # nothing clips before an update
    shares = axes["Do answers end, and do they loop?"]
    labelled = {line.get_label(): line.get_ydata()[0] for line in shares.lines if line.get_marker() == "o"}
    assert labelled == {"answers that end": 0.9, "distinct-2": 0.8, "lines said before": 0.1}


def test_alarms_and_the_best_look_are_marked_at_their_steps():
    for title, axes in panels(THREE, alarm_steps=[10, 20]).items():
        if axes.get_xlabel() == "PPO iterations":
            assert upright(axes, ":") == [10, 20], title
            assert {line.get_color() for line in axes.lines if line.get_linestyle() == ":"} == {RED}
            assert upright(axes, "--") == [10], title


def test_without_a_judge_there_is_no_second_scale_and_the_reward_tells_the_best():
    axes = panels(unjudged(THREE), [BestOf(2, 0.2, 2.0, None)])
    assert "held-out judge" not in axes
    assert len(axes) == 7  # six panels, and the scale of clipped ratios
    gains = axes["What the distance buys (darker is later)"]
    assert not curves(gains, ORANGE, "D") + curves(gains, ORANGE, "*")
    assert curves(gains, BLUE, "*") == [[(3, 3)]]


def test_answers_that_all_score_alike_give_no_unit():
    looks = [replace(look, proxy_std=0.0) for look in THREE]
    axes = panels(looks)["What the distance buys (darker is later)"]
    assert axes.collections[0].get_offsets().tolist() == [[0, 0], [2, 2], [3, 6]]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["reward trained on (proxy), in its own units", "held-out judge"]


def long_run(scale: float = 1.0, offset: float = 0.0) -> list[EvalPoint]:
    random = np.random.default_rng(1)
    rewards = (scale * random.normal(np.arange(60) / 20, 0.1) + offset).tolist()
    return [
        replace(START, step=25 * at, kl_nats=0.5 * at, proxy=reward, proxy_std=scale, judge=-reward, clipped=at / 600)
        for at, reward in enumerate(rewards)
    ]


@pytest.mark.parametrize(
    "looks",
    [
        THREE, THREE[:1], THREE[1:2], unjudged(THREE), unjudged(THREE[:1]), [*THREE[:2], *unjudged(THREE[2:])],
        [replace(START, step=step, proxy_std=0.0, judge_std=0.0, entropy=0.0, kl_nats=0.0) for step in range(5)],
        long_run(), long_run(1e-4, 1e3), long_run(1e5),
    ],
    ids=[
        "three", "start", "one later", "unjudged", "start, unjudged", "partly judged",
        "constant", "long", "small on a large offset", "large",
    ],
)  # fmt: skip
def test_draws_a_picture(looks, tmp_path):
    file = tmp_path / "ppo.png"
    draw(looks, file, best_of=SEARCH, alarm_steps=[0, 20])
    content = file.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1500, 900)
    assert 20_000 < len(content) < 1_000_000


def test_no_looks_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there are no looks"):
        draw([], tmp_path / "ppo.png")
    assert not list(tmp_path.iterdir())


def test_drawing_loads_no_pyplot_and_no_torch(tmp_path):
    code = (
        "import sys; from qalign.reports import ppo_report; from qalign.reports import alarms as watch; assert 'matplotlib' not in sys.modules; "
        "look = watch.EvalPoint(0, 1, 0., 0., 1., None, None, 9., 1., 1., 0., 2., 0.); "
        "ppo_report.draw([look], sys.argv[1]); "
        "assert 'matplotlib' in sys.modules; assert not {'matplotlib.pyplot', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "ppo.png")], check=True)
