"""What the pictures have in common: colours, labels, and a figure that is saved whole. Imports no matplotlib."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalign.config.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#8C8C8C"


@contextmanager
def picture(file: Path, inches: tuple[float, float], pad: float) -> Iterator["Figure"]:
    """Yields an empty figure and saves it whole, as a PNG of 100 pixels per inch, once the block has ended without an
    error."""
    # Imported here, not above: a run that draws nothing should not wait. No pyplot, because it keeps global state.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=inches, dpi=100, layout=ConstrainedLayoutEngine(w_pad=pad, h_pad=pad))
    yield figure
    render(figure, file)


def render(figure: "Figure", file: Path) -> None:
    """Lays the figure out and writes it as a PNG, which takes most of a picture's time."""
    with replacing(file) as aside:
        figure.savefig(aside, format="png")


def label(axes: "Axes", title: str, x: str, y: str) -> None:
    """Sets the title and both axis labels, and removes the frame on the right and above."""
    axes.set_title(title, fontsize=13)
    axes.set_xlabel(x, fontsize=12)
    axes.set_ylabel(y, fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)


def curve(axes: "Axes", points: Sequence[Any], name: str, colour: str, **style: Any) -> None:
    """Draws a figure of the points over their steps."""
    steps = [point.step for point in points]
    axes.plot(steps, [getattr(point, name) for point in points], marker="o", color=colour, **style)
    axes.locator_params(axis="x", integer=True)
    axes.ticklabel_format(axis="y", useOffset=False)
    if len(points) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)


def shares(axes: "Axes", points: Sequence[Any], names: dict[str, tuple[str, str]], count: str) -> None:
    """Draws shares of a `count` over the steps, with their 95% intervals and a legend; `names`: words and colour."""
    from qalign.reports.reward_report import wilson  # it imports NumPy, which takes a while

    for name, (words, colour) in names.items():
        bounds = [wilson(getattr(point, name), getattr(point, count)) for point in points]
        axes.vlines([point.step for point in points], *zip(*bounds, strict=True), color=colour, linewidth=1, alpha=0.5)
        curve(axes, points, name, colour, label=words)
    axes.set_ylim(-0.03, 1.3)  # leaves room for the legend above every curve
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(fontsize=10, loc="upper center", ncols=2)


def mark_steps(axes: "Axes", steps: Sequence[int]) -> None:
    """Marks the steps at which an alarm was raised."""
    for step in steps:
        axes.axvline(step, color=RED, linestyle=":", linewidth=1.5)


def counted(number: int, noun: str) -> str:
    """`1 pair` or `2,000 pairs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
