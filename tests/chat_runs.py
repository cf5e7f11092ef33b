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
import yaml

from qalign.config.load import dump
from qalign.config.load import load as load_recipe
from qalign.config.recipe import Lora
from qalign.model.base import Base, Role, load
from qalign.model.lineage import write
from tests.conftest import ROOT
from tests.helpers import TEST, scramble

DATA = str(ROOT / "recipes" / "data" / "house_style_train.jsonl")


def finished_run(output: Path, tiny: str, stage: str = "dpo", scale: float = 0.2) -> Path:
    """A run folder as its stage leaves it, with random adapter weights instead of trained ones."""
    output.mkdir(parents=True, exist_ok=True)
    recipe = {
        "model": {"base": tiny, "compute_dtype": "float32", "max_length": 256},
        "output": str(output),
        stage: {"data": DATA, "eval_data": TEST},
    }
    file = output / "given.yaml"
    file.write_text(yaml.safe_dump(recipe))
    read = load_recipe(str(file), stage=stage)
    base: Base = load(read.model)
    base.add_adapter(Role.POLICY, Lora(r=4, alpha=8))
    scramble(base, scale=scale)
    folder = output / stage
    base.save_adapter(Role.POLICY, folder / "adapter")
    write(folder / "adapter", base.lineage(stage))
    (folder / "recipe.yaml").write_text(dump(read))
    (folder / "summary.json").write_text(json.dumps({"steps": 1}))
    return folder


@contextmanager
def serving(*options: str, before: str = "") -> Iterator[str]:
    """The address of `python app.py` in its own process, which runs the Python in `before` first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 180
    words = [sys.executable, "-c", f"{before}\nimport app\napp.main()", *options, "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log)
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
