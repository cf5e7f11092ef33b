"""The processor time of a command, which other work on the machine changes little."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(words: Iterable[object], threads: int = 1) -> tuple[float, str]:
    """(Processor seconds, what it printed) of `python -m WORDS`. If it fails, so does the benchmark, and shows that."""
    command = [sys.executable, "-m", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)  # of this child alone, as others may run at the same time
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        said = output.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{said}")
    return used.ru_utime + used.ru_stime, said
