"""The files of ids where processes meet: two that encode the same rows at once, and one that is killed meanwhile."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.data.shapes import assistant

WORK = """
import hashlib, os, sys
from qalign.config.stages import Source
from qalign.data.formats import dialogues
from qalign.data.store import rows, tokens
from qalign.data.tokenize import encode_dialogues
from tests.data.chat_families import FAMILIES
rows.SMALL, tokens.AT_ONCE, os.environ["XDG_CACHE_HOME"] = 0, 16, sys.argv[2]
read, _ = dialogues((Source(path=sys.argv[1]),), "train", None, 0)
print("begins", flush=True)
found, refused = encode_dialogues(FAMILIES["llama3"].prepared(), read, 60)
print("done", type(found).__name__, hashlib.sha256(repr([*found, refused]).encode()).hexdigest(), flush=True)
"""

pytestmark = pytest.mark.slow


def start(path: str, cache, seed: str = "0") -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
    command = [sys.executable, "-c", WORK, path, str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


@pytest.fixture
def path(write_jsonl) -> str:
    turns = [{"role": "user", "content": "Why? " * 9}, assistant("Because.")]
    talk = [{"role": "user", "content": "x" * 400}, assistant("Too long")]
    return str(write_jsonl("rows.jsonl", [{"messages": talk if n % 50 == 7 else turns} for n in range(600)]))


def test_two_processes_at_once_write_one_file(path, tmp_path):
    processes = [start(path, tmp_path / "cache", seed) for seed in "12"]
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len({text.splitlines()[-1] for text in said}) == 1
    assert "done TokenFile" in said[0]
    (folder,) = (tmp_path / "cache" / "qalign" / "tokens").iterdir()
    assert {file.name for file in folder.iterdir()} == {"ids", ".lock"}
    assert sum("from the cache" in text or "waiting for another process" in text for text in said) <= 1


def test_a_killed_process_leaves_nothing_that_counts(path, tmp_path):
    killed = start(path, tmp_path / "cache")
    while not (begun := [*tmp_path.glob("cache/qalign/tokens/*/.ids*/new/tokens.arrow")]) and killed.poll() is None:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert begun, "it was killed while it wrote"
    assert not [*tmp_path.glob("cache/qalign/tokens/*/ids")]
    assert {file.name for file in (tmp_path / "cache" / "qalign").iterdir()} == {"tokens"}, "the rows left no file"

    after = start(path, tmp_path / "cache").communicate(timeout=200)[0]
    alone = start(path, tmp_path / "other").communicate(timeout=200)[0]

    assert after.splitlines()[-1] == alone.splitlines()[-1]
    assert "from the cache" not in after
    (folder,) = (tmp_path / "cache" / "qalign" / "tokens").iterdir()
    assert {file.name for file in folder.iterdir()} == {"ids", ".lock"}
    facts = json.loads((folder / "ids" / "facts.json").read_text())
    assert len(facts["refused"]) == 12
