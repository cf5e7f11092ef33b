"""The run folder, and how every stage's command begins, ends and fails.

Imports no torch: a bad recipe, a taken folder or a typo on the command line answers at once.
"""

import argparse
import errno
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from qalign import __version__
from qalign.errors import UserError
from qalign.recipe import Recipe
from qalign.recipe_file import dump, load
from qalign.rows import Refused

REFUSED = "rejected_rows.jsonl"
TOKENS_SEEN = "tokens_seen"  # in a checkpoint
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")


class Stopped(Exception):
    """The user or the system asked to stop; `number` is the signal."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """Ctrl-C and SIGTERM. While `patient`, the first one only leaves its number here, for the loop to stop cleanly."""

    def __init__(self):
        self.number: int | None = None
        self.patient = False

    def __call__(self, number: int, frame) -> None:
        if not self.patient or self.number is not None:
            raise Stopped(number)
        self.number = number
        print("\nstopping after this step (again to stop at once) …", file=sys.stderr, flush=True)


class RunFolder:
    """`<output>/<stage>/` and the files in it.

    Attributes:
        path: the folder; `adapter`, `checkpoints` and the files below are inside.
        command_line: recipe and overrides as the user typed them, for hints on what to type next.
        stop: the pending request to stop, if any.
        resume: whether to go on with the run that is there.
    """

    def __init__(self, recipe: Recipe, stage: str, command_line: str = ""):
        self.recipe, self.stage, self.command_line = recipe, stage, command_line
        self.path = Path(recipe.output) / stage
        self.adapter, self.checkpoints = self.path / "adapter", self.path / "checkpoints"
        self.metrics, self.summary = self.path / "metrics.jsonl", self.path / "summary.json"
        self.stop = StopRequest()
        self.resume = False
        self._began = time.monotonic()

    @property
    def complete(self) -> bool:
        return self.summary.is_file()

    def claim(self, *, resume: bool, overwrite: bool) -> None:
        """Makes sure, before anything is loaded, that this run may write here. Deletes nothing yet.

        Raises:
            UserError: the folder holds something else.
        """
        self.resume = resume
        kept = self.path / "recipe.yaml"
        if any(place.exists() and not place.is_dir() for place in (self.path, self.path.parent)):
            raise UserError(f"{self.path}: is, or lies in, a file; choose another `output`")
        for key, used in self._inputs():
            if Path(used).resolve().is_relative_to(self.path.resolve()):
                raise UserError(f"{key}: '{used}' lies in the folder that this run writes to; choose another `output`")
        if not self.path.exists() or all(file.name == REFUSED for file in self.path.iterdir()):
            return
        if not kept.is_file():
            raise UserError(f"{self.path}: holds files that are no run of qalign's; choose another `output`")
        if overwrite:
            return
        if not resume:
            state = "a complete run" if self.complete else "a run that was stopped"
            raise UserError(f"{self.path}: holds {state}; --resume goes on with it, --overwrite starts anew")
        if kept.read_text(encoding="utf-8") != dump(self.recipe):
            old, new = (set(text.splitlines()) for text in (kept.read_text(encoding="utf-8"), dump(self.recipe)))
            changed = ", ".join(sorted(line.strip() for line in new - old)) or "some keys were removed"
            raise UserError(f"{self.path}: --resume needs the recipe it began with; this one differs: {changed}")

    def _inputs(self) -> Iterator[tuple[str, str]]:
        """(key, path) of what the stage reads."""
        stage = getattr(self.recipe, self.stage)
        if stage.start_from:
            yield f"{self.stage}.start_from", stage.start_from
        for key in ("data", "eval_data"):
            yield from ((f"{self.stage}.{key}", source.path) for source in getattr(stage, key) or ())

    def begin(self, refused: list[Refused]) -> None:
        """Makes the folder ready to train in: only now does `--overwrite` delete the old run."""
        if not self.resume and self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._list_refused(refused)
        (self.path / "recipe.yaml").write_text(dump(self.recipe), encoding="utf-8")

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
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.is_file() else []
        whole = [json.loads(line) for line in lines if line.endswith("}")]  # a power cut may leave half a line
        kept = [line for line in whole if line["step"] <= step]
        self.metrics.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
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
        self._list_refused(refused)
        raise UserError(
            f"{key}: {len(refused)} of {used + len(refused)} rows were refused ({share:.0%}; max_refused_share is "
            f"{self.recipe.max_refused_share:.0%}); all of them are in {self.path / REFUSED}. The first:",
            *(f"  {row.where}: {row.reason}" for row in refused[:5]),
        )

    def _list_refused(self, refused: list[Refused]) -> None:
        if refused:
            self.path.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in refused)
            (self.path / REFUSED).write_text("".join(lines), encoding="utf-8")

    def finish(self, next_command: str, base: str, **facts) -> None:
        """Writes the adapter's model card and `summary.json`, whose presence says that the run is complete; then says
        where the adapter is and what to type next.

        Args:
            next_command: what the user may want to do now.
            base: folder or hub id of the 16-bit base.
            facts: what to keep; `reference`, `tokens_per_second` and `peak_bytes` at least.
        """
        facts |= {"wall_seconds": round(time.monotonic() - self._began, 1), "versions": versions()}
        self._write_model_card(base, facts)
        aside = self.summary.with_suffix(".part")
        aside.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        aside.rename(self.summary)
        speed = f"{facts['tokens_per_second']:,.0f} tokens/s, {facts['peak_bytes'] / 2**30:.1f} GiB at most"
        print_table("done", [("adapter", self.adapter), ("speed", speed), ("next", next_command)])

    def _write_model_card(self, base: str, facts: dict) -> None:
        """`adapter/README.md`: what this adapter is, from what, and how to load it without qalign."""
        table = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if name != "versions")
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
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{self.adapter}")
```
""",
            encoding="utf-8",
        )


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


def stage_command(stage: str, train: Callable[[Recipe, RunFolder], None]) -> None:
    """`python -m qalign.STAGE RECIPE [key=value …] [--resume | --overwrite]`; does not return."""
    parser = _parser(stage, train.__doc__)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on with a run that was stopped, to the same numbers")
    how.add_argument("--overwrite", action="store_true", help="delete the run that is there and start anew")
    args = parser.parse_args()

    def work() -> None:
        recipe = load(args.recipe, args.overrides, stage)
        typed = shlex.join([args.recipe, *args.overrides])
        run = RunFolder(recipe, stage, typed)
        run.claim(resume=args.resume, overwrite=args.overwrite)
        if args.resume and run.complete:
            print(f"{run.path}: this run is complete; its adapter is in {run.adapter}")
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, run.stop)
        train(recipe, run)

    sys.exit(exit_code(work))


def report_command(name: str, stage: str, report: Callable[[Recipe], None]) -> None:
    """`python -m qalign.NAME RECIPE [key=value …]` for a report on a finished stage; does not return."""
    args = _parser(name, report.__doc__).parse_args()
    sys.exit(exit_code(lambda: report(load(args.recipe, args.overrides, stage))))


def exit_code(work: Callable[[], None]) -> int:
    """Runs it: 0, or 2 with a line a mistake, or 128 + the signal that stopped it."""
    # One process, one GPU: with several visible, Trainer would split batches over them behind qalign's back.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console that has no arrows must not stop a run
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it suggests an optional package at import
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("qalign trains on one GPU in one process; start it with `python -m`, not with a launcher")
        work()
    except UserError as error:
        for line in error.lines:
            print(line, file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; torch may not even be imported
            raise
        reason = str(error).partition(". ")[0]
        print(f"out of GPU memory ({reason}). Try nf4, a smaller model or model.max_length", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"{error.filename or 'disk'}: {error.strerror}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"stopped by {stop}", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m qalign.{name}", description=(doc or "").partition("\n")[0])
    parser.add_argument("recipe", help="a recipe, such as recipes/smollm2_demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as dpo.max_steps=20 output=runs/try")
    return parser
