"""Can this labeller judge? Its agreement with people, beside a judge of length; its position bias; and a picture.

Made of plain numbers; imports no torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qalign.reports.plots import BLUE, GREY, ORANGE, counted, label, picture
from qalign.reports.reward_report import COIN, Figures, ScoredPair, wilson
from qalign.reports.reward_report import measure as measure_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SURE = 1e-12  # the least distance of a probability from 0 and 1, for its logit
BIASED = 0.1  # of P("first") from one half, averaged over both orders: from here on it is said


def measure(probabilities: np.ndarray, pairs: Sequence[tuple[int, int, float]], names: Sequence[str]) -> Figures:
    """The labeller on pairs that people judged.

    Args:
        probabilities: P(the people's answer is better) `(pairs, principles, 2)`, that answer in first and second place.
        pairs: (tokens of the people's answer, tokens of the other, the people's probability that theirs is better).
        names: of the principles.

    Returns:
        `agreement` with its 95% `interval` (Wilson's): the share of `pairs` on which the mean over principles and
        orders prefers the people's answer; a tie counts half. `length_agreement`, `length_interval`: of a judge that
        prefers the longer answer. `beats_length_judge_p`: of a sign test where the two differ. `first_place`: mean
        P("first"), 0.5 without position bias. `consistent`: share of judgements that both orders decide alike.
        `by_principle`: `{"name", "agreement", "interval"}`. `calibration`, `calibration_error`: of the reward report.
        `means`: of each pair, the mean over principles in both orders, for the picture.
    """
    mean = np.clip(probabilities.mean(axis=(1, 2)), SURE, 1 - SURE)
    logits = np.log(mean) - np.log1p(-mean)
    scored = [
        ScoredPair(float(logit), 0.0, ours, others, None, probability)
        for logit, (ours, others, probability) in zip(logits, pairs, strict=True)
    ]
    found = measure_scores(scored)
    of_principles = np.sign(probabilities.mean(axis=2) - COIN)  # (pairs, principles)
    people = np.array([2 * probability - 1 for *_, probability in pairs])
    shares = ((1 + of_principles * np.sign(people)[:, None]) / 2).mean(axis=0).tolist()
    return {
        "pairs": len(pairs),
        "agreement": found["accuracy"],
        "interval": found["accuracy_interval"],
        "length_agreement": found["length_accuracy"],
        "length_interval": wilson(found["length_accuracy"], len(pairs)),
        "beats_length_judge_p": found["beats_length_judge_p"],
        "first_place": float((probabilities[..., 0] + 1 - probabilities[..., 1]).mean() / 2),
        "consistent": float(((probabilities > COIN).sum(axis=2) != 1).mean()),
        "by_principle": [
            {"name": name, "agreement": share, "interval": wilson(share, len(pairs))}
            for name, share in zip(names, shares, strict=True)
        ],
        "calibration": found["calibration"],
        "calibration_error": found["calibration_error"],
        "means": probabilities.mean(axis=1).round(6).tolist(),
    }


def can_judge(figures: Figures) -> bool:
    """Whether the whole 95% interval of its agreement lies above a coin's."""
    return figures["interval"][0] > COIN


def verdict(figures: Figures) -> list[str]:
    """What the figures mean, a sentence each."""
    low, high = figures["interval"]
    agrees = f"it agrees with people on {figures['agreement']:.1%} of {counted(figures['pairs'], 'pair')}"
    shown = f"{agrees} (95% interval {low:.1%} to {high:.1%}), a coin on {COIN:.0%}"
    if can_judge(figures):
        said = [f"this labeller can judge: {shown}"]
    elif high < COIN:
        said = [f"this labeller judges the wrong way: {shown}; are chosen and rejected swapped?"]
    else:
        said = [f"this labeller can't judge: {shown}"]
    longer, p_value = figures["length_agreement"], figures["beats_length_judge_p"]
    beside = f"always preferring the longer answer agrees on {longer:.1%}"
    if can_judge(figures) and longer > COIN:
        shows = "more" if p_value <= 0.05 and figures["agreement"] > longer else "no more"
        beside += f", so it is shown to judge by {shows} than length"
    first = figures["first_place"]
    bias = "" if abs(first - COIN) < BIASED else f": it prefers the {'first' if first > COIN else 'second'} place"
    place = f"P(first) is {first:.1%} on average{bias}; both orders decide {figures['consistent']:.1%} alike"
    return [*said, beside, place]


def draw(figures: Figures, file: Path) -> None:
    """Writes the report as a PNG of 1300 x 1000 pixels."""
    low, high = figures["interval"]
    can = "can judge" if can_judge(figures) else "can't judge"
    with picture(file, (13, 10), pad=0.15) as figure:
        pairs = counted(figures["pairs"], "human pair")
        agrees = f"agrees on {figures['agreement']:.1%} of {pairs} (95% interval {low:.1%} to {high:.1%})"
        figure.suptitle(f"This labeller {can}: it {agrees}", fontsize=16)
        (judges, principles), (places, calibration) = figure.subplots(2, 2)
        _draw_judges(judges, figures)
        _draw_principles(principles, figures)
        _draw_places(places, figures)
        _draw_calibration(calibration, figures)


def _draw_judges(axes: "Axes", figures: Figures) -> None:
    shares = [figures["agreement"], figures["length_agreement"], COIN]
    axes.bar(range(3), shares, width=0.6, color=[BLUE, ORANGE, GREY])
    intervals = [figures["interval"], figures["length_interval"]]
    axes.vlines(range(2), *zip(*intervals, strict=True), color="black", linewidth=2)
    for x, (share, (_, high)) in enumerate(zip(shares, [*intervals, (COIN, COIN)], strict=True)):
        axes.text(x, high + 0.02, f"{share:.1%}", ha="center", fontsize=12)
    axes.axhline(COIN, color=GREY, linestyle="--")
    axes.set_xticks(range(3), ["this labeller", "prefers the\nlonger answer", "a coin"], fontsize=11)
    axes.set_ylim(0, 1.12)
    axes.yaxis.set_major_formatter("{x:.0%}")
    label(axes, "Agreement with people (bars: 95% intervals)", "", "pairs")


def _draw_principles(axes: "Axes", figures: Figures) -> None:
    found = figures["by_principle"][::-1]
    rows, shares = range(len(found)), [each["agreement"] for each in found]
    axes.hlines(rows, *zip(*(each["interval"] for each in found), strict=True), color=BLUE, linewidth=1.5)
    axes.plot(shares, rows, "o", color=BLUE)
    axes.axvline(COIN, color=GREY, linestyle="--")
    axes.set_yticks(rows, [each["name"] for each in found], fontsize=10)
    axes.xaxis.set_major_formatter("{x:.0%}")
    label(axes, "Agreement by each principle alone", "pairs", "")


def _draw_places(axes: "Axes", figures: Figures) -> None:
    first, second = zip(*figures["means"], strict=True)
    axes.plot([0, 1], [1, 0], color=GREY, linestyle="--")
    axes.axhspan(COIN, 1, xmin=0.5, color=BLUE, alpha=0.06)
    axes.axhspan(0, COIN, xmax=0.5, color=BLUE, alpha=0.06)
    axes.scatter(first, second, s=18, alpha=0.6, linewidths=0, color=BLUE)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.text(0.98, 0.44, "only the first place counts", ha="right", fontsize=10, color=GREY)
    axes.text(0.02, 0.53, "only the second place counts", fontsize=10, color=GREY)
    title = f"Position bias: P(first) is {figures['first_place']:.1%} on average"
    label(axes, title, "P(people's answer), when it stands first", "when it stands second")


def _draw_calibration(axes: "Axes", figures: Figures) -> None:
    bins = figures["calibration"]
    predicted = [each["predicted"] for each in bins]
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--")
    axes.vlines(predicted, *zip(*(each["interval"] for each in bins), strict=True), color=BLUE, linewidth=1.5)
    axes.plot(predicted, [each["observed"] for each in bins], "o", color=BLUE, markersize=8)
    axes.set_xlim(0.48, 1.02)
    axes.set_ylim(-0.03, 1.03)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:.0%}")
    title = f"As right as it is sure? Off by {figures['calibration_error']:.1%}"
    label(axes, title, "how sure the labeller is of its pick", "picks that agree with people")
