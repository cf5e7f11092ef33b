"""What a comparison leaves: figures, a picture, files for other tools, and the verdict in words.

Imports no matplotlib until it draws.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qalign.config.atomic import write_whole
from qalign.errors import UserError
from qalign.judge.comparison.answer_files import Compared, as_text, write_files
from qalign.judge.comparison.judges import ANNOTATIONS
from qalign.judge.logistic import sigmoid
from qalign.judge.win_rate import Floats, Interval, WinRate, win_rate
from qalign.reports.plots import BLUE, GREY, ORANGE, counted, label, picture
from qalign.train.run_folder import print_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURES, PICTURE = "compare.json", "compare.png"
BINS = 8  # of lengths
FULL_NAMES = {
    "rate": "win_rate",
    "controlled": "length_controlled",
    "controlled_interval": "length_controlled_interval",
}


def preferences_of(rows: Sequence[Compared], found: Sequence[float | None]) -> tuple[Floats, Floats, Floats]:
    """(P(A is better), NaN for none; lengths of A's and of B's answers). A `UserError` if there is no judgement."""
    p = np.array([np.nan if preference is None else preference for preference in found])
    if np.isnan(p).all():
        raise UserError(f"--judge: gave no judgement on any of {counted(len(rows), 'pair')}")
    a, b = (np.array([float(len(text)) for text in texts]) for texts in zip(*((r.a, r.b) for r in rows), strict=True))
    return p, a, b


def finish(
    folder: Path, names: tuple[str, str], judge: str, rows: Sequence[Compared], found: Sequence[float | None]
) -> None:
    """Writes figures, picture and files, and says who won."""
    folder.mkdir(parents=True, exist_ok=True)
    p, a, b = preferences_of(rows, found)
    result = win_rate(p, a, b, [as_text(row.turns) for row in rows])
    figures: dict[str, Any] = {"a": names[0], "b": names[1], "judge": judge, "pairs": len(rows)}
    figures |= asdict(result) | {"unjudged": int(np.isnan(p).sum()), "follows_length": result.follows_length}
    for name, full in FULL_NAMES.items():
        figures[full] = figures.pop(name)
    figures |= {"mean_length": [float(a.mean()), float(b.mean())]}
    figures |= {"ended": [sum(row.ended[side] for row in rows) / len(rows) for side in (0, 1)]}
    write_files(folder, names, judge, rows, found)
    draw(folder / PICTURE, result, p, a, b, names, judge)
    write_whole(folder / FIGURES, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    print_table(f"{names[0]} against {names[1]}, judged by {judge}", _in_words(folder, result, figures))


def _in_words(folder: Path, result: WinRate, figures: dict[str, Any]) -> list[tuple[str, str]]:
    low, high = result.interval
    counts = f"{result.wins} won, {result.ties} tied, {result.losses} lost, {counted(result.prompts, 'prompt')}"
    lines = [("win rate", f"{result.rate:.1%} (95% interval {low:.1%} to {high:.1%}): {counts}")]
    if result.controlled is not None:
        bounds = result.controlled_interval
        said = "too few prompts to tell" if bounds is None else f"95% interval {bounds[0]:.1%} to {bounds[1]:.1%}"
        lines.append(("at equal length", f"{result.controlled:.1%} ({said}), length-controlled"))
    if result.follows_length:
        lines.append(("", "length alone explains nearly all judgements: this judge says little else"))
    if figures["unjudged"]:
        lines.append(("unjudged", f"{figures['unjudged']}: too long for the judge, or it named no answer"))
    one, other = figures["mean_length"]
    lines.append(("length", f"{one:,.0f} and {other:,.0f} characters on average"))
    verdict = "the interval holds 50%: no difference shown"
    if not low <= 0.5 <= high:
        verdict = f"{figures['a'] if low > 0.5 else figures['b']} is better, by this judge"
        bounds = result.controlled_interval
        if bounds and bounds[0] <= 0.5 <= bounds[1]:
            verdict += ", but at equal length no difference is shown"
    return [
        *lines,
        ("verdict", verdict),
        ("files", f"{folder}: {FIGURES}, {PICTURE}, {ANNOTATIONS}, alpaca_eval/, arena_hard/"),
    ]


def draw(file: Path, result: WinRate, p: Floats, a: Floats, b: Floats, names: tuple[str, str], judge: str) -> None:
    """Draws the figures of a comparison. `p`: P(A is better) `(judgements,)`, NaN for none; `a`, `b`: lengths."""
    with picture(file, (10.5, 4.2), 0.12) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
        bars: list[tuple[str, float, Interval | None, str]] = [("raw", result.rate, result.interval, BLUE)]
        if result.controlled is not None:
            bars.append(("at equal\nlength", result.controlled, result.controlled_interval, ORANGE))
        for place, (_, rate, interval, colour) in enumerate(bars):
            left.bar(place, rate, width=0.55, color=colour)
            low, high = interval or (rate, rate)
            left.vlines(place, low, high, color="black", linewidth=1.6)
            left.text(place, min(high + 0.03, 0.97), f"{rate:.1%}", ha="center", fontsize=12)
        left.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
        left.set_xlim(-0.6, 1.6)
        left.set_ylim(0, 1.05)
        left.set_xticks(range(len(bars)), [name for name, *_ in bars])
        left.yaxis.set_major_formatter("{x:.0%}")
        label(left, f"{_short(names[0])} wins", f"against {_short(names[1])}, judged by {_short(judge)}", "win rate")
        _by_length(right, result, p, a, b)
        label(right, "Does the judge follow length?", "A's answer minus B's, in characters", "P(A is better)")
        right.legend(fontsize=10, loc="upper left")


def _by_length(axes: "Axes", result: WinRate, p: Floats, a: Floats, b: Floats) -> None:
    """Mean preference in bins of equal size by the difference of lengths, with the model that controls for it."""
    has = ~np.isnan(p)
    apart, given = (a - b)[has], p[has]
    order = np.argsort(apart, kind="stable")
    parts = [part for part in np.array_split(order, min(BINS, len(order))) if len(part)]
    axes.plot(apart, given, ".", color=GREY, alpha=0.35, markersize=5, label="a pair")
    means = [apart[part].mean() for part in parts], [given[part].mean() for part in parts]
    axes.plot(*means, "o", color=BLUE, label=f"mean of {len(parts[0])} pairs")
    if result.controlled is not None and result.length_weight is not None and 0 < result.controlled < 1:
        constant = np.log(result.controlled / (1 - result.controlled))
        x = np.linspace(apart.min(), apart.max(), 200)
        spread = (a - b).std(ddof=1) or 1.0
        fitted = sigmoid(result.length_weight * np.tanh(x / spread) + constant)
        axes.plot(x, fitted, color=ORANGE, label="model of length")
    axes.axvline(0, color=GREY, linestyle="--", linewidth=1)
    axes.set_ylim(-0.05, 1.3)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])


def _short(name: str) -> str:
    return name if len(name) <= 32 else f"…{name[-31:]}"
