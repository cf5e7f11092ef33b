"""Commands of qalign in forked children of one server, which has imported everything: a start takes no seconds."""

import atexit
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

import numpy

from qalign.data import tokenize
from qalign.model import generation
from qalign.model.adapters import generation_config
from tests.conftest import ROOT

# What libraries read as they are imported.
SERVER = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


class Command:
    """A command in a process of its own, with the methods of `subprocess.Popen` that tests use.

    Args:
        name, words: of the command, such as `dpo`, and what stands behind it.
        environment: all variables.
        ending: whether a tenth of all tokens ends an answer, for a tiny model that would not end any.
    """

    def __init__(self, name: str, words: Sequence[str], environment: dict[str, str], *, ending: bool = False):
        self._files = [Path(_empty_file()) for _ in ("standard output", "standard error")]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.everything", __name__])
        with patch.dict(os.environ, SERVER):
            forkserver.ensure_running()
        of_command = (name, [*words], {**environment}, os.getcwd(), [*map(str, self._files)], ending)
        self._process = context.Process(target=_run, args=of_command)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """(Standard output, standard error) once the process has ended."""
        self._process.join(timeout)
        if self.poll() is None:
            self.kill()
            raise TimeoutError(f"still running after {timeout:.0f} s: {self._said()}")
        return self._said()

    def _said(self) -> tuple[str, str]:
        out, error = (file.read_text() for file in self._files)
        return out, error


def _empty_file() -> str:
    number, path = tempfile.mkstemp()
    os.close(number)
    atexit.register(os.unlink, path)
    return path


def _run(name: str, words: list[str], environment: dict[str, str], folder: str, files: list[str], ending: bool) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    numpy.random.seed()  # as in a new process
    for stream, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY), stream)
    if ending:
        own = tokenize.end_of_turn_ids
        for module in (tokenize, generation, generation_config):
            module.end_of_turn_ids = lambda template: tuple(dict.fromkeys([*own(template), *range(0, 2006, 10)]))
    sys.argv = [f"{ROOT}/qalign/{name}.py", *words]
    importlib.import_module(f"qalign.{name}").main()
