"""What the pictures have in common: colours, labels, and a figure that is saved whole. Imports no matplotlib."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

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
    with replacing(file) as aside:
        figure.savefig(aside, format="png")


def label(axes: "Axes", title: str, x: str, y: str) -> None:
    """Sets the title and both axis labels, and removes the frame on the right and above."""
    axes.set_title(title, fontsize=13)
    axes.set_xlabel(x, fontsize=12)
    axes.set_ylabel(y, fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)


def counted(number: int, noun: str) -> str:
    """`1 pair` or `2,000 pairs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
