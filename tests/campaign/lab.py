"""A laboratory for campaigns: stages run in forked children of one process that has imported everything, so that a
start takes a second, and a finished run is compared with one that nothing ever happened to."""

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}

import torch
import yaml
from safetensors.torch import load_file

from qalign.model import generation
from qalign.rl import ppo_setup
from qalign.train.run_folder import RunFolder
from tests.conftest import tiny_model
from tests.helpers import TRAIN
from tests.train.runs import CLOCK, HELD_OUT, STAGES, WEIGHTS, recipe_of

Prepare = Callable[[], None]
# Three steps, the last in the middle of an epoch; dropout, so that the random generators count; a report at the end.
KEYS = {"limit": 20, "max_steps": 3, "save_every": 1, "eval_data": HELD_OUT, "eval_every": 2, "lora": {"dropout": 0.1}}
SAMPLED = {"sample_prompts": 3, "sample_every": 2, "max_new_tokens": 8}  # while DPO trains
OWN = (*CLOCK, "adapter")  # in metrics: what the clock says, and a path
TIMEOUT = 300  # seconds


@dataclass(frozen=True)
class Kind:
    """What a campaign runs.

    Attributes:
        command: the command; its run folder has the same name.
        section: its section of the recipe.
        words: behind the recipe on the command line.
        keys: more keys of the section.
        adapters: folders of a finished run whose weights are compared.
        changed: a key and a value that make it another run.
    """

    command: str
    section: str
    words: tuple[str, ...] = ()
    keys: dict = field(default_factory=dict)
    adapters: tuple[str, ...] = ("adapter", "adapter_best")
    changed: str = "learning_rate=0.5"


KINDS = {stage: Kind(stage, stage) for stage in STAGES}
KINDS["dpo"] = Kind("dpo", "dpo", keys=SAMPLED)
KINDS["ensemble"] = Kind("reward", "reward", (), {"members": 2}, ("adapter/member_1", "adapter/member_2"))
KINDS["best_of"] = Kind("best_of", "ppo")
KINDS["rounds"] = Kind(
    "best_of", "ppo", ("rounds=2", "n=2", "dpo.data=" + TRAIN, "dpo.max_steps=2", "dpo.save_every=1")
)
LABELLED = {"data": TRAIN, "limit": 20, "max_new_tokens": 8, "agree_with": HELD_OUT, "force": True}
KINDS["constitution"] = Kind("constitution", "constitution", (), LABELLED, (), "temperature=0.5")
MADE = ("picks.jsonl", "pairs.jsonl", "revisions.jsonl", "judgements.jsonl")


@dataclass(frozen=True)
class Outcome:
    code: int  # the exit code; negative if a signal ended it
    said: str
    seconds: float

    @property
    def last_line(self) -> str:
        return (self.said.strip().splitlines() or ["(nothing)"])[-1]


def start(name: str, words: Sequence[str], prepare: Prepare | None = None, kill_after: float | None = None) -> Outcome:
    """Runs a command, or a kind of run by its name, in a child.

    Args:
        prepare: called in the child first.
        kill_after: seconds until the child gets SIGKILL.
    """
    log, began = Path(tempfile.mkstemp()[1]), time.monotonic()
    kind = KINDS.get(name, Kind(name, name))
    words = [words[0], *kind.words, *words[1:]]
    if (child := os.fork()) == 0:
        output = os.open(log, os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = 1
        try:
            if prepare:
                prepare()
            if kind.command in ("best_of", "constitution"):  # a tenth of the tiny model's tokens ends an answer
                ppo_setup.stop_ids_of = generation.stop_ids_of = lambda *_: tuple(range(0, 2006, 10))
            importlib.import_module(f"qalign.{kind.command}").main(words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        passed = time.monotonic() - began
        if passed > (TIMEOUT if kill_after is None else kill_after):
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    said = log.read_text(encoding="utf-8", errors="replace")
    log.unlink()
    return Outcome(os.waitstatus_to_exitcode(ended[1]), said, time.monotonic() - began)


class Lab:
    """A folder with a tiny model, and for each stage a run that nothing happened to."""

    def __init__(self, folder: Path):
        self.folder = folder
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        self.base = tiny_model(folder / "model")
        self.wholes: dict[str, RunFolder] = {}
        self.seconds: dict[str, float] = {}

    def recipe(self, stage: str, name: str, **keys) -> tuple[str, RunFolder]:
        """(a recipe of a stage with an output of its own, that run)."""
        kind = KINDS[stage]
        folder, section = self.folder / f"{name}_{stage}", kind.section
        if section in STAGES:
            path = Path(recipe_of(folder, self.base, section, **(KEYS | kind.keys | keys)))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            recipe = {"model": {"base": self.base, "compute_dtype": "float32"}, "output": str(folder)}
            (path := folder / f"{section}.yaml").write_text(yaml.safe_dump(recipe | {section: kind.keys | keys}))
        return (path := str(path.rename(path.with_stem(stage)))), self.run(path)

    def run(self, path: str) -> RunFolder:
        from qalign.config.load import load

        kind = KINDS[Path(path).stem]
        return RunFolder(load(path, stage=kind.section), kind.section, path, kind.command)

    def whole(self, stage: str) -> RunFolder:
        """The run of a stage that nothing happened to; made once."""
        if stage not in self.wholes:
            path, run = self.recipe(stage, "whole")
            outcome = start(stage, [path])
            if outcome.code:
                raise RuntimeError(f"{stage} doesn't run at all:\n{outcome.said}")
            self.wholes[stage], self.seconds[stage] = run, outcome.seconds
        return self.wholes[stage]

    def differences(self, stage: str, run: RunFolder, adapters: Sequence[str] | None = None) -> list[str]:
        """How a finished run differs from the one that nothing happened to, the clock apart, and what it left lying.
        Of its adapters, these are compared."""
        whole, found = self.whole(stage), []
        if not run.complete:
            return ["it is not complete"]
        one, other = (_timeless(each.metrics) for each in (run, whole))
        if [line["step"] for line in one] != [line["step"] for line in other]:
            found.append(f"steps {[line['step'] for line in one]}, not {[line['step'] for line in other]}")
        elif one != other:
            wrong = next((a, b) for a, b in zip(one, other, strict=True) if a != b)
            names = [name for name in {**wrong[0], **wrong[1]} if wrong[0].get(name) != wrong[1].get(name)]
            found.append(f"step {wrong[0]['step']}: {', '.join(names)}")
        for name in KINDS[stage].adapters if adapters is None else adapters:
            folders = run.path / name, whole.path / name
            if folders[0].is_dir() != folders[1].is_dir() or _files(folders[0]) != _files(folders[1]):
                found.append(f"the files of {name}: {_files(folders[0])}")
            elif folders[0].is_dir():
                weights = [load_file(folder / WEIGHTS) for folder in folders]
                if any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[1]):
                    found.append(f"the weights of {name}")
        facts = [json.loads(each.summary.read_text()) for each in (run, whole)]
        for name in MADE:
            found += [name] * (_lines(run.path / name) != _lines(whole.path / name))
        found += [f"{k} of the summary" for k in ("steps", "tokens", "rows", "trust", "held_out", "alarm_steps")
                  if facts[0].get(k) != facts[1].get(k)]  # fmt: skip
        samples = run.path / "samples", whole.path / "samples"
        if _contents(samples[0]) != _contents(samples[1]):
            found.append(f"the samples: {_files(samples[0])}")
        left = [*run.path.rglob(".*[!k]"), *run.path.parent.glob(f".{run.name}.replaced")]
        if left or len(list(run.checkpoints.iterdir())) > 3:  # the third one waits for the next to be written
            found.append(f"left lying: {[path.name for path in left]}, {_files(run.checkpoints)}")
        return found


def _timeless(metrics: Path) -> list[dict]:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(OWN)} for line in lines]


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []


def _contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in _files(folder)]


def _files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []


@dataclass
class Table:
    """The results of a campaign: for each stage and kind, how many were right, and what was wrong with the others."""

    counts: Counter
    faults: list[str]

    def add(self, stage: str, kind: str, faults: list[str], what: str = "") -> None:
        self.counts[stage, kind, not faults] += 1
        if faults:
            self.faults.append(f"{stage}, {kind} {what}: {'; '.join(faults)}")
            print(self.faults[-1], flush=True)

    def print(self) -> None:
        kinds = sorted({kind for _, kind, _ in self.counts})
        stages = sorted({stage for stage, _, _ in self.counts}, key=[*KINDS].index)
        print(f"\n{'':<28}" + "".join(f"{stage:>12}" for stage in stages))
        for kind in kinds:
            right = {stage: self.counts[stage, kind, True] for stage in stages}
            cells = (f"{right[s]} of {right[s] + self.counts[s, kind, False]}" for s in stages)
            print(f"{kind:<28}" + "".join(f"{cell:>12}" for cell in cells))
        right = sum(count for (_, _, good), count in self.counts.items() if good)
        print(f"\n{right} of {sum(self.counts.values())} right, {len(self.faults)} wrong", flush=True)


Work = Callable[[Lab, argparse.Namespace, Table], None]


def campaign(doc: str, work: Work, words: Sequence[str] | None = None, stages: tuple[str, ...] = STAGES) -> int:
    """Parses the command line of a campaign, runs it in a temporary folder, prints its table; 1 if it found a fault."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="a few cases of each kind, as CI runs it")
    parser.add_argument("--stages", nargs="+", default=list(stages), choices=stages)
    parser.add_argument("--seed", type=int, default=0)
    args, table = parser.parse_args(words), Table(Counter(), [])
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    torch.set_num_threads(1)
    try:
        work(Lab(folder), args, table)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        table.print()  # after Ctrl-C too
    return 1 if table.faults else 0


def plain(name: str) -> str:
    """The name of a file without what differs from run to run, such as `.metrics.qalign-123.jsonl`."""
    return re.sub(r"\d+", "#", re.sub(r"(-|^tmp)[a-z0-9_]{8}$", r"\1*", name))
