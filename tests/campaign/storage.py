"""Fills the disk, makes it read-only and damages files: each stage says so in a line and resumes to the same numbers.

    python -m tests.campaign.storage [--short] [--stages dpo ppo] [--seed 0]

A disk is a small tmpfs where this machine lets us mount one, as root on Linux. Elsewhere a full disk is a limit on the
size of a file, and the read-only one is left out. Never a traceback, never other numbers in silence.
"""

import os
import random
import resource
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qalign.config.load import load
from qalign.train.run_folder import RunFolder
from tests.campaign.kill import killer
from tests.campaign.lab import Lab, Outcome, Table, campaign, start

SIZES = 20
ROOM = "size=256m"


def flip(place: float) -> Callable[[Path], None]:
    """Flips a bit of a file, at a share of its length."""

    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes()) or bytearray(b"\0")
        content[int(place * (len(content) - 1))] ^= 4
        file.write_bytes(content)

    return damage


def folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "first byte flipped": flip(0),
    "middle flipped": flip(0.5),
    "last byte flipped": flip(1),
    "cut in half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "one byte short": lambda file: os.truncate(file, max(0, file.stat().st_size - 1)),
    "empty": lambda file: os.truncate(file, 0),
    "missing": lambda file: file.unlink(),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0junk\xff\n"),
    "other bytes": lambda file: file.write_bytes(b"\xff\0\n{" * 40),
    "a folder": folder_instead,
}
FEW = ("middle flipped", "empty", "missing", "other bytes")  # for files that no checkpoint holds


@contextmanager
def disk(folder: Path, options: str) -> Iterator[bool]:
    """Mounts a tmpfs at a folder; False if this machine doesn't let us."""
    folder.mkdir(parents=True, exist_ok=True)
    done = sys.platform == "linux" and not _mount("-t", "tmpfs", "-o", options, "tmpfs", str(folder))
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", str(folder)], check=False)


def _mount(*words: str) -> int:
    if not shutil.which("mount"):
        return 1
    return subprocess.run(["mount", *words], check=False, capture_output=True).returncode


def refused(outcome: Outcome) -> list[str]:
    """What is wrong with how a command said that it can't go on."""
    if "Traceback" in outcome.said:
        return [f"a traceback: {outcome.last_line}"]
    if outcome.code != 2:
        return [f"exit code {outcome.code}: {outcome.last_line}"]
    line = outcome.last_line
    return [f"a line of {len(line)} characters: {line}"] if len(line) > 300 and "%|" not in line else []


def on(path: str, output: Path) -> tuple[list[str], RunFolder]:
    """(the words of a command with another output, that run)."""
    stage, words = Path(path).stem, [path, f"output={output}"]
    return words, RunFolder(load(path, words[1:], stage), stage, path)


def full(lab: Lab, stage: str, size: int) -> list[str]:
    """A disk of so many bytes, then one with room."""
    path, _ = lab.recipe(stage, "full")
    with disk(lab.folder / "disk", f"size={size}") as mounted:
        words, run = on(path, lab.folder / "disk" if mounted else lab.folder / "limited")
        if not mounted:
            return limited(lab, stage, size // 4)
        outcome = start(stage, words)
        if outcome.code == 0:
            return lab.differences(stage, run)
        if wrong := refused(outcome):
            return wrong
        _mount("-o", f"remount,{ROOM}", str(lab.folder / "disk"))
        return goes_on(lab, stage, words, run)


def limited(lab: Lab, stage: str, size: int) -> list[str]:
    """No file may be larger than so many bytes; then it may."""
    path, run = lab.recipe(stage, "limited")
    shutil.rmtree(run.path, ignore_errors=True)
    outcome = start(stage, [path], lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    if outcome.code == 0:
        return lab.differences(stage, run)
    return refused(outcome) or goes_on(lab, stage, [path], run)


def goes_on(lab: Lab, stage: str, words: list[str], run: RunFolder) -> list[str]:
    again = start(stage, [*words, "--resume"])
    return lab.differences(stage, run) if again.code == 0 else [f"--resume ended with {again.code}: {again.last_line}"]


def read_only(lab: Lab, stage: str, stopped: Path | None) -> list[str] | None:
    """A disk that is read-only at the start, or when a stopped run is to go on; None if we can't have one."""
    path, _ = lab.recipe(stage, "damaged" if stopped else "read_only")
    with disk(lab.folder / "disk", ROOM) as mounted:
        if not mounted:
            return None
        words, run = on(path, lab.folder / "disk")
        if stopped:
            shutil.copytree(stopped, run.path)
        _mount("-o", "remount,ro", str(lab.folder / "disk"))
        if wrong := refused(start(stage, [*words, "--resume"] if stopped else words)):
            return wrong
        _mount("-o", "remount,rw", str(lab.folder / "disk"))
        return goes_on(lab, stage, words, run)


def stopped_run(lab: Lab, stage: str) -> Path:
    """A copy of a run that was killed after its last step: two checkpoints, an adapter, no summary."""
    path, run = lab.recipe(stage, "damaged")
    start(stage, [path], killer(("finish", 1, "before")))
    return Path(shutil.copytree(run.path, lab.folder / "stopped" / stage))


def damaged(lab: Lab, stage: str, stopped: Path, file: str, kind: str) -> list[str]:
    """A file of a stopped run is damaged: it goes on to the same numbers, or says in a line why it can't."""
    path, run = lab.recipe(stage, "damaged")
    shutil.rmtree(run.path)
    shutil.copytree(stopped, run.path)
    DAMAGES[kind](run.path / file)
    outcome = start(stage, [path, "--resume"])
    if outcome.code:
        return refused(outcome) or ([] if str(run.path) in outcome.said else ["the folder isn't named"])
    named = "adapter_best: was changed since" in outcome.said
    return lab.differences(stage, run, ["adapter"]) if named else lab.differences(stage, run)


def both_damaged(lab: Lab, stage: str, stopped: Path) -> list[str]:
    path, run = lab.recipe(stage, "damaged")
    shutil.rmtree(run.path)
    shutil.copytree(stopped, run.path)
    for checkpoint in run.checkpoints.iterdir():
        flip(0.5)(next(iter(sorted(checkpoint.glob("*.pt")))))
    outcome = start(stage, [path, "--resume"])
    return refused(outcome) or ([] if "--overwrite" in outcome.said else ["it doesn't say what to do"])


def odd_path(lab: Lab, stage: str, output: Path) -> list[str]:
    path, _ = lab.recipe(stage, "odd")
    return refused(start(stage, [path, f"output={output}"]))


def work(lab: Lab, args: Namespace, table: Table) -> None:
    draw = random.Random(args.seed)
    (lab.folder / "file").touch()
    (lab.folder / "loop").symlink_to(lab.folder / "loop")
    for stage in args.stages:
        whole = lab.whole(stage)
        most = sum(file.stat().st_size for file in whole.path.rglob("*") if file.is_file())
        count = 3 if args.short else SIZES
        for number in range(count):
            size = int(most * 1.2 * (number + draw.random()) / count)
            table.add(stage, "disk full", full(lab, stage, size), f"at {size:,} bytes")
            size = int(most * 0.2 * (number + draw.random()) / count)
            table.add(stage, "file too large", limited(lab, stage, size), f"above {size:,} bytes")
        stopped = stopped_run(lab, stage)
        for start_of in (None, stopped):
            if (wrong := read_only(lab, stage, start_of)) is not None:
                table.add(stage, "read-only", wrong)
        for output in (lab.folder / "file", lab.folder / "file" / "runs", lab.folder / "loop", Path("x" * 300)):
            table.add(stage, "odd path", odd_path(lab, stage, output), str(output)[-20:])
        table.add(stage, "every checkpoint damaged", both_damaged(lab, stage, stopped))
        files = sorted(str(file.relative_to(stopped)) for file in stopped.rglob("*") if file.is_file())
        files = [file for file in files if not file.startswith("samples")]  # nothing reads them
        cases = [(f, kind) for f in files for kind in DAMAGES if "checkpoint-3" in f or kind in FEW]
        for file, kind in draw.sample(cases, 12) if args.short else cases:
            table.add(stage, "damaged file", damaged(lab, stage, stopped, file, kind), f"{file} {kind}")


def main(words: list[str] | None = None) -> int:
    return campaign(__doc__ or "", work, words)


if __name__ == "__main__":
    sys.exit(main())
