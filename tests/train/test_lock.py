"""One process at a time in a run folder."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import qalign.dpo
from qalign.errors import UserError
from qalign.train import lock
from qalign.train.lock import locked
from tests.helpers import leaving
from tests.train.runs import recipe_of

HOLDS = (
    "import sys, time; from pathlib import Path; from qalign.train.lock import locked\n"
    "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path/dpo`."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path / "dpo")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_process_says_who_holds_the_folder_and_takes_over_once_that_one_was_killed(holder, tmp_path, capsys):
    folder = tmp_path / "dpo"
    who = f"process {holder.pid} on {socket.gethostname()} (since 20"
    with pytest.raises(UserError) as raised, locked(folder):
        pytest.fail("two hold it")
    (line,) = raised.value.lines
    assert line.startswith(f"{folder}: {who}")
    assert line.endswith("choose another `output`")

    holder.kill()
    holder.wait()
    with locked(folder):
        said = capsys.readouterr().out
        assert said.startswith(f"{folder}: {who}")
        assert "taken over" in said
    with locked(folder):
        assert not capsys.readouterr().out, "whoever ended as planned isn't named"


def test_a_lock_from_before_a_restart_or_of_another_host_is_taken_over(tmp_path, capsys):
    (tmp_path / ".dpo.lock").write_bytes(b'\0{"pid": 1, "host": "laptop", "since": "2020-02-02 02:02:02"}')
    with locked(tmp_path / "dpo"):
        assert "process 1 on laptop (since 2020-02-02 02:02:02) ended without" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"\0", b"junk", b"\0[]", b"\0{}", b"\xff" * 3000, b'\0{"pid": "x"}'])
def test_a_lock_file_that_cannot_be_read_is_no_obstacle(tmp_path, content, capsys):
    (tmp_path / ".dpo.lock").write_bytes(content)
    with (
        locked(tmp_path / "dpo"),
        pytest.raises(UserError, match=f"process {os.getpid()} on "),
        locked(tmp_path / "dpo"),
    ):
        pytest.fail("two hold it")
    assert not capsys.readouterr().out


def test_a_network_share_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(self):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.FileLock, "acquire", refuse)
    with locked(tmp_path / "dpo"):
        assert "can't be locked here" in capsys.readouterr().out


def test_the_lock_of_one_stage_is_not_another_s(holder, tmp_path):
    with locked(tmp_path / "sft"):
        assert sorted(path.name for path in Path(tmp_path).iterdir()) == [".dpo.lock", ".sft.lock"]


@pytest.mark.parametrize("flag", [[], ["--resume"], ["--overwrite"]])
def test_a_stage_does_not_touch_a_run_that_another_process_is_training(flag, tmp_path, tiny_folder, capsys):
    path = recipe_of(tmp_path, tiny_folder, "dpo")
    (tmp_path / "dpo").mkdir()
    (tmp_path / "dpo" / "recipe.yaml").write_text("theirs")
    with locked(tmp_path / "dpo"):
        assert leaving(qalign.dpo.main, path, *flag) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/dpo: process {os.getpid()} on " in line
    assert (tmp_path / "dpo" / "recipe.yaml").read_text() == "theirs"
