"""A run that was stopped, killed or damaged goes on to the same numbers, in every stage."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest

from qalign.config.load import load as load_recipe
from qalign.errors import Stopped, UserError
from qalign.train.run_folder import RunFolder
from tests.conftest import ROOT
from tests.helpers import leaving, metrics, restored_signals, slow, stopping_after, summary
from tests.reward_runs import run_stage
from tests.train.runs import HELD_OUT, STAGES, assert_same_run, recipe_of

QUICK = ("sft", "dpo")
OTHERS = [stage for stage in STAGES if stage not in QUICK]
STOPPED_STAGES = [*QUICK, *map(slow, OTHERS)]


@pytest.mark.parametrize("stage", STOPPED_STAGES)
def test_a_stopped_run_resumes_to_the_same_numbers(stage, tiny_folder, tmp_path, capsys):
    """With dropout, so that the state of the random generators counts as well."""
    keys = {"limit": 20, "save_every": 10, "lora": {"dropout": 0.1}, "eval_data": HELD_OUT, "eval_every": 2}
    keys |= {"max_steps": 5} if stage in ("kto", "ppo") else {}
    whole = run_stage(recipe_of(tmp_path / "whole", tiny_folder, stage, **keys))
    path = recipe_of(tmp_path / "stopped", tiny_folder, stage, **keys)
    with stopping_after(2), pytest.raises(Stopped):
        run_stage(path)
    stopped = RunFolder(load_recipe(path), stage)
    assert not stopped.complete
    checkpoint = stopped.last_checkpoint()
    assert checkpoint.name in ("checkpoint-2", "checkpoint-3")
    said = capsys.readouterr().out
    assert str(checkpoint) in said
    assert f"python -m qalign.{stage} {path} --resume" in said
    with pytest.raises(UserError, match="holds a stopped run"):
        run_stage(path)
    resumed = run_stage(path, resume=True)
    assert f"resuming       {checkpoint}" in capsys.readouterr().out
    assert summary(resumed)["resumed_from"] == str(checkpoint)
    assert_same_run(resumed, whole)


def started(path: str) -> subprocess.Popen:
    command = [sys.executable, "-m", f"qalign.{Path(path).stem}", path]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        log = folder / "metrics.jsonl"
        if log.exists() and len(log.read_text().splitlines()) >= step:
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    pytest.fail(f"no step {step} within two minutes")


KILLED = {"limit": None, "max_steps": 40, "save_every": 5}


@pytest.fixture(scope="module")
def never_stopped(tiny_folder, tmp_path_factory):
    """The whole run of a stage, trained once."""
    return cache(lambda stage: run_stage(recipe_of(tmp_path_factory.mktemp(stage), tiny_folder, stage, **KILLED)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "number", "code"),
    [
        ("sft", signal.SIGINT, 130),
        ("reward", signal.SIGTERM, 143),
        ("dpo", signal.SIGINT, 130),
        ("dpo", signal.SIGKILL, -signal.SIGKILL),
        ("ppo", signal.SIGTERM, 143),
    ],
)
def test_a_process_that_was_stopped_or_killed_resumes_to_the_same_numbers(
    stage, number, code, never_stopped, tiny_folder, tmp_path, capsys
):
    path, folder = recipe_of(tmp_path / "cut", tiny_folder, stage, **KILLED), tmp_path / "cut" / stage
    process = started(path)
    wait_for_step(folder, 8, process)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == code, said
    reached = len((folder / "metrics.jsonl").read_text().splitlines())
    assert 8 <= reached < 40, "the run was not stopped midway"
    assert not (folder / "summary.json").exists()
    if number != signal.SIGKILL:
        assert f"checkpoint-{reached}" in said, "it was saved where it stopped"
        assert "--resume" in said
        assert "Traceback" not in said
    assert_same_run(run_stage(path, resume=True), never_stopped(stage))

    capsys.readouterr()
    with restored_signals():
        assert leaving(importlib.import_module(f"qalign.{stage}").main, path, "--resume") == 0
    assert "this run is complete" in capsys.readouterr().out


@pytest.fixture(params=STOPPED_STAGES)
def complete(request, tiny_folder, tmp_path):
    """A run with a checkpoint at each step, to be damaged, with its recipe and a copy: (path, run, copy)."""
    path = recipe_of(tmp_path / "cut", tiny_folder, request.param, save_every=1)
    run = run_stage(path)
    whole = RunFolder(load_recipe(path, [f"output={tmp_path / 'whole'}"]), request.param)
    shutil.copytree(run.path, whole.path)
    run.summary.unlink()
    return path, run, whole


def test_a_checkpoint_cut_short_is_not_resumed_from(complete):
    path, run, whole = complete
    shutil.rmtree(run.adapter)
    newest = run.checkpoints / "checkpoint-3"
    (newest / "manifest.json").unlink()
    for file in newest.glob("*.pt"):
        file.write_bytes(b"half")
    again = run_stage(path, resume=True)
    assert summary(again)["resumed_from"].endswith("checkpoint-2")
    assert_same_run(again, whole)


LAST = {  # three steps of 12 rows, and none of them is the end of an epoch
    "max_steps": {"limit": 20, "max_steps": 3},
    "epochs": {"limit": 20, "epochs": 0.6},
}


AFTER_THE_LAST = [("sft", "epochs"), *((stage, "max_steps") for stage in QUICK)]
AFTER_THE_LAST += [slow(stage, "max_steps") for stage in OTHERS]


@pytest.mark.parametrize(("stage", "length"), AFTER_THE_LAST)
def test_what_was_killed_after_the_last_step_resumes_without_another(stage, length, tiny_folder, tmp_path, monkeypatch):
    """The checkpoint of the last step is there, and no summary."""
    keys = {**LAST[length], "eval_data": HELD_OUT, "lora": {"dropout": 0.1}}
    whole = run_stage(recipe_of(tmp_path / "whole", tiny_folder, stage, **keys))
    path = recipe_of(tmp_path / "cut", tiny_folder, stage, **keys)

    def die(*args, **facts):
        raise KeyboardInterrupt

    for resume in (False, True):  # killed there twice
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "finish", die)
            with pytest.raises(KeyboardInterrupt):
                run_stage(path, resume=resume)
    resumed = run_stage(path, resume=True)
    assert summary(resumed)["steps"] == summary(whole)["steps"] == 3
    assert summary(resumed)["resumed_from"].endswith("checkpoint-3")
    for name in ("rows", "tokens", "trust", "held_out"):
        assert summary(resumed).get(name) == summary(whole).get(name)
    assert_same_run(resumed, whole)


@pytest.mark.parametrize("step", [2, 3])
def test_the_best_checkpoint_is_the_one_that_is_kept_after_a_resume_too(step, tiny_folder, tmp_path, monkeypatch):
    """With steps this large the first one is the best. Its checkpoint goes on being kept, and is verified."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    keys = {"eval_data": HELD_OUT, "eval_every": 1, "save_every": 1, "learning_rate": 0.2}
    keys["trainer"] = {**best, "eval_on_start": True}
    whole = run_stage(recipe_of(tmp_path / "whole", tiny_folder, "dpo", **keys))
    losses = {line["step"]: line["eval_loss"] for line in metrics(whole) if line["step"] and "eval_loss" in line}
    assert min(losses, key=losses.get) == 1, losses
    path = recipe_of(tmp_path / "cut", tiny_folder, "dpo", **keys)
    mark = RunFolder.mark_whole

    def mark_and_die(self, number, *args, **named):
        mark(self, number, *args, **named)
        if number == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "mark_whole", mark_and_die)
        with pytest.raises(KeyboardInterrupt):
            run_stage(path)
    resumed = run_stage(path, resume=True)
    assert_same_run(resumed, whole)

    resumed.summary.unlink()
    weights = resumed.checkpoints / "checkpoint-1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"checkpoint-1: the best checkpoint can't be used: adapter_model\.safetensors"):
        run_stage(path, resume=True)


def test_a_damaged_checkpoint_is_not_resumed_from(complete, capsys):
    path, run, whole = complete
    state = next((run.checkpoints / "checkpoint-3").glob("*.pt"))
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    capsys.readouterr()
    again = run_stage(path, resume=True)
    words = f"checkpoint-3: can't be used: {state.name} was changed; going back to checkpoint-2"
    assert words in capsys.readouterr().out
    assert summary(again)["resumed_from"].endswith("checkpoint-2")
    assert_same_run(again, whole)
