"""A run as HTML: its state, its alarms, and its curves as SVG. A browser shows new curves at once and in the colours of
its theme; Gradio's own plots take up to a second each to appear, and are blank until then."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from qalign.page.training.html import paragraph
from qalign.reports.curves import Curve, RunView, word
from qalign.reports.plots import BLUE, ORANGE

WIDTH, HEIGHT = 380, 170  # of a panel, in the units of its SVG, which are about pixels
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 22  # from the edges of a panel to those of its axes
MAX_POINTS = 600  # of a curve, more than a panel has pixels
MAX_ALARMS = 3
COLOURS = (BLUE, ORANGE)  # of the first and the second curve; what is held out is always orange


class Axis(NamedTuple):
    """The range of values that an axis spans, and its tick labels."""

    low: float
    high: float
    ticks: list[float]

    def share(self, value: float) -> float:
        """How far along the axis a value lies, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)


def run_html(run: RunView | None, without: str = "") -> str:
    """A run, or the message `without` if there is none."""
    if run is None:
        return paragraph(without)
    panels = "".join(panel(title, curves) for title, curves in run.panels().items())
    return about(run) + (f'<div class="panels">{panels}</div>' if panels else "")


def about(run: RunView) -> str:
    """State, step and alarms of a run."""
    state = f"<b>{run.state}</b>" + (f" by {escape(str(run.holder))}" if run.holder else "")
    begins = "the base is being loaded, or rows are read" if run.holder else "no figure was logged"
    alarms = "".join(f'<p class="alarm">Alarm at {escape(alarm)}</p>' for alarm in run.alarms[:MAX_ALARMS])
    return f"<p>{escape(str(run.path))}: {state}, {f'step {run.step:,}' if run.lines else begins}</p>{alarms}"


def panel(title: str, curves: Sequence[Curve]) -> str:
    """One panel: its title, the last value of each curve in the curve's colour, and the curves."""
    words = [word(curve, curves) or ("training" if len(curves) > 1 else "") for curve in curves]
    last = [f"{name} {curve.values[-1]:.4g}".strip() for name, curve in zip(words, curves, strict=True)]
    coloured = [(curve, COLOURS[words[number] == "held out" or number % 2]) for number, curve in enumerate(curves)]
    legend = "".join(
        f'<span><i style="background: {colour}"></i>{escape(text)}</span>'
        for text, (_, colour) in zip(last, coloured, strict=True)
    )
    said = escape(f"{title} over the steps: {', '.join(last)}")
    return (
        f'<figure><figcaption><b>{escape(title)}</b>{legend}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{said}">{drawn(coloured)}</svg></figure>'
    )


def drawn(coloured: Sequence[tuple[Curve, str]]) -> str:
    """Axes and curves, each with its colour, as the inside of an SVG."""
    x = axis([step for curve, _ in coloured for step in curve.steps], whole=True)
    y = axis([value for curve, _ in coloured for value in curve.values])
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(step: float, value: float) -> tuple[float, float]:
        return round(LEFT + across * x.share(step), 1), round(TOP + down * (1 - y.share(value)), 1)

    found = []
    for tick in y.ticks:
        _, height = place(x.low, tick)
        found.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height}" y2="{height}"/>')
        found.append(f'<text x="{LEFT - 6}" y="{height + 4}" text-anchor="end">{tick:.4g}</text>')
    for tick in x.ticks:
        along, _ = place(tick, y.low)
        found.append(f'<text x="{along}" y="{HEIGHT - 6}" text-anchor="middle">{tick:,.0f}</text>')
    for curve, colour in coloured:
        points = [place(step, value) for step, value in thinned(curve)]
        if len(points) == 1:
            found.append(f'<circle cx="{points[0][0]}" cy="{points[0][1]}" r="3" fill="{colour}"/>')
        line = " ".join(f"{along},{height}" for along, height in points)
        found.append(f'<polyline points="{line}" stroke="{colour}"/>')
    return "".join(found)


def axis(values: Sequence[float], *, whole: bool = False) -> Axis:
    """An axis with round ticks that holds all values: steps, which are whole, from the first to the last, and figures
    from tick to tick."""
    from matplotlib.ticker import MaxNLocator  # imported here, because it takes a while

    low, high = min(values), max(values)
    if low == high:
        low, high = low - 1, high + 1
    ticks = [float(tick) for tick in MaxNLocator(5 if whole else 4, integer=whole).tick_values(low, high)]
    if whole:
        return Axis(low, high, [tick for tick in ticks if low <= tick <= high])
    return Axis(ticks[0], ticks[-1], ticks)


def thinned(curve: Curve) -> list[tuple[int, float]]:
    """(step, value) of a curve; of a long one every so many points, and the last."""
    points = [*zip(curve.steps, curve.values, strict=True)]
    every = -(-len(points) // MAX_POINTS)
    return [*points[: -1 if every > 1 else None : every], *(points[-1:] if every > 1 else [])]
