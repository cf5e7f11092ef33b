"""The picture of online preference learning: what every round gained on the held-out prompts, and at what distance."""

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from qalign.reports.alarms import EvalPoint, best_point
from qalign.reports.plots import BLUE, GREEN, GREY, ORANGE, counted, label, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROUNDS, SURE = "rounds done", 1.96  # standard errors on each side of a mean, for an interval of 95%


def draw(points: Sequence[EvalPoint], file: Path) -> None:
    """Writes the report as a PNG; the first point is from before the first round."""
    first, last, best = points[0], points[-1], best_point(points)
    with picture(file, (15, 5), pad=0.12) as figure:
        judged = f", judge {first.judge:+.2f} → {last.judge:+.2f}" if None not in (first.judge, last.judge) else ""
        figure.suptitle(
            f"Online DPO, {counted(last.step, 'round')}: reward {first.proxy:+.2f} → {last.proxy:+.2f}{judged}, "
            f"KL {last.kl_nats:.1f} nats, best after round {best.step}",
            fontsize=16,
        )
        rewards, kl, length = figure.subplots(1, 3)
        _curve(rewards, points, "proxy", BLUE, "reward trained on (proxy)")
        if None not in (first.judge, last.judge):
            other = rewards.twinx()
            _curve(other, points, "judge", ORANGE, "held-out judge")
            other.set_ylabel("held-out judge", color=ORANGE)
        label(rewards, "Rewards (bars: 95% intervals)", ROUNDS, "reward trained on (proxy)")
        _curve(kl, points, "kl_nats", BLUE, "KL")
        label(kl, "Distance from the very first policy", ROUNDS, "KL (nats an answer)")
        _curve(length, points, "length", BLUE, "mean length")
        length.set_ylim(bottom=0)
        share = length.twinx()
        _curve(share, points, "ended", GREEN, "answers that end")
        share.set_ylim(-0.03, 1.03)
        share.set_ylabel("share of answers that end", color=GREEN)
        label(length, "Length and end of the answers", ROUNDS, "mean length (tokens)")
        for axes in (rewards, kl, length):
            axes.axvline(best.step, color=GREY, linestyle="--", linewidth=1)


def _curve(axes: "Axes", points: Sequence[EvalPoint], name: str, colour: str, words: str) -> None:
    steps, values = [point.step for point in points], [getattr(point, name) for point in points]
    spread = [getattr(point, f"{name}_std", None) or 0.0 for point in points]
    bars = [SURE * std / sqrt(max(1, point.answers - 1)) for std, point in zip(spread, points, strict=True)]
    axes.errorbar(steps, values, bars, marker="o", color=colour, capsize=2, label=words)
    axes.locator_params(axis="x", integer=True)
