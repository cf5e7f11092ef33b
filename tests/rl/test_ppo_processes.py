"""PPO and GRPO in several processes: what is sampled, learned and decided is the same as in one."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from qalign.rl.ppo_loop import STATE
from qalign.train.run_folder import RunFolder
from tests.reward_runs import run_stage, write_recipe
from tests.train.processes import (
    assert_killed,
    assert_same_curve,
    assert_stopped,
    ended,
    launch,
    lines_of,
    opened,
    run_together,
    wait_until,
)
from tests.train.runs import recipe_of

pytestmark = pytest.mark.slow
# Iterations of 6 prompts in mini-batches of 3, each in 3 micro-batches: two processes have unequal shares.
KEYS = {"batch_size": 12, "limit": 13, "max_new_tokens": 8, "learning_rate": 1e-4, "max_steps": 4, "save_every": 2}
KEYS |= {"eval_every": 2, "micro_batch_size": 2, "kl_target": 0.01}
# With 4 prompts an iteration, one of three processes has nothing to do in an update.
FEW = {"batch_size": 8}
GROUPS = {"samples_per_prompt": 4, "micro_batch_size": 4, "kl_target": None}
# Judges the answers against each other, by numbers of its own, and says how often it was called.
REWARD = """
import random
from pathlib import Path

def ranked(completions):
    with Path(__file__).with_name("calls").open("a") as file:
        file.write(f"{len(completions)}\\n")
    order = sorted(completions, key=lambda text: (text.count("e") - len(text), text))
    return [order.index(text) / len(order) + 0.1 * random.random() for text in completions]

def shorter(completions):
    return [-float(len(text)) for text in completions]

def even(completions):
    return [float(len(text) % 2 == 0) for text in completions]

def fails(completions, calls=[]):
    calls.append(1)
    if len(calls) == 3:
        raise KeyError("no such answer")
    return [float(len(text)) for text in completions]
"""


def write(folder: Path, base: str, stage: str, reward, **keys) -> str:
    """A recipe of PPO or GRPO with 13 prompts and 5 that are held out, all of other lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 13), ("test", 5)):
        rows = [{"prompt": f"{name} {number} " + "why " * (number * 7 % 11)} for number in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARD)
    named = [f"{folder}/{each}" if each.startswith("rewards.py") else each for each in reward]
    data = {"data": str(folder / "train.jsonl"), "eval_data": str(folder / "test.jsonl"), "reward": named}
    return recipe_of(folder, base, stage, **(data | KEYS | {"judge": f"{folder}/rewards.py:shorter"} | keys))


def assert_same_state(path: str, expected: RunFolder) -> None:
    """Curves, policy, value model, the optimiser's and the controller's state, and every sampled answer."""
    assert_same_curve(path, expected)
    mine, wanted = (
        torch.load(run.last_checkpoint() / STATE, weights_only=True)["trainer"] for run in (opened(path), expected)
    )
    assert mine["weights"].keys() == wanted["weights"].keys()
    torch.testing.assert_close(mine["weights"], wanted["weights"], rtol=0, atol=1e-6)
    for name in ("kl_coefficient", "value_units", "moments"):
        assert mine[name] == pytest.approx(wanted[name], rel=1e-5), name
    assert mine["tokens_seen"] == wanted["tokens_seen"]
    for file in expected.path.glob("samples/*.jsonl"):
        assert completions(opened(path).path / "samples" / file.name) == completions(file)


def completions(file: Path) -> list[str]:
    return [json.loads(line)["completion"] for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tiny_folder, tmp_path_factory):
    """What one process trains."""
    found: dict[str, RunFolder] = {}

    def trained(stage: str, reward, **keys) -> RunFolder:
        if (key := f"{stage} {reward} {keys}") not in found:
            found[key] = run_stage(write(tmp_path_factory.mktemp("one"), tiny_folder, stage, reward, **keys))
        return found[key]

    return trained


@pytest.fixture(scope="module")
def ensemble(tiny_folder, tmp_path_factory) -> RunFolder:
    return run_stage(write_recipe(tmp_path_factory.mktemp("ensemble") / "runs", tiny_folder, members=2))


@pytest.mark.parametrize(
    ("stage", "count", "rewards", "keys"),
    [
        ("ppo", 3, ["rewards.py:ranked"], {"value": "trunk", **FEW}),
        ("ppo", 3, ["reward", "rewards.py:ranked"], {"value": "adapter", "micro_batch_size": "auto"}),
        ("ppo", 2, ["ensemble"], {"value": "trunk", "kl_stop": 1e-9, "reward_combine": "min"}),
        ("grpo", 3, ["rewards.py:ranked"], GROUPS),
        ("grpo", 2, ["rewards.py:even"], {**GROUPS, "micro_batch_size": "auto", "dynamic_sampling": True}),
    ],
)
def test_any_number_of_processes_trains_the_same(
    stage, count, rewards, keys, alone, reward_run, ensemble, tiny_folder, tmp_path
):
    places = {"reward": str(reward_run.path), "ensemble": str(ensemble.path)}
    named = [places.get(reward, reward) for reward in rewards]
    path = write(tmp_path, tiny_folder, stage, named, **keys)
    assert f"{count} processes" in run_together(stage, path, count)
    expected = alone(stage, named, **keys)
    assert_same_state(path, expected)
    if (calls := expected.path.parent / "calls").exists():
        assert (tmp_path / "calls").read_text() == calls.read_text(), "one process calls a function, with all answers"


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_resumes_with_another_number_of_processes(before, after, alone, tiny_folder, tmp_path):
    named, keys = ["rewards.py:ranked"], {"value": "trunk"}
    path = write(tmp_path, tiny_folder, "ppo", named, **keys)
    run_together("ppo", path, before)
    run = opened(path)
    run.summary.unlink()  # as if it had been killed after its checkpoint of iteration 2
    shutil.rmtree(run.checkpoints / "checkpoint-4")
    run_together("ppo", path, after, "--resume")
    assert_same_state(path, alone("ppo", named, **keys))


# Nearly all of the time is spent in one part of an iteration.
LONG = {"max_steps": 12, "save_every": 3, "eval_every": 3, "value": "trunk"}
PARTS = {"sampling": {"max_new_tokens": 150}, "update": {"update_epochs": 40, "learning_rate": 1e-6}}


def in_training(folder: Path, base: str, part: str, count: int):
    """(Path of a recipe, its processes after four iterations.)"""
    path = write(folder, base, "ppo", ["rewards.py:shorter"], judge=None, **LONG, **PARTS[part])
    processes = launch("ppo", [path] * count)
    wait_until(lambda: len(lines_of(opened(path).metrics)) > 5, processes)
    return path, processes


@pytest.mark.parametrize(("part", "killed"), [("sampling", 1), ("update", 1), ("update", 0)])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(part, killed, alone, tiny_folder, tmp_path):
    path, processes = in_training(tmp_path, tiny_folder, part, 2 + killed)
    assert_killed(processes, killed)
    assert opened(path).last_checkpoint().name in run_together("ppo", path, 2, "--resume")
    assert_same_state(path, alone("ppo", ["rewards.py:shorter"], judge=None, **LONG, **PARTS[part]))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_one_process_stops_all_after_the_same_iteration(number, tiny_folder, tmp_path):
    path, processes = in_training(tmp_path, tiny_folder, "sampling", 2)
    said = assert_stopped(processes, number)
    assert f"checkpoint-{json.loads(lines_of(opened(path).metrics)[-1])['step']}" in said


def test_a_reward_that_fails_ends_all_with_one_line_and_keeps_what_was_learned(tiny_folder, tmp_path):
    path = write(tmp_path, tiny_folder, "grpo", ["rewards.py:fails"], **GROUPS)
    codes, _, errors = ended(launch("grpo", [path] * 2))
    assert codes == [2, 2], errors
    assert "".join(errors).count("raised KeyError") == 1, errors
    assert opened(path).last_checkpoint().name == "checkpoint-1"


def test_an_alarm_stops_all(alone, tiny_folder, tmp_path):
    named, keys = ["rewards.py:ranked"], {**GROUPS, "on_alarm": "stop", "patience": 2, "eval_every": 1}
    path = write(tmp_path, tiny_folder, "grpo", named, **keys)
    run_together("grpo", path, 2)
    assert_same_state(path, alone("grpo", named, **keys))


def test_another_engine_samples_for_one_process(tiny_folder, tmp_path):
    path = write(tmp_path, tiny_folder, "grpo", ["rewards.py:ranked"], **GROUPS, engine="http://localhost:1")
    codes, _, errors = ended(launch("grpo", [path] * 2))
    assert codes == [2, 2], errors
    assert "".join(errors).strip().startswith("grpo.engine: 'http://localhost:1' samples for one process"), errors
