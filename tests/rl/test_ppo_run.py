"""A whole PPO run: what it leaves, resuming to the same numbers, and one line for what is wrong."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file

from qalign import ppo
from qalign.config.load import load as load_recipe
from qalign.config.stages import PPO
from qalign.errors import UserError
from qalign.rl.ppo_trainer import PPOTrainer
from qalign.train.loop import planned_steps
from tests.conftest import ROOT
from tests.helpers import leaving, metrics, restored_signals, summary, train_recipe
from tests.reward_runs import run_stage
from tests.rl.conftest import assert_alike, change_json, logged


@pytest.mark.pictures
def test_a_run_leaves_more_than_other_stages(recipe_of, held_out, reward_run, sft_run, rewards, capsys):
    run = run_stage(
        recipe_of(
            reward=str(reward_run.path), judge=f"{rewards}:shrinking", start_from=str(sft_run.adapter),
            eval_data=held_out, eval_every=2, value="adapter",
        )
    )  # fmt: skip
    kept = summary(run)
    assert set(kept["bytes_by_role"]) == {"base", "policy", "reference", "reward", "value"}
    assert set(kept["share_by_part"]) == {"rollout", "scoring", "update"}
    assert 0.8 < sum(kept["share_by_part"].values()) <= 1.01
    assert all(speed > 0 for speed in kept["tokens_per_second_by_part"].values())
    points = [line for line in metrics(run) if "eval_proxy" in line]
    assert next(line["objective/kl"] for line in metrics(run) if "loss" in line) == 0
    assert (run.path / "ppo_report.png").read_bytes()[:4] == b"\x89PNG"
    assert kept["held_out"]["best"]["step"] == max(points, key=lambda line: line["eval_judge"])["step"]
    samples = [json.loads(line) for line in (run.path / "samples" / "step-3.jsonl").read_text().splitlines()]
    assert len(samples) == 6
    assert sum(row["reward"] for row in samples) / 6 == pytest.approx(points[-1]["eval_proxy"], abs=1e-5)
    assert "judge          shrinking" in capsys.readouterr().out
    assert AutoPeftModelForCausalLM.from_pretrained(run.path / "adapter_best")


@pytest.mark.parametrize(("keys", "expected"), [({"max_steps": 7}, 7), ({"epochs": 2.0}, 3), ({"epochs": 0.1}, 1)])
def test_iterations(keys, expected):
    """10 prompts, 2 answers each, 16 answers in an iteration: 8 prompts each."""
    settings = {"data": "a", "reward": "a.py:f", "batch_size": 16, "samples_per_prompt": 2, **keys}
    assert planned_steps(PPO.model_validate(settings), 10) == expected


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("value", ["trunk", "adapter"])
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(value, recipe_of, held_out, reward_run, rewards):
    keys = {
        "eval_data": held_out, "eval_every": 2, "max_steps": 4, "value": value, "kl_target": 0.5, "save_every": 1,
        "judge": f"{rewards}:shrinking", "reward": str(reward_run.path), "scheduler": "linear",
    }  # fmt: skip
    whole, path, original = run_stage(recipe_of("whole", **keys)), recipe_of("cut", **keys), PPOTrainer.iterate
    for stop in (0, 1, 3):  # one run that is stopped three times

        def dies(self, stop=stop):
            if self.done == stop:
                raise KeyboardInterrupt
            return original(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PPOTrainer, "iterate", dies)
            with pytest.raises(KeyboardInterrupt):
                run_stage(path, resume=stop > 0)
    resumed = run_stage(path, resume=True)
    assert_alike(logged(whole), logged(resumed))
    for name in ("samples/step-0.jsonl", "samples/step-4.jsonl"):
        assert (whole.path / name).read_text() == (resumed.path / name).read_text()


def started(path: str, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "qalign.ppo", path, *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_killed_in_the_middle_it_resumes_to_the_same_numbers(recipe_of):
    whole = run_stage(recipe_of("whole", max_steps=5))
    path = recipe_of("killed", max_steps=5)
    folder = Path(path).parent / "ppo" / "checkpoints"
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        process, until = started(path, *(["--resume"] if checkpoint == "checkpoint-4" else [])), time.monotonic() + 120
        while not (folder / checkpoint).exists():  # once it does, it may be half written
            assert process.poll() is None, process.communicate()[0]
            if time.monotonic() > until:
                process.kill()
                pytest.fail(f"no {checkpoint} within 120 s: {process.communicate()[0]}")
            time.sleep(0.02)
        process.kill()
        process.communicate()
    (folder / "checkpoint-99").mkdir()  # what a kill may leave
    assert_alike(logged(whole), logged(run_stage(path, resume=True)))


def test_a_reward_adapter_that_was_trained_again_stops_a_resumed_run(recipe_of, reward_run, tmp_path):
    folder = shutil.copytree(reward_run.adapter, tmp_path / "again")
    path = recipe_of(reward=str(folder), max_steps=1)
    run_stage(path).summary.unlink()
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "adapter_model.safetensors")
    (folder / "lineage.json").unlink()  # it has the hash of the weights as they were trained
    with pytest.raises(UserError, match=r"ppo\.reward: the adapter of again was .* --overwrite"):
        run_stage(path, resume=True)


# --- what is wrong is one line ---------------------------------------------------------------------------------------


def refused(path: str, *overrides: str) -> str:
    """The message that a run is refused with."""
    with pytest.raises(UserError) as found:
        train_recipe(load_recipe(path, overrides, "ppo"), path, stage="ppo")
    return str(found.value)


def test_what_is_wrong_is_said_before_the_model_loads(recipe_of, write_jsonl, reward_run, tmp_path, monkeypatch):
    path = recipe_of()
    assert "ppo.max_new_tokens: 256" in refused(path, "ppo.max_new_tokens=256")
    monkeypatch.setattr("qalign.train.loop.placed_base", lambda *_: pytest.fail("the model was loaded"))
    assert "there is no finished reward run" in refused(path, "ppo.reward=reward")
    assert refused(path, "model.max_length=100000").startswith("model.max_length: 100000")
    other = shutil.copytree(reward_run.adapter, tmp_path / "other")
    change_json(other / "lineage.json", base="org/another-model")
    assert "'org/another-model'" in refused(path, f"ppo.reward={other}")
    rows = write_jsonl("rows.jsonl", [{"messages": [{"role": "system", "content": "Be brief."}]}])
    assert refused(path, f"ppo.data={rows}").startswith("ppo.data: 1 of 1 rows were refused")


def test_prompts_that_leave_no_room_are_refused_by_name(recipe_of, write_jsonl):
    rows = write_jsonl("rows.jsonl", [{"prompt": "word " * 300}, {"prompt": "Why?"}])
    found = refused(recipe_of(data=rows))
    assert "rows.jsonl:1" in found
    assert "248" in found, "256 less the 8 new tokens"


@pytest.mark.slow
@pytest.mark.parametrize("key", ["reward", "judge"])
def test_a_scorer_that_fails_ends_the_run_and_costs_nothing_that_was_learned(key, recipe_of, held_out, rewards, capfd):
    """It fails at its fourth call: in the fourth iteration, or at the evaluation after the third."""
    more = {"eval_data": held_out, "eval_every": 1} if key == "judge" else {}
    keys = {"save_every": 100, "max_steps": 6, key: f"{rewards}:broken", **more}
    path = recipe_of(**keys)
    with restored_signals():
        assert leaving(ppo.main, path) == 2
    output = "".join(capfd.readouterr())
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith(f"ppo.{key}")]
    assert f"{rewards}:broken gave nan for an answer to " in line
    assert "house_style_" in line, "the row is named"
    assert (Path(path).parent / "ppo" / "checkpoints" / "checkpoint-3" / "manifest.json").exists()
    Path(rewards).write_text(Path(rewards).read_text().replace("== 4", "== 400"))
    resumed = run_stage(path, resume=True)
    whole = run_stage(recipe_of("whole", **(keys | {key: f"{rewards}:flat"})))
    assert_alike(logged(whole), logged(resumed))
