"""Commands that are started as a launcher starts them: several processes that find each other, and train what one
does."""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import ANY

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from qalign.config.load import load
from qalign.train.processes.launch import Launch
from qalign.train.processes.world import Processes
from qalign.train.run_folder import RunFolder
from tests.helpers import metrics
from tests.train.preloaded import Command
from tests.train.runs import CLOCK

SCALE = 1024.0


def launch(
    stage: str, recipes: list[str], *words: str, ending: bool = False, own: Sequence[dict[str, str]] = ()
) -> list[Command]:
    """Starts a process of a stage for each recipe, in which a tenth of all tokens ends an answer if `ending`; `own` are
    further variables in the environment of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": len(recipes), "LOCAL_WORLD_SIZE": len(recipes), "MASTER_ADDR": "localhost"}
    place |= {"MASTER_PORT": port, "OMP_NUM_THREADS": 1, "TQDM_DISABLE": 1}
    found = []
    for n, recipe in enumerate(recipes):
        mine = {name: str(value) for name, value in (place | {"RANK": n, "LOCAL_RANK": n}).items()}
        found.append(Command(stage, [recipe, *words], os.environ | mine | dict(*own[n : n + 1]), ending=ending))
    return found


def ended(processes: list[Command]) -> tuple[list[int], list[str], list[str]]:
    """(exit codes, standard outputs, standard errors) of all processes."""
    said = [process.communicate(timeout=300) for process in processes]
    return [process.returncode for process in processes], [out for out, _ in said], [err for _, err in said]


def run_together(stage: str, recipe: str | Path, count: int, *words: str, ending: bool = False) -> str:
    """Runs a stage in so many processes to its end; returns what they print."""
    codes, outs, errors = ended(launch(stage, [str(recipe)] * count, *words, ending=ending))
    assert codes == [0] * count, errors
    assert outs[1:] == [""] * (count - 1), "the first process prints for all"
    return outs[0]


def opened(path: str) -> RunFolder:
    return RunFolder(load(path, stage=Path(path).stem), Path(path).stem)


def assert_same_curve(path: str, expected: RunFolder) -> None:
    """Losses and weights to 1e-6. Rewards and log-probs are sums over tokens."""
    run = opened(path)
    for line, wanted in zip(metrics(run), metrics(expected), strict=True):
        assert line.keys() == wanted.keys()
        for name in (name for name in line if not name.startswith(CLOCK)):
            near = wanted[name]
            if isinstance(near, float):
                near = pytest.approx(near, rel=1e-6, abs=1e-6 if "loss" in name else 1e-5)
            assert line[name] == near, (line["step"], name)
    for weights in expected.path.glob("adapter*/**/adapter_model.safetensors"):
        mine = load_file(run.path / weights.relative_to(expected.path))
        torch.testing.assert_close(mine, load_file(weights), rtol=0, atol=1e-6)


def lines_of(file: Path) -> list[str]:
    """The lines of a file, none if it isn't there yet."""
    return file.read_text().splitlines() if file.is_file() else []


def wait_until(is_there: Callable[[], bool], processes: list[Command]) -> None:
    """Waits until something has come to pass while the processes run."""
    until = time.monotonic() + 240
    while not is_there():
        assert time.monotonic() < until
        assert all(process.poll() is None for process in processes), ended(processes)
        time.sleep(0.05)


def assert_killed(processes: list[Command], *killed: int) -> None:
    """Kills processes: the others end within 30 s with one line that names one of them."""
    for number in killed:
        processes[number].kill()
    began = time.monotonic()
    codes, _, errors = ended(processes)
    assert time.monotonic() - began < 30
    expected = [-signal.SIGKILL if number in killed else 2 for number in range(len(processes))]
    assert codes == expected, errors
    said = "".join(errors).strip()
    named = "|".join(rf"process {number} \(host \S+, pid {processes[number].pid}\)" for number in killed)
    assert re.fullmatch(rf"({named}) ended .*--resume", said), errors


def assert_stopped(processes: list[Command], number: signal.Signals) -> str:
    """Sends a signal to the second process: all stop, and say so once. Returns what the first one printed."""
    processes[1].send_signal(number)
    codes, outs, errors = ended(processes)
    assert codes == [128 + number] * len(processes), errors
    assert sum(f"stopped by {number.name}" in said for said in errors) == 1, errors
    return outs[0]


def rounded(values: object) -> object:
    """Nested values for a comparison: numbers to 1e-6, and any number of seconds."""
    if isinstance(values, dict):
        return {key: ANY if "seconds" in key else rounded(value) for key, value in values.items()}
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return pytest.approx(values, rel=1e-6, abs=1e-6) if isinstance(values, float) else values


def assert_same_files(folder: Path, expected: Path, *names: str) -> None:
    """JSON and JSON lines by their names in both folders, numbers to 1e-6."""
    for name in names:
        mine, wanted = ((place / name).read_text() for place in (folder, expected))
        split = str.splitlines if name.endswith(".jsonl") else lambda text: [text]
        assert [*map(json.loads, split(mine))] == rounded([*map(json.loads, split(wanted))]), name


class Idle(Processes):
    """The second of two processes, for which a step of one micro-batch leaves nothing; the first one has a gradient for
    every weight."""

    def __init__(self):
        super().__init__(Launch(1, 2, 1, 2, "localhost", 1, False, "0"))

    def gathered(self, value):
        return [[True] * len(value), value] if isinstance(value, list) else [value, value]


def scale_losses(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, gradient: float) -> None:
    """Makes it scale losses, as on a GPU in float16; every sum of gradients is as if the first process had this one."""
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=SCALE)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.add_(gradient))
