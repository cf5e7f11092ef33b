"""Online preference learning: every round starts where the last one ended, and a run that was killed goes on."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from qalign import best_of, evaluate, rounds
from qalign.best_of import BestOfRun
from qalign.config.load import load
from qalign.errors import Stopped, UserError
from qalign.page.models import run_entries
from qalign.reports.alarms import EvalPoint
from qalign.rl import ppo_setup
from tests.helpers import leaving, refusal, restored_signals
from tests.rounds_runs import recipe_path, rounds_run  # noqa: F401


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def points(run) -> list[dict]:
    return [line["point"] for line in json.loads(run.summary.read_text())["evaluations"]]


def test_rounds_start_where_the_last_one_ended(recipe_path):  # noqa: F811
    run = rounds_run(recipe_path)
    first, second = run.path / "round_1", run.path / "round_2"
    picks = [lines(place / "sampling" / "picks.jsonl") for place in (first, second)]
    asked = [{json.dumps(row["prompt"]) for row in rows} for rows in picks]
    assert asked[0] == asked[1], "the same prompts"
    assert picks[0] != picks[1], "other draws"
    recipes = [yaml.safe_load((place / "dpo" / "recipe.yaml").read_text()) for place in (first, second)]
    assert recipes[0]["dpo"]["start_from"] is None
    assert recipes[1]["dpo"]["start_from"] == str(first / "dpo" / "adapter")
    assert recipes[1]["dpo"]["data"][0]["path"] == str(second / "sampling" / "pairs.jsonl")
    sampled = yaml.safe_load((second / "sampling" / "recipe.yaml").read_text())
    assert sampled["ppo"]["start_from"] == str(first / "dpo" / "adapter")
    losses = [lines(place / "dpo" / "metrics.jsonl")[0]["loss"] for place in (first, second)]
    assert losses == [pytest.approx(math.log(2), abs=1e-6)] * 2, (
        "the reference is the policy that the round starts from"
    )
    last = weights(second / "dpo" / "adapter")
    assert all(torch.equal(weight, last[name]) for name, weight in weights(run.adapter).items())
    assert any(not torch.equal(weight, last[name]) for name, weight in weights(first / "dpo" / "adapter").items())


@pytest.mark.pictures
def test_every_round_is_measured_against_the_very_first_policy(recipe_path, monkeypatch):  # noqa: F811
    run = rounds_run(recipe_path)
    before, one, two = points(run)
    monkeypatch.setattr("qalign.model.generation.stop_ids_of", ppo_setup.stop_ids_of)
    evaluate.report(run.recipe, "best_of")
    found = json.loads((run.path / "evaluation.json").read_text())
    assert (found["reward"]["before"], found["reward"]["after"]) == (before["proxy"], two["proxy"])
    assert found["judge"]["after"] == two["judge"]
    assert found["kl_nats"]["after"] == pytest.approx(two["kl_nats"], abs=1e-4)
    assert [point["step"] for point in (before, one, two)] == [0, 1, 2]
    assert before["kl_nats"] == 0.0
    assert 0 != one["kl_nats"] != two["kl_nats"]
    for point, number in ((before, 0), (one, 1), (two, 2)):
        rows = lines(run.path / "samples" / f"round-{number}.jsonl")
        assert point["answers"] == len(rows) == 4
        assert point["proxy"] == pytest.approx(sum(row["reward"] for row in rows) / 4)
        assert point["judge"] == pytest.approx(-point["proxy"]), "they count the same tokens with other signs"
        assert point["length"] == pytest.approx(-point["proxy"])
        assert point["ended"] == sum(row["ended"] for row in rows) / 4
    assert (run.path / "best_of_report.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_policy_that_is_trained_already_is_where_the_kl_starts(recipe_path):  # noqa: F811
    start = rounds_run(recipe_path, 2, "output=" + recipe_path.replace("recipe.yaml", "other"))
    run = rounds_run(recipe_path, 2, f"ppo.start_from={start.adapter}")
    assert points(run)[0]["kl_nats"] == 0.0
    assert points(run)[1]["kl_nats"] != 0.0


@pytest.mark.slow
@pytest.mark.parametrize("part", ["sampling", "training", "measuring", "finishing"])
def test_a_run_that_stopped_anywhere_goes_on_to_the_same_numbers(recipe_path, part, monkeypatch):  # noqa: F811
    whole = rounds_run(recipe_path)
    expected = [whole.adapter.parent, points(whole), weights(whole.adapter)]
    kept = {
        place: lines(whole.path / place) for place in ("round_1/sampling/pairs.jsonl", "round_2/sampling/pairs.jsonl")
    }
    shutil.rmtree(whole.path)
    owner, name = {
        "sampling": (best_of.BestOfRun, "log"), "training": (rounds.Part, "mark_whole"),
        "measuring": (ppo_setup, "read_answers"), "finishing": (rounds, "write_whole"),
    }[part]  # fmt: skip
    real, seen = getattr(owner, name), []
    after = {"sampling": 12, "training": 2, "measuring": 2, "finishing": 1}[part]

    def killed(*args, **kwargs):
        seen.append(args)
        if len(seen) == after:
            raise Stopped(15)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, killed)
    with pytest.raises(Stopped):
        rounds_run(recipe_path)
    monkeypatch.setattr(owner, name, real)
    run = rounds_run(recipe_path, resume=True)
    assert points(run) == expected[1]
    assert {place: lines(run.path / place) for place in kept} == kept
    assert all(torch.equal(weight, expected[2][name]) for name, weight in weights(run.adapter).items())


def test_a_later_round_without_a_pair_ends_the_run_well(recipe_path, monkeypatch, capsys):  # noqa: F811
    """As where all answers have the highest reward."""
    kept, parts = best_of.kept, []

    def without_pairs(rows, scores):
        parts.append(kept(rows, scores))
        return parts[-1] if len(parts) <= 3 else parts[-1] | {"pairs": []}

    monkeypatch.setattr(best_of, "kept", without_pairs)
    run = rounds_run(recipe_path, 3)
    assert "round 2: no pair to train on: the reward tells no answers" in (said := capsys.readouterr().out)
    assert "; ends after 1 round\n" in said
    assert [point["step"] for point in points(run)] == [0, 1]
    last = weights(run.path / "round_1" / "dpo" / "adapter")
    assert all(torch.equal(weight, last[name]) for name, weight in weights(run.adapter).items())
    assert run.complete


def test_what_the_user_gets_wrong_is_one_line(recipe_path, tmp_path, capsys):  # noqa: F811
    same = f"ppo.reward={tmp_path / 'mine.py'}:same"
    with restored_signals():
        assert leaving(best_of.main, recipe_path, "rounds=0") == 2
        assert "rounds is '0'; expected a whole number from 1 to 100" in capsys.readouterr().err
        assert leaving(best_of.main, recipe_path, "rounds=2", "n=2", same) == 2
        assert "round 1: no pair to train on" in capsys.readouterr().err
    recipe = yaml.safe_load(Path(recipe_path).read_text())
    del recipe["dpo"]
    (tmp_path / "without.yaml").write_text(yaml.safe_dump(recipe | {"output": str(tmp_path / "w")}))
    said = refusal(capsys, rounds_run, str(tmp_path / "without.yaml"))
    assert said.startswith("dpo: rounds=2 trains DPO on every round's pairs; add a dpo section to ")


@pytest.mark.slow
def test_a_run_is_resumed_with_its_own_rounds_and_settings_alone(recipe_path, capsys):  # noqa: F811
    run = rounds_run(recipe_path)
    said = refusal(capsys, rounds_run, recipe_path)
    assert "holds a complete run; --overwrite replaces it" in said
    for number, overrides, key in (
        (3, [], "rounds is 3, was 2"),
        (1, [], "rounds is 1"),
        (2, ["dpo.beta=0.7"], "dpo.beta"),
    ):
        with pytest.raises(UserError, match=key):
            BestOfRun(load(recipe_path, overrides, "ppo"), 4, recipe_path, number).claim(resume=True, overwrite=False)
    before = run.summary.read_text()
    again = rounds_run(recipe_path, overwrite=True)
    assert json.loads(again.summary.read_text())["evaluations"] == json.loads(before)["evaluations"]


def test_the_page_lists_the_rounds(recipe_path):  # noqa: F811
    run = rounds_run(recipe_path)
    names = [entry.name for entry in run_entries(run.path.parent.parent)]
    assert names == [f"{run.path.parent.name}/best_of/round_{number}/dpo" for number in (2, 1)]


def point(step: int, proxy: float, judge: float) -> EvalPoint:
    scores = {"proxy": proxy, "proxy_std": 1.0, "judge": judge, "judge_std": 1.0, "kl_nats": float(step)}
    answers = {"answers": 100, "length": 20.0, "ended": 1.0, "distinct": 0.9, "repeated": 0.0}
    return EvalPoint(step=step, **scores, **answers, entropy=1.0, clipped=0.0)


def test_a_judge_that_falls_while_the_reward_rises_is_an_alarm():
    (said,) = rounds.alarms_of([point(0, 0.0, 0.0), point(1, 1.0, 0.1), point(2, 2.0, -1.0)])
    assert "the judge fell" in said
    assert "keep round 1, and raise dpo.beta" in said
    assert not rounds.alarms_of([point(0, 0.0, 0.0), point(1, 1.0, 0.1), point(2, 2.0, 0.2)])
