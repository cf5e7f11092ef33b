"""What happens when a person does something in the tab Train: updates of its widgets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from qalign.errors import UserError
from qalign.page.training.commands import Job, recipes, stages_of, typed
from qalign.page.training.drawing import run_html
from qalign.page.training.html import paragraph
from qalign.page.training.process import Training, chosen_run, log_file, printed, tail
from qalign.page.training.uploads import Uploads
from qalign.reports.curves import view

OWN_ROWS = ("the recipe's own", "")
CHOICE = ("recipe", "stage", "data", "settings", "card", "overwrite")  # widgets, in the order of `Job`'s fields
RUN = ("curves", "log", "train", "resume", "stop", "open", "timer")  # widgets that show a run, as `run_updates` does
FREED = "The page's own base has left the memory for this run. A question in Compare loads it again, beside the run."
STOPPING = "It stops after this step, and writes a checkpoint."


class Actions:
    """What the buttons do. The run that is shown is the one at work, else the one that was chosen last. `unload` frees
    the memory of the page's own base, and says whether there was one."""

    def __init__(self, training: Training, uploads: Uploads, unload: Callable[[], bool]):
        self.training, self.uploads, self._unload = training, uploads, unload

    def select(self, run: Path | None, recipe: str, *others: Any) -> list[Any]:
        """The tab is opened: `CHOICE`'s first three, the commands, the run, and `RUN`."""
        found = recipes(Path())
        recipe = recipe or next(iter(found), "")
        stages, stage = stages_and(recipe, others[0])
        job = job_of(recipe, stage, *others[1:])
        now = self.training.at_work() or run or chosen_run(job)
        lists = [gr.Dropdown(found, value=recipe), gr.Dropdown(stages, value=stage), self.rows()]
        return [*lists, commands(job), now, *self.run_updates(now)]

    def choose_recipe(self, recipe: str, *others: Any) -> list[Any]:
        """Another recipe: its stages, and what `choose` gives."""
        stages, stage = stages_and(recipe, others[0])
        return [gr.Dropdown(stages, value=stage), *self.choose(recipe, stage, *others[1:])]

    def choose(self, *values: Any) -> list[Any]:
        """Other settings: the commands, the run, and `RUN`."""
        job = job_of(*values)
        now = self.training.at_work() or chosen_run(job)
        return [commands(job), now, *self.run_updates(now)]

    def train(self, run: Path | None, *values: Any, resume: bool = False) -> list[Any]:
        """Starts a run, or goes on with it: the run, the status, and `RUN`."""
        try:
            run = self.training.start(job_of(*values), resume=resume)
        except (UserError, OSError) as error:
            return [run, paragraph(str(error)), *self.run_updates(run)]
        return [run, paragraph(FREED if self._unload() else ""), *self.run_updates(run)]

    def resume(self, run: Path | None, *values: Any) -> list[Any]:
        return self.train(run, *values, resume=True)

    def stop(self, run: Path | None) -> str:
        """Asks the run to stop: the status."""
        try:
            if run:
                self.training.stop(run)
        except (UserError, OSError) as error:
            return paragraph(str(error))
        return paragraph(STOPPING)

    def tick(self, run: Path | None, *values: Any) -> list[Any]:
        """The commands, the status and `RUN`, while a run is at work and once more after it."""
        updates = self.run_updates(run)
        if run and run == self.training.at_work():  # the tab may have been left since: its timer isn't started again
            return [gr.skip(), gr.skip(), *updates[:-1], gr.skip()]
        problem = self.training.problem(run) if run else ""
        return [commands(job_of(*values)), paragraph(problem), *updates]

    def look(self, words: Callable[[Job], list[str]], *values: Any) -> list[Any]:
        """Runs a command that only reads: what it printed, and the status."""
        try:
            return [gr.Textbox(printed(words(job_of(*values))), visible=True), ""]
        except UserError as error:
            return [gr.skip(), paragraph(str(error))]

    def receive(self, name: str, size: float, start: float, piece: str) -> list[Any]:
        """A piece of a file from the browser, or none: a number that changes if the next piece is wanted, the rows to
        choose from, and the status."""
        if not name:
            return [0, gr.skip(), gr.skip()]
        try:
            file = self.uploads.add(name, int(size), int(start), piece)
        except (UserError, OSError) as error:
            return [0, gr.skip(), paragraph(str(error))]
        if file is None:
            return [int(start) + 1, gr.skip(), paragraph(f"{name}: {start / size:.0%} uploaded")]
        return [0, self.rows(str(file)), paragraph(f"{file} is uploaded. Check its rows.")]

    def rows(self, chosen: str | None = None) -> gr.Dropdown:
        """The rows to choose from: the recipe's own, and what was uploaded."""
        choices = [OWN_ROWS, *((name, name) for name in self.uploads.names())]
        return gr.Dropdown(choices) if chosen is None else gr.Dropdown(choices, value=chosen)

    def run_updates(self, run: Path | None) -> list[Any]:
        """Updates of the widgets in `RUN` for the run in a folder, which may not have begun."""
        busy, now, log = self.training.at_work(), view(run) if run else None, tail(log_file(run)) if run else ""
        at_work = busy is not None and busy == run
        begun = now is not None and (at_work or bool(now.lines) or (now.path / "recipe.yaml").is_file())
        state = now.state if now and begun else ""
        return [
            run_html(now) if begun else "",
            gr.Textbox(log, visible=True) if log else gr.skip(),
            gr.Button(visible=busy is None),
            gr.Button(visible=busy is None and state == "stopped"),
            gr.Button(visible=at_work),
            gr.Button(visible=busy is None and state == "finished"),
            gr.Timer(active=at_work),
        ]


def job_of(recipe: Any, stage: Any, rows: Any, settings: Any, card: Any, overwrite: Any) -> Job:
    """What the widgets hold, as a job; a crafted request may hold anything."""
    texts = [str(text or "").strip() for text in (recipe, stage, rows, settings, card)]
    return Job(*texts, overwrite=bool(overwrite))


def stages_and(recipe: str, stage: Any) -> tuple[list[str], str | None]:
    """The stages of a recipe, and the one to choose: this one if it is among them, else the first."""
    found = stages_of(recipe or "")
    return found, stage if stage in found else next(iter(found), None)


def commands(job: Job) -> str:
    """The commands that the buttons run, one a line; or what is wrong with the settings."""
    if not (job.recipe and job.stage):
        return ""
    try:
        lines, run = [job.check(), job.fit(), job.train()], chosen_run(job)
    except UserError as error:
        return str(error)
    if run and (run / "recipe.yaml").is_file() and not (run / "summary.json").is_file():
        lines.append(job.resume())
    return "\n".join(map(typed, lines))
