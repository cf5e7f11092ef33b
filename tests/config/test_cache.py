"""The cache of converted and quantised bases: what is damaged is made again, what can't be written costs only time."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

from qalign.config import cache, manifest
from qalign.config.cache import LOCK, is_whole, keep
from qalign.config.manifest import MANIFEST
from qalign.errors import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache" / "nf4-0123"


def written(aside: Path) -> None:
    (aside / "config.json").write_text("{}")
    (aside / "model.safetensors").write_bytes(bytes(range(256)) * 4)
    (aside / "inner").mkdir()
    (aside / "inner" / "more.txt").write_text("more")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[700] ^= 16
    file.write_bytes(content)


def test_the_tests_and_what_they_start_leave_the_users_cache_alone():
    words = "from qalign.config.cache import cache_folder; print(cache_folder())"
    said = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout
    assert said.strip() == str(cache.cache_folder())
    assert cache.cache_folder().parent.parent == Path(tempfile.gettempdir())


def test_what_is_kept_is_whole_and_nothing_else_is(folder, capsys):
    assert not is_whole(folder)
    assert keep(folder, written)
    assert is_whole(folder)
    assert set(json.loads((folder / MANIFEST).read_text())["files"]) == {
        "config.json",
        "model.safetensors",
        "inner/more.txt",
    }
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: flip(folder / "model.safetensors"), "model.safetensors was changed"),
        (
            lambda folder: os.truncate(folder / "model.safetensors", 100),
            "model.safetensors has 100 bytes instead of 1,024",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json was changed"),
        (lambda folder: (folder / "inner" / "more.txt").unlink(), "inner/more.txt is missing"),
        (lambda folder: (folder / "added.py").write_text("1"), "added.py was added"),
        (lambda folder: (folder / MANIFEST).unlink(), "it has no manifest.json"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), ""),
        (lambda folder: (folder / MANIFEST).write_text('{"config.json": 3}'), ""),
        (lambda folder: (folder / MANIFEST).write_text("{"), ""),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff"), ""),
    ],
)
def test_every_damage_is_said_and_mended(damage, problem, folder, capsys):
    keep(folder, written)
    damage(folder)
    assert not is_whole(folder)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"note: {folder} is damaged ({problem}")
    assert line.endswith("; it is made again")
    assert keep(folder, written)
    assert is_whole(folder)
    assert not (folder / "added.py").exists()


def test_weights_that_are_not_read_are_not_hashed(folder, monkeypatch):
    keep(folder, written)
    hashed = []
    real = manifest.file_hash
    monkeypatch.setattr(manifest, "file_hash", lambda file: hashed.append(file.name) or real(file))
    assert is_whole(folder, weights=False)
    assert sorted(hashed) == ["config.json", "more.txt"]
    flip(folder / "model.safetensors")
    assert is_whole(folder, weights=False)
    os.truncate(folder / "model.safetensors", 1000)
    assert not is_whole(folder, weights=False)


def test_the_hash_is_over_every_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "PIECE", 100)
    content = bytes(range(250))
    (tmp_path / "file").write_bytes(content)
    pieces = b"".join(hashlib.blake2b(content[n : n + 100], digest_size=32).digest() for n in (0, 100, 200))
    assert manifest.file_hash(tmp_path / "file") == hashlib.blake2b(pieces, digest_size=32).hexdigest()
    (tmp_path / "empty").write_bytes(b"")
    assert manifest.file_hash(tmp_path / "empty") == hashlib.blake2b(b"", digest_size=32).hexdigest()


def disk_full(aside: Path) -> None:
    (aside / "part").write_text("part")
    raise OSError(28, "No space left on device")


def test_a_cache_that_cannot_be_written_is_said_and_leaves_nothing(folder, capsys):
    assert not keep(folder, disk_full)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"note: the cache {folder} can't be written (")
    assert "No space left on device" in line
    assert not folder.exists()
    assert [file.name for file in folder.parent.iterdir()] == [LOCK]


@pytest.mark.parametrize("depth", [0, 1])
def test_a_file_in_its_place(depth, folder, capsys):
    place = (folder, folder.parent)[depth]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("mine")
    assert not is_whole(folder)
    assert not keep(folder, written)
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert place.read_text() == "mine"


KILLED = """
import os, signal, sys
from pathlib import Path
from qalign.config.cache import keep
def half(aside):
    (aside / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
keep(Path(sys.argv[1]), half)
"""


def leftovers(folder: Path) -> list[Path]:
    return [left for left in folder.parent.glob(".*") if left.name != LOCK]


def test_what_a_killed_process_left_is_cleared_at_the_next_start(folder):
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", KILLED, str(folder)], timeout=60).returncode == -9
        assert len(leftovers(folder)) == 1
    (folder.parent / ".nf4-0123456789abcdef-x1y2z3w4").mkdir()  # of an earlier version
    assert not is_whole(folder)
    assert leftovers(folder) == []


def test_what_a_living_process_writes_stays(folder, monkeypatch):
    monkeypatch.setattr(cache, "LOCK_WAIT", 0)
    keep(folder, written)
    theirs = folder.parent / ".nf4-4567-abcdefgh"
    theirs.mkdir()
    with FileLock(folder.parent / LOCK):  # as another process holds it while it writes
        assert is_whole(folder)
        assert keep(folder.with_name("nf4-89ab"), written)
        assert theirs.is_dir()
    assert is_whole(folder)
    assert not theirs.exists()


def test_a_folder_that_another_process_has_kept_meanwhile_stays(folder):
    keep(folder, written)
    before = (folder / "config.json").stat().st_ino
    assert keep(folder, disk_full)  # nothing is written
    assert (folder / "config.json").stat().st_ino == before


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", lambda path: exec("raise RuntimeError('no home')"))

    with pytest.raises(UserError, match=r"^this user has no home folder; set XDG_CACHE_HOME to a folder"):
        cache.cache_folder()
