"""Commands that are started as a launcher starts them: several processes that find each other."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


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
