"""Commands that are started as a launcher starts them: several processes that find each other, and train what one
does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qalign.config.load import load
from qalign.train.run_folder import RunFolder
from tests.conftest import ROOT
from tests.helpers import metrics
from tests.train.runs import CLOCK


def launch(stage: str, recipes: list[str], *words: str) -> list[subprocess.Popen]:
    """Starts a process of a stage for each recipe."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": len(recipes), "LOCAL_WORLD_SIZE": len(recipes), "MASTER_ADDR": "localhost"}
    place |= {"MASTER_PORT": port, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1, "TQDM_DISABLE": 1}
    return [
        subprocess.Popen(
            [sys.executable, "-m", f"qalign.{stage}", recipe, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {name: str(value) for name, value in (place | {"RANK": n, "LOCAL_RANK": n}).items()},
        )
        for n, recipe in enumerate(recipes)
    ]


def ended(processes: list[subprocess.Popen]) -> tuple[list[int], list[str], list[str]]:
    """(exit codes, standard outputs, standard errors) of all processes."""
    said = [process.communicate(timeout=300) for process in processes]
    return [process.returncode for process in processes], [out for out, _ in said], [err for _, err in said]


def run_together(stage: str, recipe: str | Path, count: int, *words: str) -> str:
    """Runs a stage in so many processes to its end; returns what they print."""
    codes, outs, errors = ended(launch(stage, [str(recipe)] * count, *words))
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
