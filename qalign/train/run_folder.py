"""The run folder `<output>/<stage>/`: what a stage leaves there, and what it can be resumed from.

Imports no torch, so a folder that is taken or a missing parent is reported at once.
"""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qalign import __version__
from qalign.config.atomic import sync, write_whole
from qalign.config.load import dump, parse
from qalign.config.paths import absolute
from qalign.config.recipe import Recipe
from qalign.config.stages import PPO, SFT_RUN, STAGES, Stage
from qalign.data.formats import Refused
from qalign.errors import MAX_LINE, StopRequest, UserError, did_you_mean, one_line
from qalign.model import lineage

REFUSED = "rejected_rows.jsonl"
LAST_TRY = "rejected_rows.last_try.jsonl"  # refused rows of a failed start, next to the finished run that it left alone
PARENT = "parent_hash"  # of the adapter that the run started from
TOKENS_SEEN, WALL_SECONDS, WHOLE = "tokens_seen", "wall_seconds", "whole"  # in a checkpoint
# Files that a start which was cut short before it wrote `recipe.yaml` can leave, temporary ones included.
BEGINNING = re.compile(r"rejected_rows\.jsonl|parent_hash|\.(rejected_rows|parent_hash|recipe)\.\d+(\.\w+)?")
LOADING = """\
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{folder}")"""
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")
MODEL_CARD = """\
---
base_model: {base}
library_name: peft
tags: [qalign, {stage}, lora]
---
# {name}: {stage} adapter

Trained with qalign on `{model}`. Made with {versions}.

| | |
|---|---|
{table}

```python
{loading}
```
"""


class RunFolder:
    """`<output>/<stage>/` and the files in it.

    Attributes:
        command_line: recipe and overrides as the user typed them, for hints on what to type next.
        resume: True if this session continues the run that is there.
    """

    def __init__(self, recipe: Recipe, stage: str, command_line: str = "RECIPE"):
        self.recipe, self.stage, self.command_line = recipe, stage, command_line
        self.path = Path(recipe.output).expanduser() / stage
        self.adapter, self.checkpoints = self.path / "adapter", self.path / "checkpoints"
        self.metrics, self.summary = self.path / "metrics.jsonl", self.path / "summary.json"
        self.stop, self.resume, self._began = StopRequest(), False, time.monotonic()

    @property
    def wall_seconds(self) -> float:
        """Wall-clock seconds of the whole run. After a resume, earlier sessions count up to their last checkpoint."""
        return round(time.monotonic() - self._began, 1)

    @property
    def settings(self) -> Stage:
        """The stage's section of the recipe."""
        return getattr(self.recipe, self.stage)

    @property
    def complete(self) -> bool:
        return self.summary.is_file()

    @property
    def parent(self) -> str | None:
        """The adapter folder that `start_from` names, with `sft` the SFT run of the same output; a `UserError` if that
        run isn't finished, or the adapter was trained on another base."""
        key, start = f"{self.stage}.start_from", self.settings.start_from
        if start == SFT_RUN:
            sft = RunFolder(self.recipe, SFT_RUN)
            if not sft.complete:
                fix = f"run python -m qalign.sft {self.command_line} first"
                raise UserError(f"{key}: there is no finished SFT run in {sft.path}; {fix}")
            start = str(sft.adapter)
        if start:
            lineage.check_base(key, start, self.recipe.model.base, self.recipe.model.revision)
        return start

    def claim(self, *, resume: bool, overwrite: bool) -> None:
        """Raises a `UserError` if the folder holds another run or other files, or the run can't be resumed with this
        recipe. Deletes nothing yet."""
        self.resume = resume
        if any(place.exists() and not place.is_dir() for place in (self.path, self.path.parent)):
            raise UserError(f"{self.path}: is, or lies in, a file; choose another `output`")
        self.check_inputs(self.path)
        if not self.path.exists() or all(BEGINNING.fullmatch(file.name) for file in self.path.iterdir()):
            return
        if not (self.path / "recipe.yaml").is_file():
            raise UserError(f"{self.path}: holds files that don't belong to a qalign run; choose another `output`")
        if overwrite:
            return
        if not resume:
            state = "a complete run" if self.complete else "a run that was stopped"
            raise UserError(f"{self.path}: holds {state}; --resume continues it, --overwrite starts again")
        if changed := self.changes():
            raise UserError(f"{self.path}: --resume needs the recipe that the run began with; changed: {changed}")
        self.check_parent()

    def check_inputs(self, folder: Path) -> None:
        """Raises a `UserError` if something that the stage reads lies in a folder that will be written to."""
        inputs = [("model.base", self.recipe.model.base), (f"{self.stage}.start_from", self.parent)]
        if isinstance(self.settings, PPO):
            inputs += [(f"ppo.{key}", reward.source) for key, reward in self.settings.sources]
        for key in ("data", "eval_data"):
            inputs += [(f"{self.stage}.{key}", source.path) for source in getattr(self.settings, key) or ()]
        for key, used in inputs:
            if used and Path(used).resolve().is_relative_to(folder.resolve()):
                raise UserError(f"{key}: '{used}' lies in the folder that this run writes to; choose another `output`")

    def check_parent(self) -> None:
        """Raises a `UserError` if the adapter that the run started from was trained again since."""
        parent, mark, kept = self.parent, self.path / PARENT, lineage.read(self.adapter)
        was = mark.read_text(encoding="utf-8") if mark.is_file() else kept and kept.parent_hash
        if parent and was and was != (now := lineage.adapter_hash(parent)):
            fix = f"train it again with python -m qalign.{self.stage} {self.command_line} --overwrite"
            raise UserError(f"{self.path}: started from an adapter {was}, but {parent} is {now} now; {fix}")

    def differences(self) -> dict[str, tuple[object, object]]:
        """The dotted keys of this recipe that differ from the one that the existing run began with, each with (value
        then, value now), or a `UserError`. `output` and the sections of other stages don't count."""
        kept, file = {}, self.path / "recipe.yaml"
        with suppress(UserError):
            kept, _ = parse(file)
        if not kept:
            raise UserError(f"{file}: the recipe that this run began with can't be read; --overwrite starts again")
        with suppress(ValidationError):  # if it has a key that no longer exists, which is reported below
            kept = Recipe.model_validate(kept).model_dump(mode="json")  # with defaults for keys that are newer than it
        given = self.recipe.model_dump(mode="json")
        others = {*STAGES, "output"} - {self.stage}
        old, new = (dict(_flat({key: r[key] for key in r if key not in others})) for r in (kept, given))
        outputs = str(kept.get("output", "")) or ".", str(self.path.parent)
        return {
            key: (old.get(key, "not there"), new.get(key, "gone"))
            for key in {**old, **new}
            if not _same(old.get(key), new.get(key), outputs)
        }

    def changes(self) -> str:
        """`differences` as text, empty if there are none."""
        return ", ".join(f"{key} is {new!r}, was {old!r}" for key, (old, new) in self.differences().items())

    def check_refused(self, key: str, refused: list[Refused], used: int) -> None:
        """Raises a `UserError` if more rows under a key of the recipe were refused than `max_refused_share` allows, or
        none is left: the data is then not what the user thinks it is."""
        share = len(refused) / max(1, used + len(refused))
        if used and share <= self.recipe.max_refused_share:
            return
        if not refused:
            raise UserError(f"{key}: holds no rows")
        name = LAST_TRY if (self.path / "recipe.yaml").is_file() else REFUSED
        self._list_refused(refused, name)
        raise UserError(
            f"{key}: {len(refused)} of {used + len(refused)} rows were refused ({share:.0%}; max_refused_share is "
            f"{self.recipe.max_refused_share:.0%}); all of them are in {self.path / name}. The first:",
            *(f"  {row.where}: {row.reason}" for row in refused[:5]),
        )

    def _list_refused(self, refused: list[Refused], name: str) -> None:
        if refused:
            self.path.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in refused)
            write_whole(self.path / name, "".join(lines))

    def begin(self, refused: list[Refused]) -> None:
        """Prepares the folder for training: only now does `--overwrite` delete the old run."""
        if not self.resume and self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._list_refused(refused, REFUSED)
        (self.path / LAST_TRY).unlink(missing_ok=True)
        if self.parent and (now := lineage.adapter_hash(self.parent)):
            write_whole(self.path / PARENT, now)
        write_whole(self.path / "recipe.yaml", dump(absolute(self.recipe)))

    def rewind(self) -> tuple[Path | None, int]:
        """Goes back to the last whole checkpoint: metrics logged after it are dropped, as they will be logged again.
        Returns (the checkpoint, or None if the run is not resumed or has none; the tokens seen until then)."""
        for folder in self.checkpoints.glob("checkpoint-*"):
            if not (folder / WHOLE).exists():  # cut short: it would count as one of the two that are kept
                shutil.rmtree(folder)
        checkpoint = self.last_checkpoint() if self.resume else None
        step = step_of(checkpoint) if checkpoint else -1
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.is_file() else []
        logged = [json.loads(line) for line in lines if line.endswith("}")]  # a power cut may leave half a line
        write_whole(self.metrics, "".join(json.dumps(line) + "\n" for line in logged if line["step"] <= step))
        if checkpoint and (spent := checkpoint / WALL_SECONDS).is_file():
            self._began -= float(spent.read_text())
        return checkpoint, int((checkpoint / TOKENS_SEEN).read_text()) if checkpoint else 0

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written completely."""
        return max((mark.parent for mark in self.checkpoints.glob(f"checkpoint-*/{WHOLE}")), key=step_of, default=None)

    def mark_whole(self, step: int, tokens_seen: int) -> None:
        """Marks a checkpoint as whole once all of it is on the disk: `--resume` trusts only marked ones."""
        folder = self.checkpoints / f"checkpoint-{step}"
        for file in folder.rglob("*"):
            if file.is_file():
                sync(file)
        write_whole(folder / TOKENS_SEEN, str(tokens_seen))
        write_whole(folder / WALL_SECONDS, str(self.wall_seconds))
        write_whole(folder / WHOLE, "")

    def log(self, line: dict[str, Any]) -> None:
        """Appends a line to `metrics.jsonl`."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def finish(self, next_command: str, base: str, loading: str = LOADING, **facts: Any) -> None:
        """Writes the model card and `summary.json`, which marks the run as complete, and prints what to type next.

        Args:
            base: folder or hub id of the 16-bit base.
            loading: Python code that loads the adapter without qalign, with `{folder}` in it.
            facts: for the summary; `tokens_per_second` and `peak_bytes` at least.
        """
        facts |= {"wall_seconds": self.wall_seconds, "versions": versions()}
        cells = ((name, " ".join(str(value).split()).replace("|", r"\|")) for name, value in _flat(facts))
        table = "\n".join(f"| {name} | {text} |" for name, text in cells if not name.startswith("versions."))
        made_with = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        card = {"base": base, "stage": self.stage, "name": self.path.parent.name, "model": self.recipe.model.base}
        card |= {"versions": made_with, "table": table, "loading": loading.format(folder=self.adapter)}
        write_whole(self.adapter / "README.md", MODEL_CARD.format(**card))
        write_whole(self.summary, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        speed = f"{facts['tokens_per_second']:,.0f} tokens/s, {facts['peak_bytes'] / 2**30:.1f} GiB at most"
        print_table("done", [("adapter", self.adapter), ("speed", speed), ("next", next_command)])


def open_run(folder: str, stages: tuple[str, ...] = STAGES) -> RunFolder:
    """The finished run in a folder such as `runs/demo/reward`; `runs/demo` and `runs/demo/reward/adapter` work too. In
    `runs/demo`, the first of the accepted `stages` that has a finished run is taken.

    Raises:
        UserError: there is no finished run of such a stage, or its recipe can't be read.
    """
    given = Path(folder).expanduser()
    given = given if given.name else given.resolve()  # "." has no name, and a run is known by its folder's
    given = given.parent if given.name == "adapter" else given
    places = [*(given / stage for stage in stages), given]
    place = next((place for place in places if (place / "summary.json").is_file()), None)
    if place is None:
        siblings = [file.name for file in given.parent.glob("*")] if given.parent.is_dir() else []
        near = "" if given.is_dir() else did_you_mean(given.name, siblings)
        hint = near or f"; train one with python -m qalign.{stages[0]} RECIPE"
        raise UserError(f"{folder}: there is no finished {' or '.join(stages)} run{hint}")
    recipe = _read_recipe(place / "recipe.yaml")
    if place.name not in stages:
        raise UserError(f"{folder}: is a run of {place.name}, expected one of {', '.join(stages)}")
    return RunFolder(recipe.model_copy(update={"output": str(place.parent)}), place.name)


def _read_recipe(file: Path) -> Recipe:
    """The recipe of a finished run, or a `UserError`. (`load` would check that its data is still there.)"""
    try:
        return Recipe.model_validate(parse(file)[0])
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'recipe'}: {first['msg']}"
    except (OSError, UserError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    raise UserError(f"{file}: the recipe that this run was trained with can't be read: {reason}")


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _flat(section: dict[Any, Any], above: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys of a recipe, or of a summary, with their values."""
    for key, value in section.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = dict(enumerate(value))
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _same(old: object, new: object, outputs: tuple[str, str]) -> bool:
    """Whether two values of a recipe are equal. Two paths are equal if they lead to the same file, or, where a project
    was moved together with its runs, if they are the same relative to the recipe's output then and now."""
    if old == new or SFT_RUN in (old, new) or not (isinstance(old, str) and isinstance(new, str)):
        return old == new
    if os.path.realpath(old) == os.path.realpath(new):
        return True
    try:
        return os.path.relpath(old, outputs[0]) == os.path.relpath(new, outputs[1])
    except ValueError:  # two drives of Windows
        return False


def versions() -> dict[str, str]:
    """Installed versions of everything that can change a number."""
    found = {"qalign": __version__, "python": platform.python_version()}
    return found | {package: importlib.metadata.version(package) for package in PACKAGES}


def print_table(title: str, rows: Iterable[tuple[str, object]]) -> None:
    """Prints facts under a title, aligned. Only a command to copy (`next`) may be longer than a line of an error."""
    print(f"\n{one_line(title)}")
    for name, value in rows:
        print(one_line(f"  {name:<14} {value}", None if name == "next" else MAX_LINE))
    print(flush=True)
