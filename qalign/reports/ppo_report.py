"""The picture of a PPO or GRPO run: what the policy gained, how far it went for it, and how its answers changed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalign.config.stages import RL_STAGES
from qalign.reports.alarms import EvalPoint, best_point
from qalign.reports.plots import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    counted,
    curve,
    label,
    mark_steps,
    picture,
    shares,
)
from qalign.train.checkpoints import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHED: dict[str, Any] = {"linestyle": "--", "markersize": 3.5}  # a curve drawn over a solid one lets it show through
FAINTEST = 0.25  # opacity of the first point; the last one is opaque
STEPS, PROXY, JUDGE = "iterations", "reward trained on (proxy)", "held-out judge"
BEST_OF = "best_of/summary.json"  # in the recipe's output folder
SURE = 1.96  # standard errors on each side of a mean, for an interval of 95%
# How to read each panel, in one or two short lines.
NOTES = {
    "gains": "Up is better, right is farther from the reference. √KL: gains grow about\n"
    "in step with it. A judge that falls while the reward rises: reward hacking.",
    "rewards": "Bands: 95% intervals of the means over answers.\nReward up and judge down: the reward is being gamed.",
    "kl": "log π(y|x) − log π_ref(y|x), mean over answers.\nA steep rise calls for a larger kl_coefficient.",
    "length": "Longer answers often earn more reward without\nbeing better: read some of them (samples/).",
    "shares": "distinct-2: share of an answer's word pairs that are new; low means\n"
    "it loops. Bars: 95% intervals of the share that ends.",
    "updates": "Entropy near 0: nothing new is tried. Clipped ratios: tokens whose\n"
    "update was cut at clip; far above 20%, lower the learning rate.",
}


@dataclass(frozen=True)
class BestOf:
    """The best by proxy of n answers of the reference, mean over prompts: what sampling alone gains at that KL."""

    n: int
    kl_nats: float  # `alarms.best_of_n_kl`
    proxy: float
    judge: float | None


def draw(
    points: Sequence[EvalPoint],
    file: Path,
    *,
    best_of: Sequence[BestOf] = (),
    alarm_steps: Sequence[int] = (),
    title: str = "PPO",
) -> None:
    """Writes the report as a PNG of 1500 x 900 pixels. The first point is from before training."""
    with picture(file, (15, 9), pad=0.12) as figure:
        fill(figure, points, best_of, alarm_steps, title)


def file_name(stage: str) -> str:
    """The name of the report in the run folder of a stage that samples."""
    return f"{stage}_report.png"


def redraw(output: Path) -> Path | None:
    """Draws the reports of a recipe's PPO and GRPO runs again from their metrics, with best-of-n beside them if that
    has run. Returns a picture's file; None if there is no run or none evaluated held-out prompts."""
    files = [file for stage in RL_STAGES if (file := _redrawn(output, stage))]
    return files[0] if files else None


def _redrawn(output: Path, stage: str) -> Path | None:
    run = output / stage
    points, alarms = read_points(run)
    if not points:
        return None
    file = run / file_name(stage)
    draw(points, file, best_of=read_best_of(output), alarm_steps=[*alarms], title=stage.upper())
    return file


def read_points(run: Path) -> tuple[list[EvalPoint], dict[int, list[str]]]:
    """The evaluations of a PPO or GRPO run, and the alarms by the step at which they were raised; both empty if there
    is no run, or it evaluated no held-out prompts."""
    file = run / "metrics.jsonl"
    lines = [line for line in read_metrics(file) if "eval_proxy" in line] if file.is_file() else []
    names = [field.name for field in fields(EvalPoint) if field.name != "step"]
    figures: list[dict[str, Any]] = [{name: line.get(f"eval_{name}") for name in names} for line in lines]
    points = [EvalPoint(step=line["step"], **found) for line, found in zip(lines, figures, strict=True)]
    return points, {line["step"]: line["alarms"] for line in lines if line["alarms"]}


def read_best_of(output: Path) -> list[BestOf]:
    """The result of `python -m qalign.best_of` on the held-out prompts of a recipe; empty if it hasn't run, or its file
    is damaged: a picture is no reason to end a run."""
    file = output / BEST_OF
    try:
        held_out = json.loads(file.read_text(encoding="utf-8"))["held_out"] if file.is_file() else []
        return [BestOf(**point) for point in held_out]
    except (ValueError, KeyError, TypeError):
        return []


def fill(
    figure: "Figure",
    points: Sequence[EvalPoint],
    best_of: Sequence[BestOf],
    alarm_steps: Sequence[int],
    title: str = "PPO",
) -> None:
    """Puts the six panels on an empty figure; the other arguments are those of `draw`."""
    best = best_point(points)
    figure.suptitle(_headline(points, best, title), fontsize=16)
    (gains, rewards, kl), (length, shares, updates) = figure.subplots(2, 3)
    _draw_gains(gains, points, best, best_of)
    for axes in (rewards, kl, length, shares, updates):
        axes.axvline(best.step, color=GREY, linestyle="--", linewidth=1)
        mark_steps(axes, alarm_steps)
    curve(rewards, points, "proxy", BLUE)
    _draw_band(rewards, points, "proxy", BLUE)
    _draw_disagreement(rewards, points)
    label(rewards, "Rewards as the models give them", STEPS, PROXY)
    if judged := [point for point in points if point.judge is not None]:
        right = _second_scale(rewards, PROXY, JUDGE)
        curve(right, judged, "judge", ORANGE, **DASHED)
        _draw_band(right, judged, "judge", ORANGE)
    curve(kl, points, "kl_nats", BLUE)
    kl.axhline(0, color=GREY, linewidth=1, zorder=0)
    label(kl, "Distance from the reference", STEPS, "KL (nats an answer)")
    curve(length, points, "length", BLUE)
    length.set_ylim(bottom=0)
    label(length, "Length of the answers", STEPS, "mean length (tokens)")
    _draw_shares(shares, points)
    _draw_updates(updates, points)
    for axes, note in zip((gains, rewards, kl, length, shares, updates), NOTES.values(), strict=True):
        axes.text(0.5, -0.19, note, transform=axes.transAxes, ha="center", va="top", fontsize=9.5, color="#404040")

    (star,) = gains.plot([], [], "*--", color=GREY, markersize=14, mec="black", mfc="white")
    kinds = {f"best evaluation, step {best.step}": star}
    if alarm_steps:
        (kinds["alarm"],) = gains.plot([], [], ":", color=RED)
    if best_of:
        (kinds["best of n answers of the reference"],) = gains.plot([], [], "D--", color=GREY, markerfacecolor="white")
    figure.legend(kinds.values(), kinds, loc="outside lower center", ncols=len(kinds), fontsize=11, frameon=False)


def _headline(points: Sequence[EvalPoint], best: EvalPoint, title: str) -> str:
    first, last = points[0], points[-1]
    parts = [f"reward {_signed(first.proxy)} → {_signed(last.proxy)}"]
    if first.judge is not None and last.judge is not None:
        parts.append(f"judge {_signed(first.judge)} → {_signed(last.judge)}")
    parts += [f"KL {last.kl_nats:.1f} nats", f"best at step {best.step}"]
    return f"{title}, {counted(last.step, 'iteration')}: " + ", ".join(parts)


def _draw_gains(axes: "Axes", points: Sequence[EvalPoint], best: EvalPoint, best_of: Sequence[BestOf]) -> None:
    """Both rewards against the root of the KL (Gao et al. 2023, arXiv:2210.10760, fig. 1)."""
    for name, words, colour, marker, size in (("proxy", PROXY, BLUE, "o", 7), ("judge", JUDGE, ORANGE, "s", 5)):
        start, std = getattr(points[0], name), getattr(points[0], f"{name}_std")
        if start is None:
            continue
        roots, gains = _roots_and_gains(points, name, start, std)
        axes.plot(roots, gains, color=colour, linewidth=1, alpha=0.5, zorder=2)
        scored = [point for point in points if getattr(point, name) is not None]
        errors = [_half_width(point, name) / (std or 1.0) for point in scored]
        axes.errorbar(roots, gains, errors, fmt="none", ecolor=colour, elinewidth=1, capsize=2, alpha=0.5, zorder=2)
        dots = axes.scatter(roots, gains, s=size**2, color=colour, marker=marker, linewidths=0, zorder=3)
        dots.set_alpha([1 - (1 - FAINTEST) * age / max(1, len(roots) - 1) for age in reversed(range(len(roots)))])
        axes.plot([], [], f"{marker}-", color=colour, label=words if std else f"{words}, in its own units")
        star = _roots_and_gains([best], name, start, std)
        axes.plot(*star, "*", color=colour, markersize=3 * size, mec="black", zorder=4)
        roots, gains = _roots_and_gains(best_of, name, start, std)
        axes.plot(roots, gains, "D--", color=colour, linewidth=1, markersize=size, markerfacecolor="white")
        for one, x, y in zip(best_of, roots, gains, strict=True) if name == "proxy" else ():
            axes.annotate(f"n={one.n}", (x, y), (0, 8), textcoords="offset points", ha="center", fontsize=9)
    reach = max(0.1, *(sqrt(max(0.0, point.kl_nats)) for point in (*points, *best_of)))
    axes.set_xlim(-0.05 * reach, 1.05 * reach)
    axes.margins(y=0.12)
    axes.axhline(0, color=GREY, linewidth=1, zorder=0)
    axes.legend(fontsize=10)
    gain = "gain over the first evaluation, in its\nstandard deviations over answers"
    label(axes, "What the distance buys (darker is later)", "√KL from the reference (√nats)", gain)


def _roots_and_gains(
    points: Sequence[EvalPoint | BestOf], name: str, start: float, std: float
) -> tuple[list[float], list[float]]:
    """Of the points that have this score: the root of the KL (an estimate below 0 counts as 0), and the gain over
    `start` in units of `std`; in the score's own units if that is 0."""
    scored = [point for point in points if getattr(point, name) is not None]
    gains = [(getattr(point, name) - start) / (std or 1.0) for point in scored]
    return [sqrt(max(0.0, point.kl_nats)) for point in scored], gains


def _half_width(point: EvalPoint, name: str) -> float:
    """Half the 95% interval of a mean score; 0 of a single answer, whose spread is unknown."""
    return SURE * getattr(point, f"{name}_std") / sqrt(point.answers - 1) if point.answers > 1 else 0.0


def _draw_band(axes: "Axes", points: Sequence[EvalPoint], name: str, colour: str) -> None:
    """The 95% intervals of the means of a curve."""
    means, widths = [getattr(point, name) for point in points], [_half_width(point, name) for point in points]
    low, high = ([mean + sign * width for mean, width in zip(means, widths, strict=True)] for sign in (-1, 1))
    axes.fill_between([point.step for point in points], low, high, color=colour, alpha=0.15, linewidth=0)


def _draw_disagreement(axes: "Axes", points: Sequence[EvalPoint]) -> None:
    """How far the members of the reward are apart, above and below it, if it is an ensemble."""
    for sign, words in ((1, "± the members' disagreement"), (-1, None)):
        ends = [(point.step, point.proxy + sign * point.spread) for point in points if point.spread is not None]
        if ends:
            axes.plot(*zip(*ends, strict=True), ":", color=BLUE, linewidth=1, label=words)
            axes.legend(fontsize=10, loc="best")


def _draw_shares(axes: "Axes", points: Sequence[EvalPoint]) -> None:
    curve(axes, points, "distinct", GREEN, label="distinct-2", zorder=3, **DASHED)
    curve(axes, points, "repeated", PURPLE, label="repeated lines", zorder=3)
    shares(axes, points, {"ended": ("answers that end", BLUE)}, count="answers")
    label(axes, "Do answers end, and do they loop?", STEPS, "share")


def _draw_updates(axes: "Axes", points: Sequence[EvalPoint]) -> None:
    curve(axes, points, "entropy", BLUE)
    axes.set_ylim(bottom=0)
    label(axes, "Entropy and clipping", STEPS, "")
    other = _second_scale(axes, "entropy (nats a token)", "clipped ratios")
    updated = [point for point in points if point.step]  # before the first update there is nothing to clip
    curve(other, updated, "clipped", ORANGE, **DASHED)
    other.set_ylim(0, 1.1 * max([0.01, *(point.clipped for point in updated)]))
    other.yaxis.set_major_formatter("{x:.1%}")


def _second_scale(axes: "Axes", left: str, right: str) -> "Axes":
    """A second y axis on the right; each axis has the colour of its curve."""
    other = axes.twinx()
    for side, words, colour in ((axes, left, BLUE), (other, right, ORANGE)):
        side.set_ylabel(words, fontsize=12, color=colour)
        side.tick_params(axis="y", colors=colour)
    other.spines[["top", "left"]].set_visible(False)
    return other


def _signed(value: float) -> str:
    return f"{value:+.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:+.2g}"
