"""Which checkpoint a run goes on from: the newest one that is as it was written."""

import os
import shutil
from pathlib import Path

import pytest

from qalign.config import manifest
from qalign.errors import UserError
from qalign.train import checkpoints


def write(folder: Path, step: int, *, whole: bool = True) -> Path:
    place = folder / f"checkpoint-{step}"
    (place / "inside").mkdir(parents=True)
    for name in ("optimizer.pt", "trainer_state.json", "inside/vocabulary.txt"):
        (place / name).write_bytes(f"{name} at {step} ".encode() * 50)
    metrics = folder / "metrics.jsonl"
    metrics.write_text(f'{{"step": {step}}}\n')
    if whole:
        checkpoints.mark_whole(place, 10 * step, 1.5, metrics)
    return place


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a flipped bit": (lambda folder: flip(folder / "optimizer.pt", 77), "optimizer.pt was changed"),
    "one of the last": (lambda folder: flip(folder / "optimizer.pt", -1), "optimizer.pt was changed"),
    "in a folder": (lambda folder: flip(folder / "inside" / "vocabulary.txt", 0), "inside/vocabulary.txt was changed"),
    "short": (lambda folder: (folder / "optimizer.pt").write_bytes(b"opt"), "optimizer.pt has 3 bytes instead of 950"),
    "empty": (lambda folder: (folder / "trainer_state.json").write_bytes(b""), "trainer_state.json has 0 bytes inst"),
    "longer": (lambda folder: os.truncate(folder / "optimizer.pt", 951), "optimizer.pt has 951 bytes instead"),
    "missing": (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "metrics": (lambda folder: flip(folder / "metrics.jsonl", 3), "metrics.jsonl was changed"),
    "a folder": (lambda folder: shutil.rmtree(folder / "inside"), "inside/vocabulary.txt is missing"),
    "a file's place": (lambda f: [(f / "optimizer.pt").unlink(), (f / "optimizer.pt").mkdir()], "optimizer.pt is miss"),
    "manifest": (lambda folder: flip(folder / "manifest.json", 20), "manifest.json was changed"),
    "manifest short": (lambda folder: (folder / "manifest.json").write_bytes(b'{"fil'), "manifest.json was changed"),
    "manifest other": (lambda folder: (folder / "manifest.json").write_bytes(b"[1]"), "manifest.json was changed"),
    "manifest deep": (lambda f: (f / "manifest.json").write_bytes(b"[" * 99999), "manifest.json was changed"),
    "manifest gone": (lambda folder: (folder / "manifest.json").unlink(), "it has no manifest.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_older_one_is_used(tmp_path, kind, capsys):
    older, newer = write(tmp_path, 5), write(tmp_path, 10)
    do, words = DAMAGE[kind]
    do(newer)
    assert checkpoints.newest_whole(tmp_path) == older
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{newer}: can't be used: {words}")
    assert line.endswith("going back to checkpoint-5")


def test_no_bit_of_a_manifest_changes_unnoticed(tmp_path):
    """Its numbers count as much as the files."""
    checkpoint = write(tmp_path, 5)
    file = checkpoint / manifest.MANIFEST
    for place in range(file.stat().st_size):
        flip(file, place)
        assert manifest.damage(checkpoint), place
        flip(file, place)
    assert manifest.damage(checkpoint) is None


def test_where_all_are_damaged_each_is_named_with_what_to_do(tmp_path):
    for step in (5, 10):
        flip(write(tmp_path, step) / "optimizer.pt", 0)
    with pytest.raises(UserError) as raised:
        checkpoints.newest_whole(tmp_path)
    assert [line.split(": ")[0].rpartition("-")[2] for line in raised.value.lines[:2]] == ["10", "5"]
    assert "--overwrite" in raised.value.lines[-1]


def test_one_that_was_cut_short_as_it_was_written_is_no_damage(tmp_path):
    assert checkpoints.newest_whole(tmp_path) is None
    write(tmp_path, 5, whole=False)
    (tmp_path / "checkpoint-late").mkdir()
    assert checkpoints.newest_whole(tmp_path) is None, "the run begins again"
    assert checkpoints.newest_whole(write(tmp_path, 2).parent).name == "checkpoint-2"


def test_two_are_kept_whatever_the_clock_says_and_the_best_one(tmp_path):
    for step in (9, 10, 11):
        write(tmp_path, step)
    assert sorted(path.name for path in tmp_path.glob("c*")) == ["checkpoint-10", "checkpoint-11"]
    checkpoints.mark_whole(write(tmp_path, 12, whole=False), 1, 1.0, tmp_path / "metrics.jsonl", "checkpoint-10")
    assert sorted(path.name for path in tmp_path.glob("c*")) == ["checkpoint-10", "checkpoint-11", "checkpoint-12"]
    assert manifest.read(tmp_path / "checkpoint-11")["tokens_seen"] == 110


def test_the_lines_of_damaged_metrics_that_are_whole_are_read(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert checkpoints.read_metrics(file) == []
    junk = (b"\0" * 9, b"\xff{}", b"[1]", b"7", b'{"loss": 1}', b"[" * 99999)
    file.write_bytes(b"\n".join([b'{"step": 1}', *junk, b'{"step": 2}', b'{"step": 3']))
    assert checkpoints.read_metrics(file) == [{"step": 1}, {"step": 2}]
