"""Several processes that train one run: the same curve as one, and what happens when one of them ends."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from qalign.train.processes.world import deal
from qalign.train.run_folder import RunFolder
from tests.helpers import metrics, summary
from tests.reward_runs import run_stage
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

WORDS = ["a", "river", "is", "long", "and", "slow", "in", "the", "summer", "but", "after", "rain", "it", "floods"]
# Steps of 4, 4, 4 and 2 rows, and twice the epoch; with Adam a larger learning rate makes more of rounding.
ODD = {"limit": None, "batch_size": 4, "micro_batch_size": 1, "eval_every": 3}
ODD |= {"learning_rate": 1e-4, "epochs": 2, "max_steps": None, "save_every": 3}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}  # not the last
LONG = {"epochs": 60, "save_every": 5, "eval_every": 1000}


def write(folder: Path, base: str, stage: str, **keys) -> str:
    """A recipe of a stage on pairs of short answers: a sum of log-probs that is large is rounded to more than 1e-6."""
    said = [" ".join(WORDS[n % 5 : n % 5 + 1 + n * 5 % 9]) for n in range(36)]
    rows = [{"prompt": said[n], "chosen": said[n + 18], "rejected": said[35 - n]} for n in range(18)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in (("train", rows[:14]), ("test", rows[14:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    data = {"data": str(folder / "train.jsonl"), "eval_data": str(folder / "test.jsonl")}
    return recipe_of(folder, base, stage, **(ODD | data | keys))


@pytest.fixture(scope="module")
def alone(tiny_folder, tmp_path_factory):
    """What one process trains in a stage."""
    found: dict[str, RunFolder] = {}

    def trained(stage: str, **keys) -> RunFolder:
        if (key := f"{stage} {keys}") not in found:
            found[key] = run_stage(write(tmp_path_factory.mktemp("one"), tiny_folder, stage, **keys))
        return found[key]

    return trained


def test_dealing_gives_the_largest_first_to_the_one_with_the_least():
    assert deal([1, 5, 2, 4, 3], 2) == [[0, 1, 2], [3, 4]]
    assert deal([7], 3) == [[0], [], []]


def test_two_processes_train_the_same_adapter_as_one(alone, tiny_folder, tmp_path):
    path = write(tmp_path, tiny_folder, "dpo", limit=6, epochs=1)
    assert "processes      2 processes" in run_together("dpo", path, 2)
    assert_same_curve(path, alone("dpo", limit=6, epochs=1))
    facts = summary(opened(path))
    assert facts["processes"] == len(facts["peak_bytes_each"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "count", "keys"),
    [
        ("dpo", 3, {}),
        ("dpo", 2, {"micro_batch_size": "auto"}),
        ("dpo", 3, {"lora": {"dropout": 0.1}}),
        ("dpo", 2, {"loss": "aot", "micro_batch_size": 2}),
        ("dpo", 2, {"loss": "bco_pair", "reference": "cached"}),
        ("dpo", 2, {"trainer": BEST, "limit": 8}),
        ("dpo", 2, {"model": {"stream": "always"}, "limit": 6, "epochs": 1}),
        ("kto", 3, {}),
        ("reward", 2, {}),
        ("reward", 3, {"members": 2}),
        ("sft", 3, {}),
        ("sft", 2, {"neftune_alpha": 5}),
    ],
)
def test_any_number_of_processes_trains_the_same_adapter(stage, count, keys, alone, tiny_folder, tmp_path):
    path = write(tmp_path, tiny_folder, stage, **keys)
    run_together(stage, path, count)
    assert_same_curve(path, alone(stage, **keys))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 2)])
def test_a_run_resumes_with_another_number_of_processes(before, after, alone, tiny_folder, tmp_path):
    path = write(tmp_path, tiny_folder, "dpo")
    run_together("dpo", path, before)
    run = opened(path)
    run.summary.unlink()  # as if it had been killed after its checkpoint of step 6
    for late in run.checkpoints.glob("checkpoint-8"):
        (late / "manifest.json").unlink()
    said = run_together("dpo", path, after, "--resume")
    assert "checkpoint-6" in said
    assert_same_curve(path, alone("dpo"))


def started(tiny_folder: str, folder: Path, count: int):
    """(path of a recipe, its processes in their training)."""
    path = write(folder, tiny_folder, "dpo", **LONG)
    processes = launch("dpo", [path] * count)
    wait_until(lambda: len(lines_of(opened(path).metrics)) > 12, processes)
    return path, processes


@pytest.mark.slow
@pytest.mark.parametrize(("count", "killed"), [(3, [0]), (3, [1]), (4, [0, 1])])
def test_a_killed_process_ends_the_others_with_a_line_that_names_it(count, killed, tiny_folder, tmp_path):
    path, processes = started(tiny_folder, tmp_path, count)
    assert_killed(processes, *killed)
    assert opened(path).last_checkpoint().name in run_together("dpo", path, 2, "--resume")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_one_process_stops_all_after_the_same_step(number, tiny_folder, tmp_path):
    path, processes = started(tiny_folder, tmp_path, 2)
    said = assert_stopped(processes, number)
    reached = max(line["step"] for line in metrics(opened(path)))
    assert f"checkpoint-{reached}" in said


@pytest.mark.slow
def test_a_process_with_another_recipe_is_named(tiny_folder, tmp_path):
    path, other = (write(tmp_path / f"{beta}", tiny_folder, "dpo", beta=beta) for beta in (0.1, 0.2))
    codes, _, errors = ended(launch("dpo", [path, other]))
    assert codes == [2, 2], errors
    assert re.search(r"process 1 \(host \S+, pid \d+\): its dpo.beta is 0.2, that of process 0 is 0.1", "".join(errors))


@pytest.mark.slow
def test_a_process_with_other_data_is_named(tiny_folder, tmp_path):
    path, other = (write(tmp_path / name, tiny_folder, "dpo") for name in ("one", "other"))
    rows = tmp_path / "other" / "train.jsonl"
    rows.write_text(rows.read_text().replace("river", "lake", 1))
    codes, _, errors = ended(launch("dpo", [path, other]))
    assert codes == [2, 2], errors
    (said,) = "".join(errors).splitlines()
    assert re.match(
        r"process 1 \(host \S+, pid \d+\): its rows of dpo\.data is '\w+', that of process 0 is '\w+'", said
    )


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_ends_all_with_one_line(tiny_folder, tmp_path):
    """One word is NaN to the base, and one pair of a step of two has it."""
    path, folder = write(tmp_path, tiny_folder, "dpo", batch_size=2, limit=2), tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][AutoTokenizer.from_pretrained(folder).encode(" zebra")[-1]] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    rows = [{"prompt": "a river", "chosen": "it is long", "rejected": said} for said in ("it is slow", "a zebra")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    codes, _, errors = ended(launch("dpo", [path, path], f"model.base={folder}"))
    assert codes == [2, 2], errors
    (said,) = "".join(errors).splitlines()
    assert re.search(r"^step 1: the loss is not finite on \S+train\.jsonl:2;", said)


@pytest.mark.slow
def test_a_mistake_is_said_once(tiny_folder, tmp_path):
    path = write(tmp_path, tiny_folder, "dpo")
    codes, _, errors = ended(launch("dpo", [path, path], "dpo.betta=1"))
    assert codes == [2, 2], errors
    assert "".join(errors).count("betta") == 1, errors
