"""Every stage that a recipe has, in order, each in a process of its own.

    python -m qalign RECIPE [key=value …] [--resume | --overwrite]

What is complete is skipped, if it was trained with what the recipe says now; `--resume` goes on with a stage that was
stopped.
"""

import json
import shlex
import signal
import subprocess
import sys

from qalign.cli import exit_code, stage_parser
from qalign.config.load import load
from qalign.config.stages import STAGES
from qalign.errors import UserError
from qalign.train.run_folder import RunFolder, print_table


def run_all(path: str, overrides: list[str], flags: list[str]) -> None:
    """Run every stage that a recipe has, in order.

    Raises:
        UserError: the recipe has no stage, or a finished stage was trained with something else.
        SystemExit: a stage ended with this code; it has said why.
    """
    recipe = load(path, overrides)
    if not recipe.stages:
        names = ", ".join(f"{stage}:" for stage in STAGES)
        raise UserError(f"{path}: has none of the sections {names}, so there is nothing to run")
    runs = [RunFolder(recipe, stage, shlex.join([path, *overrides])) for stage in recipe.stages]
    done = {}
    for run in runs:
        if run.complete and "--overwrite" not in flags:
            _check_up_to_date(run)
            print(f"{run.path}: complete, skipped", flush=True)
            done[run.stage] = "skipped"
            continue
        begun = (run.path / "recipe.yaml").is_file()
        mine = [flag for flag in flags if flag != "--resume" or begun]
        code = _run([sys.executable, "-m", f"qalign.{run.stage}", path, *overrides, *mine])
        if code:
            sys.exit(code)
        done[run.stage] = "trained"
    print_table(
        f"{recipe.output}: all stages",
        [(run.stage, f"{done[run.stage]:<8} {_result(run)}") for run in runs],
    )


def _check_up_to_date(run: RunFolder) -> None:
    """A finished stage counts only if it is the one that the recipe describes."""
    if changed := run.changes():
        raise UserError(
            f"{run.path}: is complete, but the recipe has changed since: {changed}. "
            f"Choose another `output`, or --overwrite to train all stages again"
        )
    run.check_parent()


def _run(command: list[str]) -> int:
    """The exit code of a stage. Ctrl-C reaches it by itself and it ends cleanly; SIGTERM is passed on."""
    with subprocess.Popen(command) as process:
        before = [
            (signal.SIGINT, signal.signal(signal.SIGINT, lambda number, frame: None)),
            (signal.SIGTERM, signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))),
        ]
        try:
            code = process.wait()
        finally:
            for number, handler in before:
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _result(run: RunFolder) -> str:
    """A finished stage in one line."""
    facts = json.loads(run.summary.read_text(encoding="utf-8"))
    logged = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in logged if "loss" in line]
    name, words = ("objective/scores", "reward") if run.stage == "ppo" else ("loss", "loss")
    parts = [
        f"{facts['steps']:,} steps",
        f"{facts['wall_seconds'] / 60:.1f} min",
        f"{facts['peak_bytes'] / 2**30:.1f} GiB",
        f"{words} {steps[0][name]:.3f} → {steps[-1][name]:.3f}",
    ]
    if trust := facts.get("trust"):
        low, high = trust["accuracy_interval"]
        parts.append(f"held-out accuracy {trust['accuracy']:.1%} ({low:.1%} to {high:.1%})")
    if held_out := [line for line in logged if line.get("eval_loss") is not None]:
        parts.append(f"held-out loss {held_out[-1]['eval_loss']:.3f}")
    if looks := facts.get("held_out"):
        parts.append(f"held-out reward {looks['first']['proxy']:.3f} → {looks['last']['proxy']:.3f}")
    if facts.get("alarm_steps"):
        parts.append(f"ALARM at iteration {facts['alarm_steps'][0]}: see {run.path / 'ppo_report.png'}")
    return ", ".join(parts)


def main() -> None:
    args = stage_parser("", run_all.__doc__).parse_intermixed_args()
    flags = [f"--{name}" for name in ("resume", "overwrite") if getattr(args, name)]
    sys.exit(exit_code(lambda: run_all(args.recipe, args.overrides, flags)))


if __name__ == "__main__":
    main()
