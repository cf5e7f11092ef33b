"""Everything that is worth measuring on a GPU, in one command and in the order of importance.

    python benchmarks/all_on_gpu.py [--minutes 8] [--only decode dpo …] [--rivals] [--dry-run]
    python benchmarks/all_on_gpu.py --shape tiny     # the same commands on a CPU; their figures say nothing

Each part is a command of its own with a time limit. What it printed is written to `all_on_gpu.md` (in `results/`, or
`--out`) as soon as it ends, so that nothing is lost when the time is up. The last parts are left out then, and the
document says so. The base of random weights for the part `start` is made in memory (`/dev/shm`) where there is room.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
RAM = Path("/dev/shm")
RAM_BYTES = 40 * 2**30  # a 7B in 16 bits, and once more in 4
SHOWN = 8000  # characters of what a part printed, from its end


@dataclass(frozen=True)
class Part:
    """One command, or several one after the other within one limit."""

    name: str
    seconds: int
    commands: tuple[str, ...]


def parts(shape: str, out: Path, folder: Path, *, rivals: bool) -> list[Part]:
    """All parts, the most important first; `folder` is for what is thrown away afterwards."""
    tiny = shape == "tiny"
    few = "--steps 1 --batch 2" if tiny else "--steps 4"
    cards = "--cards 0.02 --max-length 240 --steps 1" if tiny else "--cards 8 12 16 24"
    sides = "qalign-cached qalign-auto" + (" trl-defaults trl-best unsloth" if rivals else "")
    gpu = "benchmarks/gpu.py --shape"
    data = (
        f"--data {'hh' if tiny else 'ultrafeedback hh'} --memory 24 --rounds 1 --longest-pair 0 --profile --out {out}"
    )
    short = "--answers 2 --prompt 9 --tokens 10" if tiny else ""
    recipe, base = folder / "recipe.yaml", folder / "base"
    start = f"benchmarks/start.py dpo {recipe}"
    longest = "tiny" if tiny else "llama31_8b"
    return [
        Part("decode", 75, (f"benchmarks/decode.py --shape {shape} {short} --families",)),
        Part("dpo", 400 if rivals else 120, (f"{gpu} {shape} --sides {sides} {few} {data} --out {out}",)),
        Part("memory", 110, (f"benchmarks/memory.py --cuda --shape {shape} {cards}",)),
        Part("longest", 80, (f"{gpu} {longest} --longest --memory 8 12 16 24 --minutes 1.2",)),
        *([] if tiny else [Part("stream", 150, ("benchmarks/stream.py --minutes 2",))]),
        Part("start", 90, (f"benchmarks/random_models.py {shape} {base}", start, start)),
        Part("checks", 120, ("benchmarks/gpu.py --check",)),
        Part("bars", 60, ("-m pytest -q tests/train/test_bars.py",)),
    ]


def write_recipe(folder: Path) -> None:
    """The recipe of the part `start`."""
    lines = [
        f"model: {{base: {folder / 'base'}}}",
        f"output: {folder / 'run'}",
        f"dpo: {{data: {ROOT / 'recipes/data/house_style_train.jsonl'}}}",
    ]
    (folder / "recipe.yaml").write_text("\n".join(lines) + "\n")


def run(command: str, seconds: float, environment: dict[str, str]) -> tuple[str, str]:
    """(how it ended, what it printed) of one command of Python's; past its time, it is killed with all it started."""
    words = [sys.executable, *shlex.split(command)]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(max(1.0, seconds))
            ended = "done" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(0)
        lines = [line.rpartition("\r")[2] for line in said.read().splitlines()]  # of a bar, its last state
    return ended, "\n".join(lines)[-SHOWN:]


def section(command: str, ended: str, took: float, said: str) -> str:
    """Markdown of one command: tables as they are, the rest as code."""
    return f"\n    python {command}\n\n{ended}, {took:.0f} s\n\n```\n{said.strip()}\n```\n"


def measure(chosen: Sequence[Part], minutes: float, file: Path, environment: dict[str, str]) -> int:
    """Runs the parts until the time is up. Returns the number of parts that didn't end well."""
    deadline, failed = time.monotonic() + 60 * minutes, 0
    file.write_text(f"# Measured on a GPU\n\n`python {shlex.join(sys.argv)}`\n\n{machine()}\n")
    for part in chosen:
        text, until, good = f"\n## {part.name}\n", min(deadline, time.monotonic() + part.seconds), True
        for command in part.commands:
            if time.monotonic() > deadline - 5:
                text, good = text + f"\n    python {command}\n\nno time left\n", False
                break
            began = time.monotonic()
            ended, said = run(command, until - began, environment)
            took = time.monotonic() - began
            text += section(command, ended, took, said)
            print(f"{part.name}: {ended}, {took:.0f} s: python {command}", flush=True)
            if ended != "done":
                good = False
                break
        failed += not good
        with file.open("a") as document:
            document.write(text)
    return failed


def machine() -> str:
    """The card and the versions, in words."""
    code = (
        "import torch; from qalign.train.run_folder import versions; "
        "print((torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU') + '; ' + "
        "', '.join(f'{k} {v}' for k, v in versions().items()))"
    )
    return run(f"-c {shlex.quote(code)}", 60, dict(os.environ))[1].strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [part.name for part in parts("tiny", Path(), Path(), rivals=False)]
    parser.add_argument("--shape", choices=["mistral7b", "llama31_8b", "qwen3_4b", "tiny"], default="mistral7b")
    parser.add_argument("--minutes", type=float, default=8, help="for all parts together")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="parts, in this script's order")
    parser.add_argument("--rivals", action="store_true", help="TRL and Unsloth beside qalign: five minutes more")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and their limits, run nothing")
    args = parser.parse_args()
    enough = RAM.is_dir() and shutil.disk_usage(RAM).free > RAM_BYTES
    with tempfile.TemporaryDirectory(dir=RAM if enough else None) as folder:
        found = parts(args.shape, args.out.resolve(), Path(folder), rivals=args.rivals)
        chosen = [part for part in found if part.name in args.only]
        if args.dry_run:
            for part in chosen:
                print(f"{part.name}, at most {part.seconds} s", *(f"    python {c}" for c in part.commands), sep="\n")
            return 0
        args.out.mkdir(parents=True, exist_ok=True)
        write_recipe(Path(folder))
        more = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": folder}  # the first start finds no cache
        file = args.out / "all_on_gpu.md"
        failed = measure(chosen, args.minutes, file, os.environ | more)
    print(f"{len(chosen) - failed} of {len(chosen)} parts ended well; {file}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
