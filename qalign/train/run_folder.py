"""The run folder `<output>/<stage>/`: what a stage leaves there, and what it can be resumed from.
Imports no torch, so a folder that is taken or a missing parent is reported at once."""

import json
import os
import shlex
import shutil
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from qalign.config import manifest, paths
from qalign.config.atomic import LEFTOVER, clear_leftovers, sync_folder, write_rows, write_whole
from qalign.config.load import dump
from qalign.config.paths import absolute, expanded, last_round, looks_local, names_of_files, without_member
from qalign.config.recipe import Recipe, differences
from qalign.config.stages import SFT_RUN, STAGES, Stage
from qalign.config.yaml_file import parse
from qalign.data.formats import Refused
from qalign.errors import MAX_LINE, Stopped, StopRequest, UserError, did_you_mean, disk_problem, one_line, program
from qalign.model import lineage
from qalign.train import checkpoints
from qalign.train.lock import locked
from qalign.train.model_card import CARD, model_card, versions
from qalign.train.processes.world import current
from qalign.train.trackers import Trackers, check

REFUSED = "rejected_rows.jsonl"
LAST_TRY = "rejected_rows.last_try.jsonl"  # refused rows of a failed start, next to the finished run that it left alone
PARENT = "parent_hash"  # of the adapter that the run started from


class RunFolder:
    """`<output>/<stage>/` and the files in it.

    Attributes:
        command_line: recipe and overrides as the user typed them, for hints on what to type next.
        name: of folder and command: the stage's, or `best_of`, which works on the recipe's section of the stage `ppo`.
        resume: True if this session continues the run that is there.
    """

    def __init__(self, recipe: Recipe, stage: str, command_line: str = "RECIPE", name: str | None = None):
        self.recipe, self.stage, self.command_line, self.name = recipe, stage, command_line, name or stage
        self.path = expanded(recipe.output) / self.name
        self.adapter, self.checkpoints = self.path / "adapter", self.path / "checkpoints"
        self.metrics, self.summary = self.path / checkpoints.METRICS, self.path / "summary.json"
        self.stop, self.resume, self._began, self._trackers = StopRequest(), False, time.monotonic(), Trackers()
        self._checkpoint: Path | None = None  # to continue from

    @property
    def _replaced(self) -> Path:
        """Where `--overwrite` keeps the run that it replaces until the new one has a checkpoint."""
        return self._home.with_name(f".{self._home.name}.replaced")

    @property
    def _home(self) -> Path:
        """The folder itself, where `path` is a link to it."""
        return Path(os.path.realpath(self.path))

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
    def command(self) -> str:
        """What the user typed."""
        return f"{program(self.name)} {self.command_line}"

    @property
    def further(self) -> str:
        """How to go on from a complete run, which has no steps left to resume."""
        return f"to train its adapter further: {self.stage}.start_from={self.adapter} with another `output`"

    @property
    def parent(self) -> str | None:
        """The adapter folder that `start_from` names, with `sft` the SFT run of the same output; a `UserError` if that
        run isn't finished, or the adapter was trained on another base."""
        key, start = f"{self.stage}.start_from", self.settings.start_from
        if start == SFT_RUN:
            start = str(self.own_adapter(key, SFT_RUN))
        if start:
            lineage.check_base(key, start, self.recipe.model.base, self.recipe.model.revision)
        return start

    def own_adapter(self, key: str, stage: str) -> Path:
        """The adapter of another stage of this recipe, which `key` names; a `UserError` if that run isn't finished."""
        run = RunFolder(self.recipe, stage)
        if not run.complete:
            fix = f"run {program(stage)} {self.command_line} first"
            raise UserError(f"{key}: there is no finished {stage} run in {run.path}; {fix}")
        return run.adapter

    @contextmanager
    def held(self) -> Generator[None]:
        """Keeps other processes out of the folder while a stage works on it, and mends what a killed one left there.

        If `--overwrite` set a run aside and the new one failed before its first checkpoint, the old run is put back. A
        `UserError` if another process holds the folder, or the disk refused something meanwhile."""
        self._check_place()
        back = False
        try:
            with locked(self._home):
                self._put_back()
                if self.path.is_dir():
                    clear_leftovers(self.path)
                try:
                    yield
                finally:
                    self._trackers.close()
                    back = self._put_back()
        except Exception as error:
            if isinstance(error, FileNotFoundError) and not self.path.is_dir():
                raise UserError(f"{self.path}: can't be made there, or was deleted or moved during the run") from None
            if problem := disk_problem(error, self.path):
                begun = self.metrics.is_file() and not back
                what = f"then go on with: {self.command} --resume" if begun else "nothing was lost"
                raise UserError(f"{problem}; {what}") from None
            raise

    def _put_back(self) -> bool:
        """Puts back what `--overwrite` set aside, or deletes it if the new run has a checkpoint; True if it is back."""
        old = self._replaced
        if not old.exists():
            return False
        last = checkpoints.newest(self.checkpoints)
        if self.complete or (last and checkpoints.step_of(last)) or not (old / "recipe.yaml").is_file():
            shutil.rmtree(old, ignore_errors=True)
            return False
        if self._home.exists():
            shutil.rmtree(self._home)
        old.rename(self._home)
        print(f"{self.path}: the run that --overwrite was to replace is back: no new checkpoint yet", flush=True)
        return True

    def _check_place(self) -> None:
        if os.path.islink(self._home):
            raise UserError(f"{self.path}: is a link that leads round in a circle; choose another `output`")
        if any(place.exists() and not place.is_dir() for place in (self.path, self.path.parent)):
            raise UserError(f"{self.path}: is, or lies in, a file; choose another `output`")

    def claim(self, *, resume: bool, overwrite: bool) -> None:
        """Raises a `UserError` if the folder holds another run or other files, or the run can't be resumed with this
        recipe. Deletes nothing yet."""
        self.resume = resume
        check(self.recipe.log_to)
        self._check_place()
        self.check_inputs(overwrite=overwrite)
        names = {file.name for file in self.path.iterdir()} if self.path.exists() else set[str]()
        if all(LEFTOVER.fullmatch(name) for name in names - {REFUSED, PARENT}):
            return  # there is no run, or a start that was cut short
        if not (self.path / "recipe.yaml").is_file():
            raise UserError(f"{self.path}: holds files that don't belong to a qalign run; choose another `output`")
        if overwrite:
            return
        if not resume:
            if self.complete:
                raise UserError(f"{self.path}: holds a complete run; --overwrite replaces it; {self.further}")
            raise UserError(f"{self.path}: holds a stopped run; --resume continues it, --overwrite starts again")
        if changed := self.changes():
            if self.complete:
                raise UserError(f"{self.path}: is complete, with another recipe ({changed}); {self.further}")
            raise UserError(f"{self.path}: --resume needs the recipe that the run began with; changed: {changed}")
        self.check_parent()
        self._checkpoint = None if self.complete else checkpoints.newest_whole(self.checkpoints)

    def check_inputs(self, *, overwrite: bool) -> None:
        """Raises a `UserError` if something that the stage reads lies in this folder. (The run's own recipe may, unless
        it is to be overwritten.)"""
        raw, inputs = self.recipe.model_dump(), [(f"{self.stage}.start_from", self.parent)]
        for place, key, path in paths.named_paths({name: raw[name] for name in ("model", self.stage)}):
            function = paths.function_of(path) if key in paths.FUNCTIONS else None
            if not paths.is_own_run(key, path):
                inputs.append((f"{place[0]}.{key}", function[0] if function else path))
        if overwrite:
            inputs += [("the recipe", os.path.abspath(word)) for word in shlex.split(self.command_line)[:1]]
        for key, used in inputs:
            if used and looks_local(used) and Path(os.path.realpath(used)).is_relative_to(self._home):
                raise UserError(f"{key}: '{used}' lies in the folder that this run writes to; choose another `output`")

    def check_parent(self) -> None:
        """Raises a `UserError` if the adapter that the run started from was trained again since."""
        parent, mark = self.parent, self.path / PARENT
        was = mark.read_text(encoding="utf-8", errors="replace") if mark.is_file() else None
        if parent and was and was != (now := lineage.adapter_hash(parent)):
            fix = f"start again with {self.command} --overwrite"
            raise UserError(f"{self.path}: started from an adapter {was}, but {parent} is {now} now; {fix}")

    def differences(self) -> dict[str, tuple[object, object]]:
        """The dotted keys of this recipe that differ from the one that the existing run began with, each with (value
        then, value now), or a `UserError`. `output` and the sections of other stages don't count."""
        kept, file = {}, self.path / "recipe.yaml"
        with suppress(UserError, OSError):
            kept, _ = parse(file)
        if not kept:
            raise UserError(f"{file}: the recipe that this run began with can't be read; --overwrite starts again")
        return differences(kept, self.recipe, self.stage, str(self.path.parent))

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
        if refused and current().is_first:
            self.path.mkdir(parents=True, exist_ok=True)
            write_rows(self.path / name, map(asdict, refused))

    def begin(self, refused: list[Refused]) -> None:
        """Prepares the folder for training: only now does `--overwrite` set the old run aside."""
        self._put_back()
        if not self.resume and self.path.exists():
            if (self.path / "recipe.yaml").is_file():
                self._home.rename(self._replaced)
            else:
                shutil.rmtree(self._home)
        self._home.mkdir(parents=True, exist_ok=True)
        self._list_refused(refused, REFUSED)
        (self.path / LAST_TRY).unlink(missing_ok=True)
        if self.parent and (now := lineage.adapter_hash(self.parent)):
            write_whole(self.path / PARENT, now)
        write_whole(self.path / "recipe.yaml", dump(absolute(self.recipe)))
        sync_folder(self._home.parent)

    def rewind(self) -> tuple[Path | None, int]:
        """Goes back to the checkpoint that `claim` found: later ones are deleted, and the metrics are those that it
        keeps, as what followed will be logged again. Returns (the checkpoint, or None if the run is not resumed or has
        none; the tokens seen until then)."""
        checkpoint = self._checkpoint if self.resume else None
        for folder in self.checkpoints.glob("checkpoint-*"):
            if checkpoint is None or checkpoints.step_of(folder) > checkpoints.step_of(checkpoint):
                checkpoints.discard(folder)
        kept = (checkpoint / checkpoints.METRICS).read_bytes() if checkpoint else b""
        if kept and not (self.metrics.is_file() and self.metrics.read_bytes().startswith(kept)):
            print(f"{self.metrics}: was damaged; it is again as it was at {checkpoint}", flush=True)
        logged = checkpoints.read_metrics(self.metrics)
        write_whole(self.metrics, kept)
        self._trackers.start(self.recipe, self.stage, self.path, logged, checkpoints.read_metrics(self.metrics))
        facts = manifest.read(checkpoint) if checkpoint else {"wall_seconds": 0.0, "tokens_seen": 0}
        self._began -= facts["wall_seconds"]
        return checkpoint, facts["tokens_seen"]

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written completely."""
        return checkpoints.newest(self.checkpoints)

    def mark_whole(self, step: int, tokens_seen: int, keep: str | None = None) -> None:
        """Marks a checkpoint as whole once all of it is on the disk: `--resume` trusts only marked ones. Older ones go,
        except the last two and the one named `keep`; with the first one, the run that `--overwrite` replaces."""
        place = self.checkpoints / f"checkpoint-{step}"
        checkpoints.mark_whole(place, tokens_seen, self.wall_seconds, self.metrics, keep)
        if step:  # PPO has a checkpoint of step 0, before anything was learned
            self._put_back()

    def end_early(self, done: int) -> NoReturn:
        """Ends the command after a stop that was asked for, with a checkpoint of step `done`. Says how to go on."""
        print(f"stopped after step {done}; the checkpoint is {self.last_checkpoint()}")
        print(f"go on with: {self.command} --resume", flush=True)
        raise Stopped(self.stop.number or 0)

    def log(self, line: dict[str, Any]) -> None:
        """Appends a line to `metrics.jsonl`, and tells the trackers."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._trackers.log(line)

    def finish(self, next_command: str, base: str, codes: dict[Path, str], **facts: Any) -> None:
        """Writes the model card of each adapter folder, with the code that loads it, and `summary.json` with `facts`
        (`tokens_per_second` and `peak_bytes` at least), which marks the run as complete. Prints what to type next."""
        facts |= {"wall_seconds": self.wall_seconds, "versions": versions()}
        for adapter, code in codes.items():
            card = model_card(self.path.parent.name, self.stage, self.recipe.model.base, base, code, facts)
            write_whole(adapter / CARD, card)
        write_whole(self.summary, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        speed = f"{facts['tokens_per_second']:,.0f} tokens/s, {facts['peak_bytes'] / 2**30:.1f} GiB at most"
        print_table("done", [("adapter", self.adapter), ("speed", speed), ("next", next_command)])


def open_run(folder: str, stages: tuple[str, ...] = STAGES) -> RunFolder:
    """The finished run in a folder such as `runs/demo/reward`; `runs/demo` and `runs/demo/reward/adapter` work too, and
    `runs/demo/reward/member_2` for one member of an ensemble. In `runs/demo`, the first of the accepted `stages` that
    has a finished run is taken; a `UserError` if none has."""
    given = expanded(folder)
    given, member = without_member(given if given.name else given.resolve())  # "." has no name, and a run needs one
    given = given.parent if given.name == "adapter" else given
    places = [*(given / stage for stage in stages), given]
    place = next((place for place in places if (place / "summary.json").is_file()), None)
    if place is None:
        near = "" if given.is_dir() else did_you_mean(given.name, names_of_files(given.parent))
        hint = near or f"; train one with {program(stages[0])} RECIPE"
        raise UserError(f"{folder}: there is no finished {' or '.join(stages)} run{hint}")
    recipe = _read_recipe(place / "recipe.yaml")
    if place.name not in stages:
        hint = f"; the policy of its last round is {last}" if (last := last_round(place)) else ""
        raise UserError(f"{folder}: is a run of {place.name}, expected one of {', '.join(stages)}{hint}")
    model = recipe.model.model_copy(update={"shard": False})  # what is done with a finished run is done in one process
    run = RunFolder(recipe.model_copy(update={"output": str(place.parent), "model": model}), place.name)
    if member and not (run.adapter / member).is_dir():
        raise UserError(f"{folder}: the ensemble has no {member}{did_you_mean(member, names_of_files(run.adapter))}")
    run.adapter /= member
    return run


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


def print_table(title: str, rows: Iterable[tuple[str, object]]) -> None:
    """Prints facts under a title, aligned. Only a command to copy (`next`) may be longer than a line of an error."""
    print(f"\n{one_line(title)}")
    for name, value in rows:
        print(one_line(f"  {name:<14} {value}", None if name == "next" else MAX_LINE))
    print(flush=True)
