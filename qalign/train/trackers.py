"""Trackers: every line of a run's `metrics.jsonl` goes to TensorBoard, trackio or Weights & Biases too (`log_to`).

Figures keep their names of `metrics.jsonl`; pictures have the name of their file, and sample answers are `samples`. A
resumed run goes on in the same run of the tracker: what the tracker holds already isn't sent again, and what it lacks
is sent from `metrics.jsonl`. So no step is there twice, and a tracker may be added when a run is resumed. A tracker
that fails later never ends a run. Imports no torch.
"""

import json
import math
import os
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tqdm.auto import tqdm

from qalign.config.atomic import write_whole
from qalign.config.recipe import Recipe
from qalign.config.stages import OTHERS, STAGES
from qalign.errors import UserError, one_line

PROJECT = "qalign"  # in trackio and wandb, unless TRACKIO_PROJECT or WANDB_PROJECT names another
RUN_ID = "run_id"  # file of the run folder: what tells the run from others of its name
FOLDER = "tensorboard"  # of the run folder, with TensorBoard's event files
SAMPLES = "samples"  # name of the sample answers, and their folder

Held = Callable[[int, str], bool] | None  # whether a tracker holds what has this step and name; None: it can't tell
Item = float | str | Path | list[dict[str, Any]]  # a figure, a text, a picture, or a table of sample answers


class Tracked(NamedTuple):
    """The run that trackers are told of."""

    path: Path  # its folder
    name: str  # such as `demo/dpo`
    id: str
    resumed: bool
    recipe: dict[str, Any]  # without the sections of other stages


class Tracker(Protocol):
    held: Held

    def __init__(self, run: Tracked) -> None: ...
    def send(self, step: int, items: dict[str, Item]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in `<run>/tensorboard`; `tensorboard --logdir runs` shows those of all runs."""

    def __init__(self, run: Tracked) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        folder = run.path / FOLDER
        there = _in_events(folder) if folder.is_dir() else set[tuple[int, str]]()
        self.held: Held = lambda step, name: (step, name) in there
        self._writer = SummaryWriter(str(folder))

    def send(self, step: int, items: dict[str, Item]) -> None:
        for name, item in items.items():
            if isinstance(item, Path):
                self._writer.add_image(name, _pixels(item), step, dataformats="HWC")
            elif isinstance(item, (str, list)):
                self._writer.add_text(name, item if isinstance(item, str) else _markdown(item), step)
            else:
                self._writer.add_scalar(name, item, step)
        self._writer.flush()  # a killed run loses nothing

    def close(self) -> None:
        self._writer.close()


class _Logged:
    """What trackio and wandb have in common: `_run` takes figures, and objects of their own for tables and pictures."""

    _run: Any
    _table: Any
    _image: Callable[[Path], Any]

    def send(self, step: int, items: dict[str, Item]) -> None:
        self._run.log({name: self._shown(item) for name, item in items.items()}, step=step)

    def _shown(self, item: Item) -> Any:
        if isinstance(item, Path):
            return self._image(item)
        if isinstance(item, list):
            return self._table(columns=[*item[0]], data=[[*row.values()] for row in item])
        return item

    def close(self) -> None:
        self._run.finish()


class Trackio(_Logged):
    """A run of trackio's project `qalign`, on this computer or wherever trackio's own variables say."""

    def __init__(self, run: Tracked) -> None:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        project, name = os.environ.get("TRACKIO_PROJECT", PROJECT), f"{run.name}-{run.id}"  # it resumes runs by name
        is_local = not (os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"))
        logged = SQLiteStorage.get_logs(project, run=name) if is_local and run.resumed else []
        there = {(line["step"], key) for line in logged for key in line}
        self.held: Held = (lambda step, key: (step, key) in there) if is_local else None
        resume = "allow" if run.resumed else "never"
        self._run = trackio.init(project, name, config=run.recipe, resume=resume, embed=False, auto_log_cpu=False)
        self._table, self._image = trackio.Table, lambda file: trackio.Image(_pixels(file))


class WeightsAndBiases(_Logged):
    """A run of the wandb project `qalign`; WANDB_MODE=offline keeps it in the run folder."""

    def __init__(self, run: Tracked) -> None:
        wandb: Any = import_module("wandb")  # not installed with qalign, so it has no types

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), id=run.id, name=run.name, config=run.recipe,
            resume="allow", dir=str(run.path), reinit="create_new", settings=wandb.Settings(console="off"),
        )  # fmt: skip
        first = self._run.step  # it takes no earlier step any more; 0 if it is offline
        self.held: Held = (lambda step, name: step < first) if first else None
        self._table, self._image = wandb.Table, lambda file: wandb.Image(str(file))


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": WeightsAndBiases}


def check(names: Iterable[str]) -> None:
    """Raises a `UserError` if the package of a tracker isn't installed."""
    if missing := [name for name in names if find_spec(name) is None]:
        words = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
        raise UserError(f"log_to: {words}; pip install {' '.join(missing)}, or remove it from log_to")


class Trackers:
    """The trackers of one run; none until `start`."""

    def __init__(self) -> None:
        self._open: dict[str, Tracker] = {}
        self._held: dict[str, Callable[[int, str], bool]] = {}
        self._folder, self._last = Path(), 0
        self._seen: dict[Path, int] = {}  # pictures and sample answers that were sent, with their time

    def start(
        self, recipe: Recipe, stage: str, folder: Path, logged: list[dict[str, Any]], kept: list[dict[str, Any]]
    ) -> None:
        """Opens the run of a stage in each tracker of the recipe. `logged` are the lines that earlier sessions logged,
        `kept` those of them that a resumed run goes on from."""
        if not recipe.log_to:
            return
        self._folder, file = folder, folder / RUN_ID
        if not (resumed := file.is_file()):
            write_whole(file, secrets.token_hex(4))
        others = {*STAGES, *OTHERS} - {stage}
        settings = {key: value for key, value in recipe.model_dump(mode="json").items() if key not in others}
        name, run_id = f"{folder.parent.name}/{folder.name}", file.read_text(encoding="utf-8").strip()
        run = Tracked(folder, name, run_id, resumed, settings)
        before = {(line["step"], key) for line in logged for key in (*line, SAMPLES)} if resumed else set()
        for word in recipe.log_to:

            def begin(word: str = word) -> None:
                self._open[word] = TRACKERS[word](run)
                self._held[word] = self._open[word].held or (lambda step, key: (step, key) in before)

            self._try(word, begin)
        if resumed:
            self._seen = {picture: picture.stat().st_mtime_ns for picture in folder.glob("*.png")}
        for line in kept:
            self.log(line)

    def log(self, line: dict[str, Any]) -> None:
        """Sends a line of the metrics, with the pictures that were drawn since the last one, and the sample answers of
        its step."""
        if not self._open:
            return
        self._last = line["step"]
        items: dict[str, Item] = {}
        for name, value in line.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                items[name] = value
            elif isinstance(value, list) and value and all(isinstance(word, str) for word in value):  # alarms
                items[name] = "\n\n".join(value)
        items.pop("step")
        self._send(items | self._answers() | self._pictures())

    def close(self) -> None:
        """Sends the pictures that were drawn at the end, and closes the run in every tracker."""
        if self._open:
            self._send(self._pictures())
        for name, tracker in [*self._open.items()]:
            self._try(name, tracker.close)
        self._open.clear()

    def _send(self, items: dict[str, Item]) -> None:
        for name, tracker in [*self._open.items()]:
            new = {key: item for key, item in items.items() if not self._held[name](self._last, key)}
            if new:
                self._try(name, lambda tracker=tracker, new=new: tracker.send(self._last, new))

    def _try(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # such as a network that is down
            self._open.pop(name, None)
            why = f"{type(error).__name__}: {error}"
            tqdm.write(one_line(f"warning: log_to: {name} failed ({why}); the run goes on without it"))

    def _pictures(self) -> dict[str, Item]:
        return {file.stem: file for file in sorted(self._folder.glob("*.png")) if self._is_new(file)}

    def _answers(self) -> dict[str, Item]:
        files = (self._folder / SAMPLES / f"{unit}-{self._last}.jsonl" for unit in ("step", "round"))
        for file in files:
            if file.is_file() and self._is_new(file) and (rows := _rows(file)):
                return {SAMPLES: rows}
        return {}

    def _is_new(self, file: Path) -> bool:
        before, self._seen[file] = self._seen.get(file), file.stat().st_mtime_ns
        return before != self._seen[file]


def _rows(file: Path) -> list[dict[str, Any]]:
    """Sample answers as a table: the last question, the answer, and the figures of each."""
    found: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, LookupError, TypeError):
            row = json.loads(line)
            figures = {name: value for name, value in row.items() if isinstance(value, (int, float))}
            found.append({"prompt": row["prompt"][-1]["content"], "completion": row["completion"], **figures})
    return found


def _markdown(rows: list[dict[str, Any]]) -> str:
    """A table of sample answers. Their own line breaks and bars would end a cell."""
    lines = [[*rows[0]], ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '¦').replace(chr(10), ' ') for cell in line)} |" for line in lines
    )


def _pixels(file: Path) -> Any:
    """A picture as an array of (height, width, 3) bytes."""
    from matplotlib.image import imread

    return (imread(file)[..., :3] * 255).round().astype("uint8")


def _in_events(folder: Path) -> set[tuple[int, str]]:
    """(step, name) of all that TensorBoard's event files hold."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance=dict.fromkeys(("scalars", "images", "tensors"), 0))
    tags: dict[str, Any] = read.Reload().Tags()
    of_kind = {"scalars": read.Scalars, "images": read.Images, "tensors": read.Tensors}
    texts = "/text_summary"  # what SummaryWriter appends to the name of a text
    return {
        (event.step, tag.removesuffix(texts))
        for kind, events in of_kind.items()
        for tag in tags[kind]
        for event in events(tag)
    }
