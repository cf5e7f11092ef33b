"""Constitutional AI in several processes: the rows and reports are those of one."""

import json
import signal
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests.commands.test_constitution import LABELLERS, PRINCIPLES
from tests.helpers import TRAIN
from tests.train.processes import (
    assert_killed,
    assert_same_files,
    assert_stopped,
    ended,
    launch,
    lines_of,
    run_together,
    wait_until,
)

pytestmark = pytest.mark.slow
together, started = partial(run_together, "constitution", ending=True), partial(launch, "constitution", ending=True)
FILES = ("revisions.jsonl", "pairs.jsonl", "judgements.jsonl", "metrics.jsonl", "summary.json")
COUNTED = """
import time
from pathlib import Path

def counted(prompts, firsts, seconds, principles):
    with Path(__file__).with_name("calls").open("a") as file:
        file.write(f"{len(firsts)}\\n")
    return shorter(prompts, firsts, seconds, principles)

def slowly(*asked):
    time.sleep(0.3)
    return shorter(*asked)

def fails(prompts, firsts, seconds, principles, calls=[]):
    calls.append(1)
    return shorter(prompts, firsts, seconds, principles) if len(calls) < 3 else 1 / 0
"""


def write(folder: Path, base: str, **keys) -> Path:
    """A recipe of three parts to measure the labeller, two of revisions, and five of pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.py").write_text(LABELLERS + COUNTED)
    (folder / "mine.yaml").write_text(yaml.safe_dump({"principles": PRINCIPLES}))
    human = [{"prompt": f"Why {number}?", "chosen": "a" * (number % 7), "rejected": "b" * 9} for number in range(1, 41)]
    (folder / "human.jsonl").write_text("".join(json.dumps(row) + "\n" for row in human if row["chosen"]))
    stage = {"data": "constitution", "batch_size": 2, "max_steps": 2}
    recipe = {
        "model": {"base": base, "compute_dtype": "float32", "max_length": 512},
        "lora": {"r": 4, "alpha": 8},
        "output": str(folder),
        "constitution": {
            "data": TRAIN, "limit": 36, "principles": "mine.yaml", "revisions": 2, "candidates": 4,
            "labeller": "mine.py:counted", "agree_with": "human.jsonl", "max_new_tokens": 12, **keys,
        },
        "sft": stage, "dpo": {**stage, "start_from": "sft"},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.mark.parametrize(("count", "labeller"), [(2, "base"), (3, "mine.py:counted")])
def test_any_number_of_processes_makes_the_same_rows(count, labeller, tiny_folder, tmp_path):
    """A function judges in the first process, part by part."""
    path, calls = write(tmp_path, tiny_folder, labeller=labeller, force=True), []
    for processes in (1, count):
        said = together(path, processes, f"output={tmp_path / str(processes)}")
        calls.append(lines_of(tmp_path / "calls"))
        (tmp_path / "calls").unlink(missing_ok=True)
    assert f"{count} processes" in said
    one, several = (tmp_path / str(processes) / "constitution" for processes in (1, count))
    assert_same_files(several, one, *FILES)
    assert (several / "report.png").read_bytes() == (one / "report.png").read_bytes()
    assert len(lines_of(one / "revisions.jsonl")) > 8
    assert len(lines_of(one / "pairs.jsonl")) > 8
    assert calls[0] == calls[1]


@pytest.mark.parametrize(("before", "killed", "after"), [(2, 1, 3), (3, 0, 2)])
def test_a_run_that_lost_a_process_goes_on_to_the_same_rows(before, killed, after, tiny_folder, tmp_path):
    path = str(write(tmp_path, tiny_folder, labeller="mine.py:slowly"))
    output = f"output={tmp_path / 'several'}"
    together(path, 1)
    processes, folder = started([path] * before, output), tmp_path / "several" / "constitution"
    wait_until(lambda: len(lines_of(folder / "metrics.jsonl")) > 3, processes)
    assert_killed(processes, killed)
    assert not (folder / "summary.json").exists()
    assert "resuming" in together(path, after, output, "--resume")
    assert_same_files(folder, tmp_path / "constitution", *FILES)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_and_keeps_what_was_made(number, tiny_folder, tmp_path):
    path = write(tmp_path, tiny_folder, limit=150, labeller="mine.py:slowly")
    processes, metrics = started([str(path)] * 2), tmp_path / "constitution" / "metrics.jsonl"
    wait_until(lambda: len(lines_of(metrics)) > 3, processes)
    said = assert_stopped(processes, number)
    assert f"checkpoint-{json.loads(lines_of(metrics)[-1])['step']}\ngo on with: " in said


def test_a_labeller_that_fails_ends_all_with_one_line(tiny_folder, tmp_path):
    path = str(write(tmp_path, tiny_folder, labeller="mine.py:fails"))
    codes, _, errors = ended(started([path] * 2))
    assert codes == [2, 2], errors
    assert "".join(errors).count("raised ZeroDivisionError") == 1, errors


def test_a_labeller_that_cannot_judge_is_said_once(tiny_folder, tmp_path):
    path = str(write(tmp_path, tiny_folder, labeller="mine.py:first"))
    codes, _, errors = ended(started([path] * 3))
    assert codes == [2, 2, 2], errors
    assert "".join(errors).count("no pairs were written: this labeller can't judge") == 1, errors
    assert not (tmp_path / "constitution" / "pairs.jsonl").exists()


def test_the_stages_train_on_what_several_processes_made(tiny_folder, tmp_path):
    path = write(tmp_path, tiny_folder)
    for stage in ("constitution", "sft", "dpo"):
        assert "2 processes" in run_together(stage, path, 2, ending=True)
    assert (tmp_path / "dpo" / "adapter" / "adapter_model.safetensors").is_file()
