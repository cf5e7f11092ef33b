"""Runs on rows with a `chosen_probability`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qalign.errors import UserError
from tests.helpers import TRAIN, metrics, train
from tests.reward_runs import run_stage, write_recipe
from tests.train.runs import WEIGHTS, assert_same_run

LN_2 = 0.6931472


@pytest.fixture
def rows(write_jsonl):
    """Writes the demo's first rows with these probabilities, of which None is none at all."""
    demo = [json.loads(line) for line in Path(TRAIN).read_text(encoding="utf-8").splitlines()]

    def write(name: str, probabilities, swapped=()):
        found = []
        for number, (row, likely) in enumerate(zip(demo, probabilities, strict=False)):
            row = row if likely is None else row | {"chosen_probability": likely}
            found.append(row | {"chosen": row["rejected"], "rejected": row["chosen"]} if number in swapped else row)
        return write_jsonl(name, found)

    return write


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_probabilities_of_1_are_hard_labels_to_the_bit(rows, tiny_folder, tmp_path, stage):
    """Every logged number and every weight."""
    runs = []
    for name, likely in (("hard", None), ("soft", 1.0)):
        data = rows(f"{name}.jsonl", [likely] * 12)
        path = write_recipe(tmp_path / name, tiny_folder, stage, data=data, max_steps=3, batch_size=4)
        runs.append(run_stage(path))
    one, other = ([{k: v for k, v in line.items() if "second" not in k} for line in metrics(run)] for run in runs)
    assert one == other
    weights = [load_file(run.adapter / WEIGHTS) for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_answers_the_other_way_round_with_the_probability_of_the_other_are_the_same_run(
    rows, tiny_folder, tmp_path, stage
):
    likely = [0.9, 0.25, 1.0, 0.75, 0.125, 0.9, 0.75, 0.625]
    runs = []
    for name, swapped in (("one", ()), ("other", (1, 2, 4))):
        given = [1 - p if number in swapped else p for number, p in enumerate(likely)]
        data = rows(f"{name}.jsonl", given, swapped)
        path = write_recipe(tmp_path / name, tiny_folder, stage, data=data, max_steps=3, batch_size=4)
        runs.append(run_stage(path))
    assert_same_run(*runs)
    hard = write_recipe(tmp_path / "hard", tiny_folder, stage, data=rows("hard.jsonl", [None] * 8), max_steps=3)
    assert metrics(run_stage(hard))[-1]["loss"] != pytest.approx(metrics(runs[0])[-1]["loss"])


def test_ties_teach_no_preference_and_the_header_counts_them(rows, recipe_file, capsys):
    run = train(recipe_file(data=rows("ties.jsonl", [0.5] * 6 + [0.8, None]), max_steps=1, batch_size=8))
    assert "7 of 8 rows have a chosen_probability below 1, 6 of them a tie" in capsys.readouterr().out
    assert metrics(run)[0]["loss"] == pytest.approx(LN_2, abs=1e-6)
    even = train(recipe_file("even.yaml", "even", data=rows("even.jsonl", [0.5] * 8), max_steps=4, learning_rate=1e-2))
    assert [line["rewards/accuracies"] for line in metrics(even)] == [0.5] * 4
    assert metrics(even)[-1]["loss"] == pytest.approx(LN_2, abs=1e-3)


@pytest.mark.parametrize("key", ["data", "eval_data"])
def test_a_loss_that_takes_none_refuses_them_in_one_line(rows, recipe_file, key):
    soft = rows("soft.jsonl", [0.9, 1.0, None, 0.5])
    with pytest.raises(UserError) as raised:
        train(recipe_file(loss="hinge", **{key: soft}))
    (line,) = raised.value.lines
    assert line.startswith(f"dpo.{key}: 2 of its 4 rows have a chosen_probability, which loss 'hinge' can't use; take ")
    with pytest.raises(UserError, match=r"which loss 'aot' \+ 'sigmoid' can't use"):
        train(recipe_file(loss={"sigmoid": 1.0, "aot": 0.5}, **{key: soft}))
    train(recipe_file(loss={"sigmoid": 1.0, "ipo": 0.5, "sft": 0.1}, max_steps=1, **{key: soft}))


def test_a_margin_beside_a_probability_is_refused(rows, write_jsonl, tiny_folder, tmp_path):
    soft = map(json.loads, Path(rows("soft.jsonl", [0.9] * 4)).read_text(encoding="utf-8").splitlines())
    scored = write_jsonl("scored.jsonl", [row | {"score_chosen": 3, "score_rejected": 1} for row in soft])
    with pytest.raises(UserError, match=r"reward\.data: 4 of its 4 rows have a chosen_probability, which margin: true"):
        run_stage(write_recipe(tmp_path / "run", tiny_folder, data=scored, margin=True, max_steps=1))


def test_resume_notices_that_a_probability_was_changed(rows, recipe_file, monkeypatch):
    path = recipe_file(data=rows("soft.jsonl", [0.9] * 8), max_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr("qalign.train.loop.Session.finish", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(path)
    rows("soft.jsonl", [0.9] * 7 + [0.8])
    with pytest.raises(UserError, match=r"dpo\.data: its rows are no longer those"):
        train(path, resume=True)


def test_the_reward_report_counts_ties_a_half(rows, tiny_folder, tmp_path):
    held_out = rows("held_out.jsonl", [0.5] * 6)
    keys = {"data": rows("train.jsonl", [0.9] * 8), "eval_data": held_out, "max_steps": 1}
    run = run_stage(write_recipe(tmp_path / "run", tiny_folder, **keys))
    trust = json.loads(run.summary.read_text())["trust"]
    assert (trust["accuracy"], trust["length_accuracy"]) == (0.5, 0.5)
    assert trust["discordant"] == {"model": 0, "length_judge": 0}
