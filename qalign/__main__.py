"""Runs every stage of a recipe in order, each in its own process.

    python -m qalign RECIPE [key=value …] [--resume | --overwrite]

A complete stage is skipped if it was trained with the same settings; `--resume` continues a stage that was stopped.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from qalign.cli import run_parsed, stage_parser
from qalign.config.load import load
from qalign.config.recipe import Recipe
from qalign.config.stages import CONSTITUTION, RL_STAGES, STAGES
from qalign.constitution import ConstitutionRun
from qalign.errors import UserError
from qalign.reports.ppo_report import file_name
from qalign.train.checkpoints import read_metrics
from qalign.train.run_folder import RunFolder, print_table


def run_all(path: str, overrides: list[str], flags: list[str]) -> None:
    """Run every stage of a recipe in order.

    Raises:
        UserError: the recipe has no stage, or a complete stage was trained with other settings.
        SystemExit: a stage ended with this exit code, after it printed why.
    """
    recipe = load(path, overrides)
    if not recipe.runs:
        names = ", ".join(f"{stage}:" for stage in STAGES)
        raise UserError(f"{path}: has none of the sections {names}, so there is nothing to run")
    states = []
    for stage in recipe.runs:
        run, state = _folder(recipe, stage, shlex.join([path, *overrides])), "trained"
        if run.complete and "--overwrite" not in flags:
            if changed := run.changes():
                fix = "choose another `output`, or train all stages again with --overwrite"
                raise UserError(f"{run.path}: is complete, but the recipe has changed since: {changed}; {fix}")
            run.check_parent()
            print(f"{run.path}: complete, skipped", flush=True)
            state = "skipped"
        else:
            begun = (run.path / "recipe.yaml").is_file()
            mine = [flag for flag in flags if flag != "--resume" or begun]
            if code := _run([sys.executable, "-m", f"qalign.{stage}", path, *overrides, *mine]):
                sys.exit(code)
            if not run.complete:
                raise UserError(
                    f"{run.path}: the {stage} stage ended before it was complete; did a reward end the process?"
                )
        states.append((run, state))
    rows = [(run.stage, f"{state:<8} {_result(run)}") for run, state in states]
    print_table(f"{recipe.output}: all stages", rows)


def _folder(recipe: Recipe, stage: str, command_line: str) -> RunFolder:
    if stage == CONSTITUTION:
        return ConstitutionRun(recipe, command_line)
    return RunFolder(recipe, stage, command_line)


def _run(command: list[str]) -> int:
    """The exit code of a stage's process. Ctrl-C reaches that process by itself; SIGTERM is passed on."""
    with subprocess.Popen(command) as process:
        handlers = {
            signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: None),
            signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number)),
        }
        try:
            code = process.wait()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _result(run: RunFolder) -> str:
    """A complete stage in one line."""
    try:
        return _in_words(run, json.loads(run.summary.read_text(encoding="utf-8")))
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{run.summary} is damaged; train it again with --overwrite"


def _in_words(run: RunFolder, facts: dict[str, Any]) -> str:
    if run.stage == CONSTITUTION:
        made = f"{facts['revisions']:,} revisions, {facts['pairs'] or 0:,} pairs, {facts['wall_seconds'] / 60:.1f} min"
        return f"{made}; {facts['verdict'][0]}"
    logged = read_metrics(run.metrics)
    steps = [line for line in logged if line.get("loss") is not None]
    name, words = ("objective/scores", "reward") if run.stage in RL_STAGES else ("loss", "loss")
    parts = [
        f"{facts['steps']:,} steps",
        f"{facts['wall_seconds'] / 60:.1f} min",
        f"{facts['peak_bytes'] / 2**30:.1f} GiB",
        *(f"{words} {first[name]:.3f} → {last[name]:.3f}" for first, last in zip(steps[:1], steps[-1:], strict=True)),
    ]
    if trust := facts.get("trust"):
        low, high = trust["accuracy_interval"]
        parts.append(f"held-out accuracy {trust['accuracy']:.1%} ({low:.1%} to {high:.1%})")
    if held_out := [line["eval_loss"] for line in logged if line.get("eval_loss") is not None]:
        parts.append(f"held-out loss {held_out[-1]:.3f}")
    sampled = facts.get("held_out", {})
    rewarded = "proxy" in sampled.get("first", {})
    if rewarded:
        parts.append(f"held-out reward {sampled['first']['proxy']:.3f} → {sampled['last']['proxy']:.3f}")
    if facts.get("alarm_steps"):
        unit, report = "iteration" if rewarded else "step", run.path / file_name(run.stage)
        parts.append(f"ALARM at {unit} {facts['alarm_steps'][0]}: see {report}")
    return ", ".join(parts)


def main(words: Sequence[str] | None = None) -> None:

    def work(args: argparse.Namespace) -> None:
        run_all(args.recipe, args.overrides, [f"--{name}" for name in ("resume", "overwrite") if getattr(args, name)])

    run_parsed(stage_parser("", run_all.__doc__), work, words)


if __name__ == "__main__":
    main()
