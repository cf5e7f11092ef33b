"""Best of n in several processes, with rounds of DPO too: the files are those of one process."""

import json
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.helpers import TRAIN
from tests.reward_runs import run_stage, write_recipe
from tests.train.processes import (
    assert_killed,
    assert_same_files,
    assert_stopped,
    ended,
    launch,
    lines_of,
    rounded,
    run_together,
    wait_until,
)

pytestmark = pytest.mark.slow
together, started = partial(run_together, "best_of", ending=True), partial(launch, "best_of", ending=True)
FILES = ("picks.jsonl", "pairs.jsonl", "summary.json", "metrics.jsonl")
# Judges the answers against each other, and says how often it was called.
REWARDS = """
import time
from pathlib import Path

def ranked(completions):
    with Path(__file__).with_name("calls").open("a") as file:
        file.write(f"{len(completions)}\\n")
    order = sorted(completions, key=lambda text: (text.count("e") - len(text), text))
    return [order.index(text) / len(order) for text in completions]

def shorter(completions):
    return [-float(len(text)) for text in completions]

def even(completions):
    return [float(len(text) % 2 == 0) for text in completions]

def slowly(completions):
    time.sleep(0.2)
    return shorter(completions)

def fails(completions, calls=[]):
    calls.append(1)
    return shorter(completions) if len(calls) < 3 else 1 / 0
"""


@pytest.fixture(scope="module")
def ensemble(tiny_folder, tmp_path_factory) -> str:
    return str(run_stage(write_recipe(tmp_path_factory.mktemp("ensemble") / "runs", tiny_folder, members=2)).path)


def write(folder: Path, base: str, **keys) -> Path:
    """A recipe whose prompts are five parts to train on, and two that are held out; with n=16."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rewards.py").write_text(REWARDS)
    recipe = {
        "model": {"base": base, "compute_dtype": "float32", "max_length": 256},
        "lora": {"r": 4, "alpha": 8},
        "output": str(folder),
        "dpo": {
            "data": TRAIN, "batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-4, "save_every": 2, "epochs": 4,
        },
        "ppo": {
            "data": TRAIN, "limit": 17, "eval_data": [{"path": TRAIN, "skip": 20, "limit": 5}], "max_new_tokens": 12,
            "reward": "rewards.py:ranked", "judge": "rewards.py:shorter", **keys,
        },
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_processes_keeps_the_same_answers(count, tiny_folder, ensemble, tmp_path):
    """A function is called by the first process, part by part; the zero of an ensemble is that of its first part."""
    places = [tmp_path / "one", tmp_path / "several"]
    for place, processes in zip(places, (1, count), strict=True):
        path = write(place, tiny_folder, reward=[ensemble, "rewards.py:ranked"], reward_combine="min")
        said = together(path, processes)
    assert f"{count} processes" in said
    one, several = (place / "best_of" for place in places)
    assert_same_files(several, one, *FILES)
    assert len((one / "pairs.jsonl").read_text().splitlines()) > 5
    assert (places[1] / "calls").read_text() == (places[0] / "calls").read_text()


@pytest.mark.parametrize(("before", "killed", "after"), [(3, 2, 2), (2, 0, 3)])
def test_a_run_that_lost_a_process_goes_on_to_the_same_files(before, killed, after, tiny_folder, tmp_path):
    one, several = (
        write(tmp_path / name, tiny_folder, limit=60, reward="rewards.py:slowly") for name in ("one", "several")
    )
    together(one, 1)
    processes, folder = started([str(several)] * before), several.parent / "best_of"
    wait_until(lambda: len(lines_of(folder / "metrics.jsonl")) > 6, processes)
    assert_killed(processes, killed)
    assert not (folder / "summary.json").exists()
    assert "resuming" in together(several, after, "--resume")
    assert_same_files(folder, one.parent / "best_of", *FILES)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_and_keeps_what_was_sampled(number, tiny_folder, tmp_path):
    path = write(tmp_path, tiny_folder, limit=150, reward="rewards.py:slowly")
    processes, metrics = started([str(path)] * 2), tmp_path / "best_of" / "metrics.jsonl"
    wait_until(lambda: len(lines_of(metrics)) > 2, processes)
    said = assert_stopped(processes, number)
    assert f"checkpoint-{json.loads(lines_of(metrics)[-1])['step']}\ngo on with: " in said


def test_a_reward_that_fails_ends_all_with_one_line_and_keeps_what_was_sampled(tiny_folder, tmp_path):
    path = write(tmp_path, tiny_folder, reward="rewards.py:fails")
    codes, _, errors = ended(started([str(path)] * 2))
    assert codes == [2, 2], errors
    assert "".join(errors).count("raised ZeroDivisionError") == 1, errors
    assert (tmp_path / "best_of" / "checkpoints" / "checkpoint-2" / "manifest.json").is_file()


def test_rounds_in_several_processes_learn_the_same(tiny_folder, tmp_path):
    keys, words = {"reward": "rewards.py:shorter", "judge": "rewards.py:even"}, ("rounds=2", "n=8")
    one, several = (write(tmp_path / name, tiny_folder, **keys) for name in ("one", "several"))
    together(one, 1, *words)
    processes, folder = started([str(several)] * 3, *words), several.parent / "best_of"
    wait_until(lambda: len(lines_of(folder / "round_1" / "dpo" / "metrics.jsonl")) > 3, processes)
    assert_killed(processes, 1)
    together(several, 2, *words, "--resume")
    expected = one.parent / "best_of"
    assert_same_files(folder, expected, "samples/round-0.jsonl", "samples/round-2.jsonl")
    for number in (1, 2):
        assert_same_files(folder / f"round_{number}" / "sampling", expected / f"round_{number}" / "sampling", *FILES)
    mine, wanted = (load_file(place / "adapter" / "adapter_model.safetensors") for place in (folder, expected))
    torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-6)
    mine, wanted = (json.loads((place / "summary.json").read_text())["evaluations"] for place in (folder, expected))
    assert [line["point"] for line in mine] == rounded([line["point"] for line in wanted])
