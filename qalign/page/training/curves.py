"""The tab with the curves of the runs under `runs/`, drawn anew while the run is at work and the tab is open. It needs
no base, so it is there before the first run has finished."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from qalign.page.training.drawing import run_html
from qalign.reports.curves import RunView, runs_under, view

EVERY_SECONDS = 2.0
MAX_RUNS = 500  # in the list
AT_ONCE = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}  # for an event of Gradio


class RunList:
    """The runs under a folder. A client chooses one by its name in this list, never by a path."""

    def __init__(self, folder: Path):
        self.folder = folder

    def names(self) -> list[str]:
        """Names such as `demo/dpo`: runs at work first, then the newest."""
        return [run.relative_to(self.folder).as_posix() for run in runs_under(self.folder)][:MAX_RUNS]

    def view(self, name: str | None) -> RunView | None:
        """The run of this name; None if it isn't in the list."""
        return view(self.folder / str(name)) if name in self.names() else None


def tab(runs: RunList) -> tuple[gr.Tab, gr.Timer]:
    """The tab, and the timer that draws it anew while the run in it is at work; `stop_others` stops it."""
    with gr.Tab("Curves", id="curves") as opened:
        chosen = gr.Dropdown([], label="Run", elem_id="curves-run")
        drawn, timer = gr.HTML(elem_id="curves"), gr.Timer(EVERY_SECONDS, active=False)

    def select(name: str | None) -> list[Any]:
        names = runs.names()
        name = name if name in names else next(iter(names), None)
        return [gr.Dropdown(names, value=name), *show(name)]

    def show(name: str | None) -> list[Any]:
        run = runs.view(name)
        html = run_html(run, f"There is no run under {runs.folder} yet.")
        return [html, gr.Timer(active=run is not None and run.state == "running")]

    def tick(name: str | None) -> list[Any]:
        html, now = show(name)
        return [html, gr.skip() if now.active else now]  # the tab may have been left since the tick

    opened.select(select, chosen, [chosen, drawn, timer], **AT_ONCE)
    chosen.input(show, chosen, [drawn, timer], trigger_mode="always_last", **AT_ONCE)
    timer.tick(tick, chosen, [drawn, timer], trigger_mode="once", **AT_ONCE)
    return opened, timer


def stop_others(tabs: Sequence[tuple[gr.Tab, gr.Timer | None]]) -> None:
    """Lets no timer run but that of the tab that is open."""
    for opened, own in tabs:
        for timer in {timer for _, timer in tabs if timer is not None} - {own}:
            opened.select(lambda: gr.Timer(active=False), None, timer, **AT_ONCE)
