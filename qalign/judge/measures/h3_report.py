"""The picture of `qalign.h3`: every measure of the base and of each run, with 95% intervals. Imports no torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalign.reports.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED)
PARTS = {"helpful": "Helpful", "harmless": "Harmless", "honest": "Honest"}
Figures = dict[str, Any]


def draw(runs: list[Figures], file: Path) -> None:
    """Draws the figures of runs on one base, as `h3.json` holds them, as a PNG of 1200 pixels."""
    parts = {part: [m for m in runs[0]["measures"] if m["part"] == part] for part in PARTS}
    parts = {part: measures for part, measures in parts.items() if measures}
    heights = [len(measures) + 0.7 for measures in parts.values()]
    with picture(file, (12, 1.6 + 0.85 * sum(heights)), pad=0.15) as figure:
        name = Path(runs[0]["base"]).name
        figure.suptitle(f"Helpful, harmless, honest: {name} before and after (95% intervals)", fontsize=16)
        found = figure.subplots(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axes, (part, measures) in zip(found, parts.items(), strict=True):
            _draw_part(axes, PARTS[part], [m["name"] for m in measures], runs)
        handles, labels = found[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=11)


def _draw_part(axes: "Axes", title: str, names: list[str], runs: list[Figures]) -> None:
    sides = [(f"base: {Path(runs[0]['base']).name}", GREY, runs[0], "before")]
    for number, run in enumerate(runs):
        place = Path(run["run"])
        sides.append((f"{place.parent.name}/{place.name}", COLOURS[number % len(COLOURS)], run, "after"))
    step = 0.7 / max(2, len(sides))
    for row, (words, colour, figures, side) in enumerate(sides):
        given = {measure["name"]: measure[side] for measure in figures["measures"]}
        points = [(place, given[name]) for place, name in enumerate(names) if given.get(name)]
        heights = [-place - (row - (len(sides) - 1) / 2) * step for place, _ in points]
        axes.hlines(
            heights, *zip(*(point["interval"] for _, point in points), strict=True), color=colour, linewidth=2.5
        )
        axes.plot([point["value"] for _, point in points], heights, "o", color=colour, markersize=8, label=words)
    axes.set_title(title, fontsize=14, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    of_names = {measure["name"]: measure for measure in runs[0]["measures"]}
    axes.set_yticks([-place for place in range(len(names))], [_words(of_names[name]) for name in names], fontsize=11)
    axes.set_ylim(-len(names) + 0.4, 0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(axis="x", alpha=0.3)


def _words(measure: Figures) -> str:
    count = measure["after"]["count"]
    return f"{measure['words']}\n({'less' if measure['less_is_better'] else 'more'} is better; {count})"
