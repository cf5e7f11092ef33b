"""The run folder: what a stage leaves, and may go on from.

Imports no torch: a taken folder or a missing parent answers at once.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import yaml
from pydantic import ValidationError

from qalign import __version__
from qalign.config.load import dump
from qalign.config.paths import absolute
from qalign.config.recipe import Recipe
from qalign.config.stages import PPO, SFT_RUN, STAGES, Stage
from qalign.data.formats import Refused
from qalign.errors import StopRequest, UserError, did_you_mean
from qalign.model import lineage

REFUSED = "rejected_rows.jsonl"
LAST_TRY = "rejected_rows.last_try.jsonl"  # of a try that was refused, beside the run that is there
PARENT = "parent_hash"  # of the adapter that the run started from
TOKENS_SEEN, WALL_SECONDS = "tokens_seen", "wall_seconds"  # in a checkpoint
BEGINNING = {REFUSED, PARENT, "recipe.part"}  # what there is before `recipe.yaml`
LOADING = """\
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{folder}")"""
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")


class RunFolder:
    """`<output>/<stage>/` and the files in it.

    Attributes:
        path: the folder; `adapter`, `checkpoints` and the files below are inside.
        command_line: recipe and overrides as the user typed them, for hints on what to type next.
        stop: the pending request to stop, if any.
        resume: whether to go on with the run that is there.
    """

    def __init__(self, recipe: Recipe, stage: str, command_line: str = "RECIPE"):
        self.recipe, self.stage, self.command_line = recipe, stage, command_line
        self.path = Path(recipe.output).expanduser() / stage
        self.adapter, self.checkpoints = self.path / "adapter", self.path / "checkpoints"
        self.metrics, self.summary = self.path / "metrics.jsonl", self.path / "summary.json"
        self.stop = StopRequest()
        self.resume = False
        self._began = time.monotonic()

    @property
    def wall_seconds(self) -> float:
        """Spent on the whole run so far; of a session that was cut short, up to the checkpoint gone on from."""
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
        """The adapter folder that the stage goes on from; `start_from: sft` is the SFT run of the same output.

        Raises:
            UserError: there is no such run yet, or it was trained on another base.
        """
        key, start = f"{self.stage}.start_from", self.settings.start_from
        if start == SFT_RUN:
            sft = RunFolder(self.recipe, SFT_RUN)
            if not sft.complete:
                raise UserError(
                    f"{key}: there is no finished SFT run in {sft.path}; "
                    f"run python -m qalign.sft {self.command_line} first"
                )
            start = str(sft.adapter)
        if start:
            lineage.check_base(key, start, self.recipe.model.base, self.recipe.model.revision)
        return start

    def claim(self, *, resume: bool, overwrite: bool) -> None:
        """Makes sure, before anything is loaded, that this run may write here. Deletes nothing yet.

        Raises:
            UserError: the folder holds something else.
        """
        self.resume = resume
        kept = self.path / "recipe.yaml"
        if any(place.exists() and not place.is_dir() for place in (self.path, self.path.parent)):
            raise UserError(f"{self.path}: is, or lies in, a file; choose another `output`")
        self.check_inputs(self.path)
        if not self.path.exists() or BEGINNING.issuperset(file.name for file in self.path.iterdir()):
            return
        if not kept.is_file():
            raise UserError(f"{self.path}: holds files that are no run of qalign's; choose another `output`")
        if overwrite:
            return
        if not resume:
            state = "a complete run" if self.complete else "a run that was stopped"
            raise UserError(f"{self.path}: holds {state}; --resume goes on with it, --overwrite starts anew")
        if changed := self.changes():
            raise UserError(f"{self.path}: --resume needs the recipe it began with; this one differs: {changed}")
        self.check_parent()

    def changes(self) -> str:
        """What the recipe says about this stage that the run that is there was not begun with; empty if nothing."""
        return ", ".join(f"{key} is {new!r}, was {old!r}" for key, (old, new) in self.differences().items())

    def differences(self) -> dict[str, tuple[object, object]]:
        """The dotted keys of `changes`, each with (what it was, what it is).

        Raises:
            UserError: the recipe of the run that is there can't be read any more.
        """
        file = self.path / "recipe.yaml"
        try:
            kept = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, yaml.YAMLError):
            kept = None
        if not isinstance(kept, dict):
            raise UserError(
                f"{file}: the recipe that this run was begun with can't be read any more; --overwrite starts anew"
            )
        with suppress(ValidationError):  # it has a key that is gone since, named below
            kept = yaml.safe_load(dump(Recipe.model_validate(kept)))  # with the defaults of keys newer than the run
        given = yaml.safe_load(dump(self.recipe))
        others = {*STAGES, "output"} - {self.stage}
        old, new = (dict(_flat({key: r[key] for key in r if key not in others})) for r in (kept, given))
        outputs = str(kept.get("output", "")) or ".", str(self.path.parent)
        return {
            key: (old.get(key, "not there"), new.get(key, "gone"))
            for key in {**old, **new}
            if not _same(old.get(key), new.get(key), outputs)
        }

    def check_parent(self) -> None:
        """Makes sure that what the run that is there started from is still what it was.

        Raises:
            UserError: that adapter was trained again since.
        """
        parent, mark, kept = self.parent, self.path / PARENT, lineage.read(self.adapter)
        was = mark.read_text(encoding="utf-8") if mark.is_file() else kept and kept.parent_hash
        if parent and was and was != (now := lineage.adapter_hash(parent)):
            raise UserError(
                f"{self.path}: started from an adapter {was}, but {parent} is {now} now; "
                f"train it again with python -m qalign.{self.stage} {self.command_line} --overwrite"
            )

    def check_inputs(self, folder: Path) -> None:
        """Makes sure that nothing that the stage reads lies in a folder that will be written to.

        Raises:
            UserError: something does.
        """
        for key, used in self._inputs():
            if Path(used).resolve().is_relative_to(folder.resolve()):
                raise UserError(f"{key}: '{used}' lies in the folder that this run writes to; choose another `output`")

    def _inputs(self) -> Iterator[tuple[str, str]]:
        """(key, path) of what the stage reads."""
        yield "model.base", self.recipe.model.base
        if parent := self.parent:
            yield f"{self.stage}.start_from", parent
        if isinstance(self.settings, PPO):
            yield from ((f"ppo.{key}", reward.source) for key, reward in self.settings.sources)
        for key in ("data", "eval_data"):
            yield from ((f"{self.stage}.{key}", source.path) for source in getattr(self.settings, key) or ())

    def begin(self, refused: list[Refused]) -> None:
        """Makes the folder ready to train in: only now does `--overwrite` delete the old run."""
        if not self.resume and self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._list_refused(refused, REFUSED)
        (self.path / LAST_TRY).unlink(missing_ok=True)
        if self.parent and (now := lineage.adapter_hash(self.parent)):
            (self.path / PARENT).write_text(now, encoding="utf-8")
        _write_whole(self.path / "recipe.yaml", dump(absolute(self.recipe)))

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end."""
        whole = [mark.parent for mark in self.checkpoints.glob("checkpoint-*/whole")]
        return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)

    def rewind(self) -> tuple[Path | None, int]:
        """Where to go on from; what was logged after it is dropped, as it will be logged again.

        Returns:
            (the last whole checkpoint if the run is resumed and has one, the tokens seen by then).
        """
        for folder in self.checkpoints.glob("checkpoint-*"):
            if not (folder / "whole").exists():  # cut short: it would count among the few that are kept
                shutil.rmtree(folder)
        checkpoint = self.last_checkpoint() if self.resume else None
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else -1
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.is_file() else []
        whole = [json.loads(line) for line in lines if line.endswith("}")]  # a power cut may leave half a line
        kept = [line for line in whole if line["step"] <= step]
        self.metrics.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        if checkpoint and (spent := checkpoint / WALL_SECONDS).is_file():
            self._began -= float(spent.read_text())
        return checkpoint, int((checkpoint / TOKENS_SEEN).read_text()) if checkpoint else 0

    def check_refused(self, key: str, refused: list[Refused], used: int) -> None:
        """Stops before training if the rows under a key of the recipe are not what the user thinks they are.

        Raises:
            UserError: more rows were refused than the recipe allows, or none is left.
        """
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
            (self.path / name).write_text("".join(lines), encoding="utf-8")

    def finish(self, next_command: str, base: str, loading: str = LOADING, **facts) -> None:
        """Writes the adapter's model card and `summary.json`, whose presence says that the run is complete; then says
        where the adapter is and what to type next.

        Args:
            next_command: what the user may want to do now.
            base: folder or hub id of the 16-bit base.
            loading: Python that loads the adapter without qalign, with `{folder}` in it.
            facts: what to keep; `tokens_per_second` and `peak_bytes` at least. `wall_seconds` is added: of the whole
                run, loading and the sessions before included.
        """
        facts |= {"wall_seconds": self.wall_seconds, "versions": versions()}
        self._write_model_card(base, loading.format(folder=self.adapter), facts)
        _write_whole(self.summary, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        speed = f"{facts['tokens_per_second']:,.0f} tokens/s, {facts['peak_bytes'] / 2**30:.1f} GiB at most"
        print_table("done", [("adapter", self.adapter), ("speed", speed), ("next", next_command)])

    def _write_model_card(self, base: str, loading: str, facts: dict) -> None:
        """`adapter/README.md`: what this adapter is, from what, and how to load it without qalign."""
        cells = ((name, " ".join(str(value).split()).replace("|", r"\|")) for name, value in _flat(facts))
        table = "\n".join(f"| {name} | {value} |" for name, value in cells if not name.startswith("versions."))
        made_with = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        (self.adapter / "README.md").write_text(
            f"""---
base_model: {base}
library_name: peft
tags: [qalign, {self.stage}, lora]
---
# {self.path.parent.name}: {self.stage} adapter

Trained with qalign on `{self.recipe.model.base}`. Made with {made_with}.

| | |
|---|---|
{table}

```python
{loading}
```
""",
            encoding="utf-8",
        )


def _write_whole(file: Path, text: str) -> None:
    """Writes a file aside, then gives it its name: what was there is replaced by all of it or not at all."""
    aside = file.with_suffix(".part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)


def _flat(section: dict, above: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys of a recipe, or of a summary, with their values."""
    for key, value in section.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = dict(enumerate(value))
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _same(old: object, new: object, outputs: tuple[str, str]) -> bool:
    """Whether two values of a recipe are one. Paths are if they lead to one file, or, where a project was moved with
    its runs, to one place as seen from the recipe's output then and now."""
    if old == new or SFT_RUN in (old, new) or not (isinstance(old, str) and isinstance(new, str)):
        return old == new
    if os.path.realpath(old) == os.path.realpath(new):
        return True
    try:
        return os.path.relpath(old, outputs[0]) == os.path.relpath(new, outputs[1])
    except ValueError:  # on another drive of Windows
        return False


def versions() -> dict[str, str]:
    """Installed versions of what can move a number."""
    found = {"qalign": __version__, "python": platform.python_version()}
    return found | {package: importlib.metadata.version(package) for package in PACKAGES}


def print_table(title: str, rows: Iterable[tuple[str, object]]) -> None:
    """Facts under a title, aligned."""
    print(f"\n{title}")
    for name, value in rows:
        print(f"  {name:<14} {value}")
    print(flush=True)


def open_run(folder: str, stages: tuple[str, ...] = STAGES) -> RunFolder:
    """The run in a folder such as `runs/demo/reward`; `runs/demo` and `runs/demo/reward/adapter` mean it too.

    Args:
        stages: which kinds of run will do, the first one found in `runs/demo`.

    Raises:
        UserError: there is no finished run of such a stage, or its recipe can't be read any more.
    """
    given = Path(folder).expanduser()
    given = given if given.name else given.resolve()  # "." has no name, and a run goes by its own
    given = given.parent if given.name == "adapter" else given
    found = [given / stage for stage in stages if (given / stage / "summary.json").is_file()]
    place = found[0] if found else given
    if not (place / "summary.json").is_file():
        beside = [file.name for file in given.parent.glob("*")] if given.parent.is_dir() else []
        near = "" if given.is_dir() else did_you_mean(given.name, beside)
        hint = near or f"; train one with python -m qalign.{stages[0]} RECIPE"
        raise UserError(f"{folder}: there is no finished {' or '.join(stages)} run{hint}")
    recipe = _recipe(place / "recipe.yaml")
    stage = next((stage for stage in STAGES if place.name == stage), None)
    if stage not in stages:
        raise UserError(f"{folder}: is a run of {stage or place.name}, expected one of {', '.join(stages)}")
    return RunFolder(recipe.model_copy(update={"output": str(place.parent)}), stage)


def _recipe(file: Path) -> Recipe:
    """Not `recipe_file.load`: the data that the run was trained on may be gone."""
    try:
        return Recipe.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'recipe'}: {first['msg']}"
    except OSError as error:
        reason = error.strerror or str(error)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
    raise UserError(f"{file}: the recipe that this run was trained with can't be read any more: {reason}")
