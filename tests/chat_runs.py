"""What the tests of the page share: finished runs of the tiny model, made once, with adapters that do something."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from qalign.config.load import dump
from qalign.config.load import load as load_recipe
from qalign.config.recipe import Lora
from qalign.model.base import Role, load
from qalign.model.lineage import write
from tests.conftest import ROOT
from tests.helpers import TEST, scramble
from tests.reward_runs import write_recipe


def finished_run(output: Path, tiny: str, scale: float = 0.2) -> Path:
    """A DPO run's folder as the stage leaves it, with random adapter weights instead of trained ones."""
    recipe = load_recipe(write_recipe(output, tiny, "dpo", model={"max_length": 256}, eval_data=TEST), stage="dpo")
    base, folder = load(recipe.model), output / "dpo"
    base.add_adapter(Role.POLICY, Lora(r=4, alpha=8))
    scramble(base, scale=scale)
    base.save_adapter(Role.POLICY, folder / "adapter")
    write(folder / "adapter", base.lineage("dpo"))
    (folder / "recipe.yaml").write_text(dump(recipe))
    (folder / "summary.json").write_text(json.dumps({"steps": 1}))
    return folder


@contextmanager
def serving(*options: str, before: str = "", host: str = "127.0.0.1", folder: Path = ROOT) -> Iterator[str]:
    """The address of `python app.py` in its own process and this folder. It runs the Python in `before` first."""
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    address, deadline = f"http://{host}:{port}", time.monotonic() + 180
    words = [sys.executable, "-c", f"{before}\nimport app\napp.main()", *options, "--host", host, "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            while True:
                with suppress(httpx.TransportError):
                    httpx.get(address, timeout=5)
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise AssertionError(log.read().decode())
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            process.wait(30)
