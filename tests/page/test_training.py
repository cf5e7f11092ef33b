"""What the tab Train does, without a browser: the commands, one run at a time, uploads."""

import base64
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from qalign.errors import UserError
from qalign.page.training import process
from qalign.page.training.commands import Job, executed, recipes, stages_of, typed
from qalign.page.training.process import Training, log_file, printed, tail
from qalign.page.training.uploads import MAX_BYTES, PART, Uploads
from qalign.train.lock import locked
from tests.conftest import ROOT

RECIPE = "recipes/smollm2_demo.yaml"
WAITS = (
    "import signal, sys, time\nprint('begun', flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: sys.exit(130)"
)


@pytest.fixture
def job(recipe_file, tmp_path, monkeypatch) -> Job:
    monkeypatch.chdir(tmp_path)
    return Job(recipe_file(output=str(tmp_path / "runs" / "a")), "dpo")


def test_each_line_is_one_word_of_the_command_and_none_goes_through_a_shell():
    job = Job(RECIPE, "dpo", "up loads/x.jsonl", "dpo.max_steps=3\n\n output=$(touch x); \n", "12GB", overwrite=True)
    words = [RECIPE, "dpo.data=up loads/x.jsonl", "dpo.max_steps=3", "output=$(touch x);"]
    assert job.check() == ["dpo", *words, "--check"]
    assert job.fit() == ["fit", *words, "--memory", "12GB"]
    assert job.train() == ["dpo", *words, "--overwrite"]
    assert job.resume() == ["dpo", *words, "--resume"]
    assert executed(job.train()) == [sys.executable, "-m", "qalign.dpo", *words, "--overwrite"]
    assert typed(job.resume()) == (
        f"python -m qalign.dpo {RECIPE} 'dpo.data=up loads/x.jsonl' dpo.max_steps=3 'output=$(touch x);' --resume"
    )


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (Job(RECIPE, "dpo", settings="--overwrite"), "is not KEY=VALUE"),
        (Job(RECIPE, "dpo", settings="--output=x"), "is not KEY=VALUE"),
        (Job("--help", "dpo"), "choose a recipe"),
        (Job(RECIPE, "page"), "choose a recipe"),
        (Job("nowhere.yaml", "dpo"), "there is no such recipe"),
        (Job(RECIPE, "dpo", "nowhere.jsonl"), "nowhere.jsonl"),
        (Job(RECIPE, "dpo", settings="dpo.max_stepz=3"), "unknown key 'max_stepz'"),
    ],
)
def test_what_is_no_job_starts_nothing(job, words, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with patch.object(process.subprocess, "Popen") as started, pytest.raises(UserError) as refused:
        Training(tmp_path).start(job)
    assert words in str(refused.value)
    assert not started.called


def test_the_card_s_memory_is_a_size():
    with pytest.raises(UserError, match="is not a size"):
        Job(RECIPE, "dpo", card="--help").fit()


def test_recipes_of_this_folder_and_their_stages(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert RECIPE in recipes(Path())
    assert stages_of(RECIPE) == ["sft", "reward", "dpo", "ppo"]
    assert stages_of("pyproject.toml") == stages_of("/proc/self/mem") == stages_of("x\0") == []


def wait_for(true, seconds=20):
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_one_run_at_a_time_is_started_watched_and_stopped_once(job, tmp_path):
    training, run = Training(tmp_path / "runs"), tmp_path / "runs" / "a" / "dpo"
    with patch.object(process, "executed", lambda words: [sys.executable, "-c", WAITS]):
        assert training.start(job) == run
        wait_for(lambda: "begun" in tail(log_file(run)))
        assert tail(log_file(run)).startswith(f"$ python -m qalign.dpo {job.recipe}\n")
        assert training.at_work() == run
        child = training._process
        assert os.getsid(child.pid) == child.pid  # it outlives the page and its terminal
        with pytest.raises(UserError, match="one run at a time"):
            training.start(job)
        with patch.object(process.os, "kill", wraps=os.kill) as kill:
            training.stop(run)
            training.stop(run)
        kill.assert_called_once_with(child.pid, signal.SIGINT)
        wait_for(lambda: training.at_work() is None)
        assert training.problem(run) == ""  # 130: stopped as it was asked to


def test_a_run_that_somebody_else_started_counts_and_can_be_stopped(job, tmp_path):
    run = tmp_path / "runs" / "a" / "dpo"
    with locked(run), patch.object(process.os, "kill") as kill:
        assert Training(tmp_path / "runs").at_work() == run  # its recipe isn't written yet
        with pytest.raises(UserError, match="one run at a time"):
            Training(tmp_path / "elsewhere").start(job)
        Training(tmp_path / "runs").stop(run)
        kill.assert_called_once_with(os.getpid(), signal.SIGINT)
    elsewhere = patch.object(process, "at_work", return_value=SimpleNamespace(host="other", pid=1))
    with elsewhere, pytest.raises(UserError, match="stop it there"):
        Training(tmp_path / "runs").stop(run)


def test_a_run_that_is_there_is_replaced_only_if_that_is_asked_for(job, tmp_path):
    run = tmp_path / "runs" / "a" / "dpo"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("{}")
    with pytest.raises(UserError, match="--resume continues it"):
        Training(tmp_path / "runs").start(job)
    with patch.object(process, "executed", lambda words: [sys.executable, "-c", "raise SystemExit(2)"]):
        training = Training(tmp_path / "runs")
        training.start(Job(job.recipe, "dpo", overwrite=True))
        wait_for(lambda: training.at_work() is None)
        assert "exit code 2" in training.problem(run)


def test_a_progress_bar_is_shown_as_it_is_last(tmp_path):
    (tmp_path / "x.log").write_bytes(b"one\n 1%\r 50%\r100%\r\ntwo\n")
    assert tail(tmp_path / "x.log") == "one\n100%\ntwo"
    assert tail(tmp_path / "none.log") == ""


def test_the_check_of_the_rows_names_each_refused_one(job, write_jsonl):
    rows = write_jsonl("mine.jsonl", [*({"prompt": f"{n}?", "chosen": "a", "rejected": "b"} for n in range(30)), "{"])
    said = printed(Job(job.recipe, "dpo", rows, "dpo.limit=null").check())
    assert said.startswith("$ python -m qalign.dpo ")
    assert "30 rows are used, 1 refused" in said
    assert "mine.jsonl:31: " in said
    assert "columns read: prompt, chosen, rejected" in said
    assert not (Path("runs") / "a").exists()


def piece(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_a_file_comes_in_pieces_and_replaces_no_other(tmp_path):
    uploads = Uploads(tmp_path / "uploads")
    assert uploads.add("../../my rows.jsonl", 6, 0, piece(b"abcd")) is None
    assert [file.name for file in uploads.folder.iterdir()] == [f"my_rows.jsonl{PART}"]
    file = uploads.add("../../my rows.jsonl", 6, 4, piece(b"ef"))
    assert (file, file.read_bytes()) == (tmp_path / "uploads" / "my_rows.jsonl", b"abcdef")
    assert uploads.add("my rows.jsonl", 6, 0, piece(b"abcdef")) == file  # the same once more
    other = uploads.add("my rows.jsonl", 2, 0, piece(b"xy"))
    assert (other.name, other.read_bytes(), file.read_bytes()) == ("my_rows-2.jsonl", b"xy", b"abcdef")
    assert {*uploads.names()} == {str(file), str(other)}


@pytest.mark.parametrize(
    ("name", "size", "start", "content", "words"),
    [
        ("evil.py", 2, 0, piece(b"xy"), "expected a file of rows"),
        (".jsonl", 2, 0, piece(b"xy"), "expected a file of rows"),
        ("a.jsonl", 0, 0, "", "is empty"),
        ("a.jsonl", MAX_BYTES + 1, 0, piece(b"xy"), "give its path instead"),
        ("a.jsonl", 2, 1, piece(b"y"), "another order"),
        ("a.jsonl", 2, 0, piece(b"xyz"), "another order"),
        ("a.jsonl", 2, 0, "?", "is damaged"),
    ],
)
def test_what_is_no_file_of_rows_is_not_kept(tmp_path, name, size, start, content, words):
    with pytest.raises(UserError, match=words):
        Uploads(tmp_path / "uploads").add(name, size, start, content)
    assert not [*tmp_path.glob("uploads/*")]
