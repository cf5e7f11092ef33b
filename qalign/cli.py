"""How every command begins, ends and fails.

Imports no torch: a bad recipe or a typo on the command line answers at once.
"""

import argparse
import errno
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence

from qalign.config.load import load
from qalign.config.recipe import Recipe
from qalign.data.formats import Refused
from qalign.errors import Stopped, UserError
from qalign.train.run_folder import RunFolder

SHOWN_REFUSALS = 5


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


def print_refused(refused: Sequence[Refused]) -> None:
    """Prints the first refused rows and their reasons on stderr; the caller says how many there are."""
    for row in refused[:SHOWN_REFUSALS]:
        print(f"refused: {row.where}: {row.reason}", file=sys.stderr)


def recipe_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    program = ".".join(part for part in ("qalign", name) if part)
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=(doc or "").partition("\n")[0])
    parser.add_argument("recipe", help="a recipe, such as recipes/smollm2_demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as dpo.max_steps=20 output=runs/try")
    return parser
