"""Shows a run in the terminal, while it is at work or afterwards: its curves as text, and its alarms.

    python -m qalign.watch RUN [--show NAME …]     # RUN: runs/demo/dpo; runs/demo is the one at work, or the newest

It draws anew until the run ends or you press Ctrl-C; in a pipe it prints once. The figures are those of metrics.jsonl.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from qalign.cli import Parser, program, run_parsed
from qalign.config.paths import expanded, names_of_files
from qalign.errors import UserError, did_you_mean, one_line
from qalign.reports.curves import Curve, RunView, run_in, view, word

EVERY_SECONDS = 2.0
PANEL_WIDTH, PANEL_HEIGHT, LOWEST = 40, 14, 8  # characters; a panel is as wide and high, or as low, as there is room
IN_A_PIPE = (80, 24)  # columns and lines, which is what plotext takes there
MARKERS = ("braille", "hd")  # of a panel's curves: thin and thick
MOST_TICKS = 6
CLEAR = "\x1b[H\x1b[2J\x1b[3J"


def watch(args: argparse.Namespace) -> None:
    """Shows the run until it ends, or once if the output is no terminal."""
    folder = expanded(args.run)
    run = run_in(folder) if folder.is_dir() else None
    if run is None:
        near = "" if folder.is_dir() else did_you_mean(folder.name, names_of_files(folder.parent))
        raise UserError(f"{args.run}: there is no run{near}; a run's folder is <output>/<stage>, such as runs/demo/dpo")
    found, is_terminal = view(run), sys.stdout.isatty()
    if unknown := [name for name in args.show if name not in found.names()]:
        hint = did_you_mean(unknown[0], found.names()) or f"; it has {', '.join(found.names())}"
        raise UserError(f"--show {unknown[0]}: metrics.jsonl of this run has no such figure{hint}")
    if not is_terminal:
        print(drawn(found, args.show, IN_A_PIPE, coloured=False))
        return
    coloured = not os.environ.get("NO_COLOR")
    try:
        while True:
            size = shutil.get_terminal_size()
            print(CLEAR + drawn(found, args.show, size, coloured=coloured), flush=True)
            if found.state != "running":
                return
            time.sleep(EVERY_SECONDS)
            found = view(run)
    except KeyboardInterrupt:  # how one leaves it: the run goes on
        print()


def drawn(run: RunView, wanted: Sequence[str], size: tuple[int, int], *, coloured: bool) -> str:
    """The run as text for a terminal of `size` (columns, lines)."""
    width, height = size
    holder = f" by {run.holder}" if run.holder else ""
    head = [f"{run.path}: {run.state}{holder}, {len(run.lines):,} lines, at step {run.step:,}"]
    head += [f"alarm at {alarm}" for alarm in run.alarms[:3]]
    panels = run.panels(wanted)
    if not panels:
        begins = run.state == "running"
        head.append("no figure yet: the base is being loaded, or rows are read" if begins else "no figure was logged")
    if coloured:  # a line that is broken would move the plots out of sight
        head = [one_line(line, width) for line in head]
    return "\n".join([*head, plotted(panels, width, height - len(head) - 2, coloured=coloured)]).rstrip()


def plotted(panels: dict[str, list[Curve]], width: int, height: int, *, coloured: bool) -> str:
    """The panels in a grid, as text."""
    import plotext

    if not panels:
        return ""
    columns = max(1, min(len(panels), width // PANEL_WIDTH))
    rows = -(-len(panels) // columns)
    figure: Any = plotext.figure
    figure.clear()
    figure.plot_size(width, rows * max(LOWEST, min(PANEL_HEIGHT, height // rows)))
    if len(panels) > 1:
        figure.subplots(rows, columns)
    for place, (title, curves) in enumerate(panels.items()):
        panel = figure.subplot(place // columns + 1, place % columns + 1) if len(panels) > 1 else figure
        panel.theme("default" if coloured else "colorless")
        last = (f"{word(curve, curves)} {curve.values[-1]:.4g}".strip() for curve in curves)
        panel.title(f"{title}: {', '.join(last)}")
        for curve, marker in zip(curves, MARKERS, strict=False):
            panel.draw(panel.signal(curve.steps, curve.values, marker=marker).lines())
        panel.ruler("x").ticks(ticks := _ticks(curves), [f"{tick:,}" for tick in ticks])
    text = str(figure.build())
    return "\n".join(line.rstrip() for line in (text if coloured else plotext.uncolorize(text)).splitlines())


def _ticks(curves: Sequence[Curve]) -> list[int]:
    """A few steps for the axis, the first and the last among them."""
    first, last = min(curve.steps[0] for curve in curves), max(curve.steps[-1] for curve in curves)
    apart = max(1, -(-(last - first) // (MOST_TICKS - 1)))
    return [*range(first, last, apart), last]


def main(words: Sequence[str] | None = None) -> None:
    parser = Parser(prog=program("watch"), description="Show a run in the terminal: its curves as text.")
    parser.add_argument("run", metavar="RUN", help="a run's folder, such as runs/demo/dpo, or runs/demo")
    parser.add_argument("--show", nargs="+", default=[], metavar="NAME", help="these figures of metrics.jsonl alone")
    run_parsed(parser, watch, words)


if __name__ == "__main__":
    main()
