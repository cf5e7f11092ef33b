"""Kills every stage and best_of with SIGKILL, at random times and at every named moment, resumes them, and compares
weights and metrics with a run that was never killed. All must be equal, to the bit.

    python -m tests.campaign.kill [--short] [--stages dpo ppo] [--seed 0]

A named moment is the time right before or after a call that matters: a rename, a `torch.save`, a step of the run
folder. What `--overwrite` replaces must be there whole, or the new run must resume.
"""

import functools
import os
import random
import shutil
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from qalign.model.base import Base
from qalign.rl.ppo_loop import PPOLoop
from qalign.train.callbacks import RunCallback
from qalign.train.run_folder import RunFolder
from tests.campaign.lab import KINDS, Lab, Outcome, Table, campaign, plain, start

RANDOM = 20
FILES = ((os, ("replace", "rename")), (shutil, ("rmtree",)), (torch, ("save",)))  # named with the last path given
STEPS = (
    (Base, ("save_adapter",)),
    (RunFolder, ("begin", "rewind", "log", "mark_whole", "finish")),
    (RunCallback, ("on_train_begin", "on_step_end", "on_save", "on_evaluate", "on_train_end")),
    (PPOLoop, ("_save", "_evaluate")),
)
Moment = tuple[str, int, str]  # the call's name, its number among those of that name from 1, before or after it


def watch(note: Callable[[str, str], None]) -> None:
    """Calls `note(name, "before")` and `note(name, "after")` around every call that is watched."""
    for owner, name in [(owner, name) for owner, names in (*FILES, *STEPS) for name in names]:
        real = getattr(owner, name)

        def wrapped(*args, real=real, name=name, owner=owner, **named):
            paths = [plain(Path(os.fsdecode(arg)).name) for arg in args[-1:] if isinstance(arg, (str, os.PathLike))]
            call = " ".join([name, *paths]) if owner in (os, shutil, torch) else name
            note(call, "before")
            found = real(*args, **named)
            note(call, "after")
            return found

        setattr(owner, name, functools.wraps(real)(wrapped))


def recorder(file: Path) -> Callable[[], None]:
    """Writes the name of every watched call into a file."""

    def prepare() -> None:
        output = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        watch(lambda name, when: os.write(output, f"{name}\n".encode()) if when == "before" else None)

    return prepare


def recorded(lab: Lab, stage: str) -> list[str]:
    """The watched calls of a run, with warm caches."""
    file, (path, _) = lab.folder / f"{stage}.calls", lab.recipe(stage, "recorded")
    start(stage, [path], recorder(file))
    return file.read_text().splitlines()


def killer(moment: Moment) -> Callable[[], None]:
    """Kills its process at a moment."""
    name, number, when = moment

    def prepare() -> None:
        calls = 0

        def note(called: str, at: str) -> None:
            nonlocal calls
            calls += called == name and at == when
            if called == name and at == when and calls == number:
                os.kill(os.getpid(), signal.SIGKILL)

        watch(note)

    return prepare


def named_moments(calls: list[str], *, short: bool) -> list[Moment]:
    """Before the first and after the last call of each name."""
    names = list(dict.fromkeys(calls))
    found = [moment for name in names for moment in ((name, 1, "before"), (name, calls.count(name), "after"))]
    return found[:: max(1, len(found) // 6)] if short else found


def resumed(lab: Lab, stage: str, path: str, killed: Outcome) -> list[str]:
    """What is wrong after `--resume`."""
    if killed.code != -signal.SIGKILL:
        return [f"it was not killed: {killed.code}, {killed.last_line}"]
    again = start(stage, [path, "--resume"])
    if again.code:
        return [f"--resume ended with {again.code}: {again.last_line}"]
    return lab.differences(stage, lab.run(path))


def kill_random(lab: Lab, stage: str, draw: random.Random) -> list[str]:
    """Killed at a random time; every other time once more while it resumes."""
    path, run = lab.recipe(stage, "random")
    shutil.rmtree(run.path, ignore_errors=True)
    after = draw.random() * lab.seconds[stage]
    outcome = start(stage, [path], kill_after=after)
    if outcome.code == 0:  # this one was faster
        return lab.differences(stage, run)
    if draw.random() < 0.5:
        outcome = start(stage, [path, "--resume"], kill_after=draw.random() * lab.seconds[stage])
        if outcome.code == 0:
            return lab.differences(stage, run)
    return resumed(lab, stage, path, outcome)


def kill_at(lab: Lab, stage: str, moment: Moment) -> list[str]:
    path, run = lab.recipe(stage, "named")
    shutil.rmtree(run.path, ignore_errors=True)
    return resumed(lab, stage, path, start(stage, [path], killer(moment)))


def kill_overwrite(lab: Lab, stage: str, moment: Moment) -> list[str]:
    """Killed while `--overwrite` replaces a finished run of another recipe."""
    path, run = lab.recipe(stage, "overwrite")
    shutil.rmtree(run.path, ignore_errors=True)
    old = lab.folder / "old" / stage
    if not old.exists():
        start(stage, [path, f"{run.stage}.{KINDS[stage].changed}"])
        shutil.copytree(run.path, old)
    else:
        shutil.copytree(old, run.path)
    killed = start(stage, [path, "--overwrite"], killer(moment))
    if killed.code != -signal.SIGKILL:
        return [f"it was not killed: {killed.code}, {killed.last_line}"]
    again = start(stage, [path, "--resume"])
    if again.code == 0:
        return lab.differences(stage, run)
    if again.code != 2 or "is complete, with another recipe" not in again.said:
        return [f"--resume ended with {again.code}: {again.last_line}"]
    contents = ({str(f.relative_to(p)): f.read_bytes() for f in p.rglob("*") if f.is_file()} for p in (old, run.path))
    if next(contents) != next(contents):
        return ["the old run is not as it was"]
    again = start(stage, [path, "--overwrite"])
    return (
        lab.differences(stage, run) if again.code == 0 else [f"--overwrite ended with {again.code}: {again.last_line}"]
    )


def work(lab: Lab, args: Namespace, table: Table) -> None:
    draw = random.Random(args.seed)
    for stage in args.stages:
        lab.whole(stage)
        calls = recorded(lab, stage)
        for _ in range(3 if args.short else RANDOM):
            table.add(stage, "killed at random", kill_random(lab, stage, draw))
        for moment in named_moments(calls, short=args.short):
            table.add(stage, "killed at a named moment", kill_at(lab, stage, moment), str(moment))
        first = ["begin", "rewind", "mark_whole", "rmtree .{}.replaced", "rename .{}.replaced", "log"]
        for name in first[:: 3 if args.short else 1]:
            for when in ("before", "after"):
                moment = (name.format(KINDS[stage].command), 1, when)
                table.add(stage, "--overwrite killed", kill_overwrite(lab, stage, moment), str(moment))


def main(words: list[str] | None = None) -> int:
    return campaign(__doc__ or "", work, words, tuple(KINDS))


if __name__ == "__main__":
    sys.exit(main())
