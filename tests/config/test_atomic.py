"""Folders that appear whole or not at all."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qalign.config.atomic import clear_leftovers, new_folder, replacing, replacing_folder


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o027, 0o750)])
def test_the_files_of_a_new_folder_have_the_users_permissions(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "model") as aside:
            (aside / "config.json").write_text("{}")
            save_file({"a": torch.zeros(1)}, aside / "model.safetensors")  # safetensors makes it its owner's alone
            assert not (tmp_path / "model").exists()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == mode
    for name in ("config.json", "model.safetensors"):
        assert stat.S_IMODE((tmp_path / "model" / name).stat().st_mode) == mode & 0o666
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_new_folder_that_fails_leaves_nothing(tmp_path):
    def fail():
        with new_folder(tmp_path / "model") as aside:
            (aside / "config.json").touch()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert not list(tmp_path.iterdir())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    adapter = tmp_path / "adapter"
    for name in ("first", "second"):
        with replacing_folder(adapter) as aside:
            (aside / name).touch()
            assert "second" not in names(adapter)
    assert names(tmp_path) == ["adapter", "second"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", [1, 2, None])
def test_the_old_folder_stays_if_the_new_one_fails(tmp_path, error, call, monkeypatch):
    """While it is written, or at either of the two renames."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "old").touch()
    rename, calls = Path.rename, []

    def failing(path, target):
        calls.append(path)
        if len(calls) == call:
            raise error
        return rename(path, target)

    def replace():
        with replacing_folder(adapter) as aside:
            (aside / "new").touch()
            if call is None:
                raise error

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(type(error)):
        replace()
    assert names(tmp_path) == ["adapter", "old"]


def test_what_a_kill_left_is_deleted_and_a_folder_without_its_name_gets_it_back(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("kept.json", ".gitignore", ".notes"):
        (run / name).touch()
    before = names(run)
    monkeypatch.setattr(Path, "unlink", lambda *args, **named: pytest.fail("killed: nothing tidies up"))
    monkeypatch.setattr("shutil.rmtree", lambda *args, **named: None)
    real, killed = Path.rename, []

    def once(path, target):
        if killed:
            raise KeyboardInterrupt  # killed between the two renames
        killed.append(path)
        return real(path, target)

    (run / "adapter").mkdir()
    (run / "adapter" / "weights").touch()
    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(KeyboardInterrupt), replacing_folder(run / "adapter") as aside:
        (aside / "weights").touch()
    monkeypatch.undo()
    (run / ".adapter_best.qalign-12345678").mkdir()
    (run / ".report.qalign-123.png").touch()
    (run / "samples").mkdir()
    (run / "samples" / ".parent_hash.qalign-7").touch()
    assert not (run / "adapter").exists()

    clear_leftovers(run)
    assert names(run) == sorted([*before, "adapter", "weights", "samples"])


def test_the_temporary_name_of_a_file_is_one_that_is_cleared(tmp_path):
    for name in ("metrics.jsonl", "parent_hash", "rejected_rows.last_try.jsonl", "report.png"):
        with replacing(tmp_path / name) as aside:
            aside.touch()
            clear_leftovers(tmp_path)
            assert not aside.exists(), name
            aside.touch()
    assert len(names(tmp_path)) == 4
