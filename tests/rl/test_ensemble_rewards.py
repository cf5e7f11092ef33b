"""Ensembles as rewards and judges of PPO: their scores, which members judge, resuming, the figures of disagreement, and
one line for what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from qalign.best_of import main as best_of
from qalign.config.load import load as load_recipe
from qalign.config.recipe import Recipe
from qalign.data.collate import MicroBatchLimit
from qalign.errors import UserError
from qalign.losses.ensemble import aligned, combined_scores, spread
from qalign.model.base import Role
from qalign.rl.rewards import combined, open_scorers, restore_scorers, scorers_state, spread_of, value_start
from qalign.train.run_folder import RunFolder
from tests.helpers import leaving, metrics, summary
from tests.reward_runs import run_stage, write_recipe
from tests.rl.conftest import assert_alike, logged
from tests.rounds_runs import recipe_path, rounds_run  # noqa: F401

MEMBERS = ["member_1", "member_2", "member_3", "member_4"]
LIMIT = MicroBatchLimit(pairs=2)


@pytest.fixture(scope="module")
def ensemble_run(tiny_folder, tmp_path_factory) -> RunFolder:
    keys = {"members": 4, "member_layers": 0.5, "learning_rate": 3e-2}
    return run_stage(write_recipe(tmp_path_factory.mktemp("ensemble") / "runs", tiny_folder, **keys))


@pytest.fixture
def opened(tiny_folder, tmp_path):
    """The scorers of a recipe with this ensemble as its own reward run, not loaded."""

    def make(run: RunFolder, reward="reward", **more):
        shutil.copytree(run.path, tmp_path / "runs" / "reward", dirs_exist_ok=True)
        ppo = {"data": "unused.jsonl", "reward": reward, "max_new_tokens": 16, **more}
        model = {"base": tiny_folder, "compute_dtype": "float32", "max_length": 256}
        recipe = Recipe.model_validate({"model": model, "output": str(tmp_path / "runs"), "ppo": ppo})
        return open_scorers(recipe, RunFolder(recipe, "ppo", "my.yaml"))

    return make


def names(scorer) -> list[str]:
    return [folder.name for folder in scorer.folders]


@pytest.mark.parametrize(("how", "more"), [("mean", {}), ("min", {}), ("mean_minus_std", {"uncertainty": 2.0})])
def test_the_reward_is_that_of_each_member_alone_combined(how, more, opened, ensemble_run, tiny_base, rows):
    scorers = opened(ensemble_run, reward_combine=how, **more)
    scorers.attach(tiny_base, LIMIT)
    total, means = combined(scorers.reward, rows)
    alone = []
    for name in MEMBERS:
        (scorer,) = opened(ensemble_run, f"reward/{name}").reward
        scorer.attach(tiny_base, f"judge_{name}", LIMIT)
        alone.append(scorer.scores(rows))
    each = torch.stack(alone, dim=-1)
    together = aligned(each, each.mean(dim=(0, 1)))
    torch.testing.assert_close(total, combined_scores(together, how, 2.0), rtol=0, atol=1e-5)
    assert spread_of(scorers.reward) == pytest.approx(spread(together).mean().item(), abs=1e-5)
    assert list(means) == ["runs", "runs/spread"]
    assert total.std() > 1e-3


def test_the_zero_of_the_members_is_set_by_the_first_answers_and_kept(opened, ensemble_run, tiny_base, rows):
    scorers = opened(ensemble_run, reward_combine="min")
    scorers.attach(tiny_base, LIMIT)
    first = combined(scorers.reward, rows)[0]
    alone = torch.cat([combined(scorers.reward, [row])[0] for row in rows])
    torch.testing.assert_close(alone, first, rtol=0, atol=1e-5)
    state = scorers_state(scorers.all)
    scorers.reward[0].zeros = None
    fresh = combined(scorers.reward, rows[:1])[0]
    restore_scorers(scorers.all, state)
    found = combined(scorers.reward, rows[:1])[0]
    torch.testing.assert_close(found, first[:1], rtol=0, atol=1e-5)
    assert (fresh - found).abs().max() > 1e-3


def test_a_member_that_judges_is_left_out_of_the_reward(opened, ensemble_run):
    judged = {"judge": "reward/member_4", "eval_data": "unused.jsonl"}
    scorers = opened(ensemble_run, reward_combine="min", **judged)
    assert names(scorers.reward[0]) == MEMBERS[:3]
    assert names(scorers.judge[0]) == ["member_4"]
    assert scorers.judge[0].name == "runs/member_4"
    assert value_start(scorers.reward).folders[0].name == "member_1"
    folder = opened(
        ensemble_run, str(ensemble_run.path), judge=str(ensemble_run.path / "member_2"), eval_data="u.jsonl"
    )
    assert names(folder.reward[0]) == ["member_1", "member_3", "member_4"]
    with pytest.raises(
        UserError, match=r"^ppo\.judge: scores with what the policy trains on, runs/member_1; name another"
    ):
        opened(ensemble_run, "reward/member_1", judge="reward", eval_data="unused.jsonl")


def test_members_and_combinations_that_are_not_there_are_one_line(opened, ensemble_run, reward_run, tmp_path):
    with pytest.raises(UserError, match=r"^ppo\.reward: there is no .*member_9; its members are member_1, member_2"):
        opened(ensemble_run, "reward/member_9")
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(UserError, match=r"^ppo\.reward_combine: 'min' needs a reward with several members; train"):
        opened(reward_run, reward_combine="min")
    with pytest.raises(UserError, match=r"^ppo\.reward: there is no .*member_1; the reward run was trained without"):
        opened(reward_run, "reward/member_1")


@pytest.mark.slow
def test_a_whole_run_on_the_worst_of_three_with_the_fourth_as_judge(recipe_of, held_out, ensemble_run, capsys):
    """It resumes to the same numbers, and a member that changed meanwhile is noticed."""
    keys = {
        "reward": str(ensemble_run.path), "judge": str(ensemble_run.path / "member_4"), "reward_combine": "min",
        "eval_data": held_out, "eval_every": 2, "value": "adapter", "max_steps": 3,
    }  # fmt: skip
    whole = run_stage(recipe_of("whole", **keys))
    said = capsys.readouterr().out
    name = ensemble_run.path.parent.name
    assert f"reward         min of {name}'s member_1, member_2, member_3" in said
    assert f"judge          {name}/member_4" in said
    roles = {f"reward_{member}" for member in MEMBERS[:3]}
    assert set(summary(whole)["bytes_by_role"]) == {"base", "policy", "judge", "value", *roles}
    points = [line for line in metrics(whole) if "eval_proxy" in line]
    assert all(line["eval_spread"] > 0 for line in points)
    assert all(line[f"scores/{name}/spread"] > 0 for line in metrics(whole) if "loss" in line)

    path = recipe_of("cut", **keys)
    cut = run_stage(path)
    cut.summary.unlink()
    shutil.rmtree(cut.checkpoints / "checkpoint-3")
    assert_alike(logged(run_stage(path, resume=True)), logged(whole), 1e-6)


def test_best_of_goes_on_with_the_same_zeros(recipe_of, held_out, ensemble_run):
    path = recipe_of("best", reward=str(ensemble_run.path), reward_combine="min", limit=4, eval_data=held_out)
    assert leaving(best_of, path, "n=2") == 0
    found = metrics(RunFolder(load_recipe(path, stage="ppo"), "ppo", name="best_of"))
    zeros = [line["zeros"] for line in found if "zeros" in line]
    assert zeros
    assert all(one == zeros[0] for one in zeros)


@pytest.mark.slow
def test_rounds_measure_every_policy_by_the_same_zeros(recipe_path, ensemble_run):  # noqa: F811
    run = rounds_run(recipe_path, 2, f"ppo.reward={ensemble_run.path}", "ppo.reward_combine=min", "ppo.judge=")
    parts = [run.metrics, *(run.path / f"round_{number}" / "sampling" / "metrics.jsonl" for number in (1, 2))]
    found = [line for part in parts for line in map(json.loads, part.read_text().splitlines()) if line.get("zeros")]
    assert len(found) == 3 + 2 * 3
    assert all(line["zeros"] == found[0]["zeros"] for line in found)
    assert all(line["point"]["spread"] > 0 for line in found[:3])


def test_the_adapter_of_a_member_has_no_other_role(ensemble_run, tiny_base):
    with pytest.raises(UserError, match="is a reward adapter, which gives scores"):
        tiny_base.load_adapter(Role.POLICY, str(Path(ensemble_run.adapter) / "member_1"), trainable=False)
