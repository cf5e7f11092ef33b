"""The `qalign` command, and how every command begins, ends and fails.

    qalign COMMAND …    is python -m qalign.COMMAND …
    qalign RECIPE …     is python -m qalign RECIPE …, which runs every stage of the recipe

Imports no torch, so a typing error on the command line or in the recipe is reported at once.
"""

import argparse
import importlib
import logging
import os
import platform
import select
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import NoReturn, TextIO, TypeVar

from qalign.config import cache
from qalign.config.atomic import check_writable
from qalign.config.load import load
from qalign.config.paths import expanded
from qalign.config.recipe import NOT_SHARED, Recipe
from qalign.errors import Stopped, UserError, did_you_mean, disk_problem, one_line, out_of_memory, program, short
from qalign.model import origin
from qalign.train.dataset import ReadRows, print_rows
from qalign.train.processes.launch import launched
from qalign.train.processes.watch import BEAT, SILENCE, ProcessEnded
from qalign.train.processes.world import World, current, entered, world_of
from qalign.train.run_folder import RunFolder

COMMANDS = {
    "sft": "supervised fine-tuning on example dialogues",
    "reward": "train a reward model on preference pairs",
    "dpo": "direct preference optimisation and its family",
    "kto": "learn from single answers labelled good or bad",
    "ppo": "reinforcement learning against a reward model or function",
    "grpo": "the same without a value model: GRPO, Dr. GRPO, RLOO",
    "constitution": "make training data from principles: revisions and labelled pairs",
    "evaluate": "measure any run on held-out rows, before and after, and the alignment tax",
    "h3": "how helpful, harmless and honest runs are, before and after",
    "score": "score answers with a trained reward model",
    "compare": "win rate of one model against another, by a judge",
    "best_of": "sample n answers to each prompt and keep the best, as training data",
    "goodhart": "see where optimising a reward stops making answers better",
    "export": "take a finished run elsewhere: one merged model, GGUF, Ollama, MLX",
    "fit": "forecast the memory that each stage of a recipe needs",
    "watch": "show a run's curves in the terminal",
    "init": "write a recipe into the current folder",
    "page": "open the comparison page in the browser",
}
SHARED_BASE = ("sft", "reward", "dpo", "kto")  # stages whose processes can share one base (`model.shard`)
SHARED = (*SHARED_BASE, "ppo", "grpo")  # stages that several processes can run together
MODULES = {"page": "qalign.page.launch"}  # of commands that are no module right under qalign
Run = TypeVar("Run", bound=RunFolder)
OTHER_NAMES = {"merge": "; to merge an adapter into its base: `qalign export RUN --to merged`"}
PIPE_CLOSED = 128 + 13  # as a program that SIGPIPE ended


class Parser(argparse.ArgumentParser):
    """argparse's parser, which says one line about a mistake instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(f"{self.prog}: {message}; {self.prog} --help lists what it takes") + "\n")


HELP = "\n".join(
    [
        "usage: qalign COMMAND …, or qalign RECIPE … for every stage of a recipe\n\ncommands:",
        *(f"  {name:<12} {line}" for name, line in COMMANDS.items()),
        "\nqalign COMMAND --help lists the options of a command.",
    ]
)


def main(words: Sequence[str] | None = None) -> None:
    """The console script: runs a command, or all stages of a recipe; does not return. `words` are the command line's,
    by default those of this process."""
    first, *others = [*(sys.argv[1:] if words is None else words)] or ["--help"]
    if first in ("-h", "--help"):
        sys.exit(exit_code(lambda: print(HELP)))
    if first in COMMANDS:
        importlib.import_module(MODULES.get(first, f"qalign.{first}")).main(others)
    elif first.startswith("-") or Path(first).suffix in (".yaml", ".yml") or os.path.isfile(first):
        importlib.import_module("qalign.__main__").main([first, *others])
    else:
        hint = OTHER_NAMES.get(first) or did_you_mean(first, COMMANDS)
        hint = hint or "; `qalign --help` lists the commands, and a recipe ends with .yaml"
        sys.exit(_failed(one_line(f"qalign: there is no command '{first}'{hint}")))


def exit_code(work: Callable[[], None], *, shared: bool = False) -> int:
    """Runs `work`. Returns 0, or 2 after one printed line for each error, or 128 + the signal that stopped it.

    Args:
        shared: whether several processes can share the work, as a launcher starts them; otherwise that is an error.
    """
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")  # a console without arrows must not stop a run
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it suggests an optional package when imported
    try:
        try:
            return _outcome(work, shared)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not any([_reader_is_gone(sys.stdout), _reader_is_gone(sys.stderr)]):
            raise  # another pipe, of a library
        return PIPE_CLOSED


def _set_up_torch(local_rank: int) -> None:
    """Sets what torch reads from the environment when it starts. Whatever the user has set stays."""
    # One process uses one GPU: with several visible, Trainer would split batches over them.
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = [str(number) for number in range(local_rank + 1)] if given is None else given.split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = "".join(visible[local_rank : local_rank + 1])
    for name, folder in cache.compile_caches().items():
        os.environ.setdefault(name, folder)
    # Segments that can't grow leave gaps: DPO at 7B reserved 23.3 GiB for 19.0. WSL's driver refuses them
    # (pytorch/pytorch issue 192330), and Windows and macOS don't have them.
    has_segments = sys.platform == "linux" and "microsoft" not in platform.release().lower()
    if has_segments and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _outcome(work: Callable[[], None], shared: bool) -> int:
    try:
        world = world_of(launched())
    except UserError as error:
        return _failed(*error.lines)
    _set_up_torch(world.local_rank)
    if world.size > 1 and not shared:
        reason = "this command runs in one process; start it with `python -m`, not with a launcher"
        return _failed(reason) if world.is_first else 2
    with entered(world), ExitStack() as silent:
        if not world.is_first:  # the first one prints for all
            nothing = silent.enter_context(open(os.devnull, "w"))
            silent.enter_context(redirect_stdout(nothing))
            silent.enter_context(redirect_stderr(nothing))
        return _said(work, world)


def _said(work: Callable[[], None], world: World) -> int:
    """The exit code of `work`; what ends it early is said by one process for all."""
    try:
        try:
            os.getcwd()
        except FileNotFoundError:
            raise UserError("the current folder was deleted; change to one that is there") from None
        work()
        world.leave()
    except UserError as error:
        return world.fail(error.lines, 2)
    except ProcessEnded as end:
        return world.fail(end.lines, end.code, end.dead)
    except (Stopped, KeyboardInterrupt) as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        return world.fail([f"stopped by {signal.Signals(number).name}"], 128 + number)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's own, by name: torch may not even be imported
            return world.fail(out_of_memory(error, "nf4, a smaller model or model.max_length").lines, 2)
        if problem := disk_problem(error):
            return world.fail([one_line(problem)], 2)
        if world.size > 1:
            return _broken(error, world)
        raise
    return 0


def _broken(error: Exception, world: World) -> int:
    """The exit code after an error that isn't the user's: of qalign, or of a library that waited for a process which is
    gone."""
    try:
        world.check(wait=SILENCE + BEAT)
    except ProcessEnded as end:
        return world.fail(end.lines, end.code, end.dead)
    traceback.print_exception(error, file=sys.__stderr__)
    return world.fail([f"{world.me} failed: {one_line(repr(error))}"], 1)


def _failed(*lines: str) -> int:
    print(*lines, sep="\n", file=sys.stderr)
    return 2


def _reader_is_gone(stream: TextIO) -> bool:
    """Whether nobody reads this stream any more, as after `qalign --help | head -1`. It then leads nowhere, so that
    Python's own last flush doesn't fail."""
    with suppress(OSError, ValueError):  # it is no file, as in a test
        poll = select.poll()
        poll.register(stream, 0)  # errors are reported without being asked for
        if any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            return True
    return False


def stage_command(
    stage: str,
    train: Callable[[Recipe, RunFolder], None],
    read: Callable[[RunFolder], ReadRows],
    words: Sequence[str] | None = None,
) -> None:
    """`python -m qalign.STAGE RECIPE [key=value …] [--resume | --overwrite | --check]`; does not return. `read` reads
    the rows, which is all that `--check` does."""

    def work(args: argparse.Namespace) -> None:
        recipe = load(args.recipe, args.overrides, stage)
        run = RunFolder(recipe, stage, shlex.join([args.recipe, *args.overrides]))
        if args.check:
            print_rows(run, read(run))
        else:
            work_in(run, args, train)

    parser = stage_parser(stage, train.__doc__)
    parser.add_argument("--check", action="store_true", help="only say which rows are used and which refused")
    run_parsed(parser, work, words, shared=stage in SHARED)


def work_in(run: Run, args: argparse.Namespace, train: Callable[[Recipe, Run], None]) -> None:
    """Does the work of a stage in a run folder that it holds, as `--resume` and `--overwrite` say."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, run.stop)
    run.resume, is_first = args.resume, current().is_first
    with run.held() if is_first else nullcontext():
        if is_first:
            run.claim(resume=args.resume, overwrite=args.overwrite)
        if args.resume and run.complete:
            print(f"{run.path}: this run is complete; {run.further}")
        else:
            check_shared(run)
            origin.check(run.recipe.model)
            train(run.recipe, run)


def check_shared(run: RunFolder) -> None:
    """A `UserError` if `model.shard` is set and these processes can't share a base."""
    if run.recipe.model.shard and run.name not in SHARED_BASE:
        raise UserError(f"model.shard: {NOT_SHARED}")
    if run.recipe.model.shard and current().size == 1:
        start = f"torchrun --nproc-per-node 2 -m qalign.{run.name} {run.command_line}"
        streams = "model.shard=false: layers that don't fit are then streamed"
        raise UserError(f"model.shard: needs a process for each card; start it with {start}, or set {streams}")


def new_target(to: str | None, default: Path, option: str = "--to") -> Path:
    """Where a command writes: what its option says, or by default; a `UserError` if something is there already, or
    nothing can be written there."""
    target = expanded(to) if to else default
    if "\0" in str(target) or (to and to.startswith("~") and target == Path(to)):
        raise UserError(f"{option}: {short(to)} is no path, or of a user who doesn't exist")
    if os.path.lexists(target):
        raise UserError(f"{target}: exists already; name another with {option}, or remove it")
    check_writable(target)
    return target


def run_parsed(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], None],
    words: Sequence[str] | None,
    *,
    shared: bool = False,
) -> None:
    """Parses the command line, runs `work` on it, `shared` by several processes or not, and exits with its code."""
    sys.exit(exit_code(lambda: work(parser.parse_intermixed_args(words)), shared=shared))


def stage_parser(stage: str, doc: str | None) -> argparse.ArgumentParser:
    """The options of a stage, or of the command that runs all stages if the name is empty."""
    parser = recipe_parser(stage, doc)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="continue a run that was stopped, to the same numbers")
    how.add_argument("--overwrite", action="store_true", help="start again in place of the existing run")
    return parser


def recipe_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A recipe with overrides; a command may add its own options."""
    parser = Parser(prog=program(name), description=(doc or "").partition("\n")[0])
    parser.add_argument("recipe", help="a recipe, such as recipes/smollm2_demo.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="such as dpo.max_steps=20 output=runs/try"
    )
    return parser
