"""The commands that read a recipe: the stages, and reports on them."""

import argparse
import shlex
import signal
import sys
from collections.abc import Callable

from qalign.command import exit_code
from qalign.recipe import Recipe
from qalign.recipe_file import load
from qalign.run import RunFolder


def stage_command(stage: str, train: Callable[[Recipe, RunFolder], None]) -> None:
    """`python -m qalign.STAGE RECIPE [key=value …] [--resume | --overwrite]`; does not return."""
    args = stage_parser(stage, train.__doc__).parse_intermixed_args()

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
    args = recipe_parser(name, report.__doc__).parse_intermixed_args()
    sys.exit(exit_code(lambda: report(load(args.recipe, args.overrides, stage))))


def stage_parser(stage: str, doc: str | None) -> argparse.ArgumentParser:
    """What stages understand; without a name, what all of them together do."""
    parser = recipe_parser(stage, doc)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on with a run that was stopped, to the same numbers")
    how.add_argument("--overwrite", action="store_true", help="delete the run that is there and start anew")
    return parser


def recipe_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    program = ".".join(part for part in ("qalign", name) if part)
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=(doc or "").partition("\n")[0])
    parser.add_argument("recipe", help="a recipe, such as recipes/smollm2_demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as dpo.max_steps=20 output=runs/try")
    return parser
