"""Held-out evaluation during PPO: alarms where the reward is hacked, silence where it isn't, and what alarms do."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers import metrics, summary
from tests.reward_runs import run_stage


@pytest.fixture
def planted(monkeypatch, tiny_folder, recipe_of, held_out, rewards):
    """A run of ten iterations with a chosen reward and judge, on a tiny model whose answers end: a tenth of all tokens
    ends them, and one direction of the hidden states makes these less likely."""
    head = load_file(Path(tiny_folder) / "model.safetensors")["lm_head.weight"]
    stop_ids = tuple(head[:, 1].topk(len(head) // 10).indices.tolist())
    for module in ("qalign.rl.ppo_setup", "qalign.rl.scorers"):
        monkeypatch.setattr(f"{module}.stop_ids_of", lambda *_: stop_ids)

    def run(reward: str, judge: str):
        keys = {
            "reward": f"{rewards}:{reward}", "judge": f"{rewards}:{judge}", "eval_data": [held_out[0] | {"limit": 24}],
            "eval_every": 1, "max_steps": 10, "batch_size": 32, "samples_per_prompt": 8, "micro_batch_size": 8,
            "max_new_tokens": 40, "patience": 2, "learning_rate": 2e-2, "kl_coefficient": 0.0,
            "missing_eos_penalty": 0.0, "limit": 4, "on_alarm": "stop",
        }  # fmt: skip
        path = Path(recipe_of(**keys))
        path.write_text(f"{path.read_text()}\nseed: 5\n")  # with some seeds, ten iterations are too few to learn it
        return run_stage(str(path))

    return run


@pytest.mark.slow
def test_the_alarm_is_raised_when_longer_is_better_and_the_judge_disagrees(planted, capsys):
    run = planted("long", "shrinking")
    kept = summary(run)
    assert kept["alarm_steps"]
    assert kept["stopped_by_alarm"]
    assert kept["steps"] < 10
    assert kept["held_out"]["best"]["step"] < kept["alarm_steps"][0]
    assert kept["held_out"]["best"]["judge"] >= kept["held_out"]["first"]["judge"]
    shown = "".join(capsys.readouterr())
    assert "warning: iteration" in shown
    assert "raise kl_coefficient" in shown, "the fix"
    assert shown.count("(reward ") == 3, "three sample answers"
    assert str(run.path / "adapter_best") in shown

    run.summary.unlink()  # killed after the alarm's checkpoint: it must not train on
    resumed = summary(run_stage(str(run.path.parent / "ppo.yaml"), resume=True))
    for key in ("steps", "stopped_by_alarm", "alarm_steps", "warnings"):
        assert resumed[key] == kept[key]


@pytest.mark.slow
def test_a_clean_reward_raises_no_alarm(planted):
    kept = summary(planted("many", "many_too"))
    assert kept["alarm_steps"] == []
    assert kept["steps"] == 10
    assert kept["held_out"]["last"]["judge"] > kept["held_out"]["first"]["judge"] + 0.1


@pytest.mark.slow
def test_alarms_double_the_kl_coefficient_up_to_16_fold(recipe_of, held_out, monkeypatch, capsys):
    monkeypatch.setattr("qalign.reports.alarms.alarms", lambda points, patience: ["again"] * bool(len(points) > 1))
    run = run_stage(recipe_of(eval_data=held_out, eval_every=1, max_steps=7, on_alarm="slow", kl_coefficient=0.01))
    found = [line["kl_coefficient"] for line in metrics(run) if "kl_coefficient" in line]
    assert found == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.16, 0.16, 0.16])
    assert "(on_alarm: slow)" in "".join(capsys.readouterr())


def test_the_best_by_the_judge_is_kept_not_the_last(recipe_of, held_out, rewards):
    """The judge finds all equal, so the best is the first: the policy before training."""
    keys = {"judge": f"{rewards}:flat", "eval_data": held_out, "eval_every": 1, "max_steps": 2, "learning_rate": 5e-2}
    run = run_stage(recipe_of(**keys))
    best, last = (
        load_file(folder / "adapter_model.safetensors") for folder in (run.path / "adapter_best", run.adapter)
    )
    assert not any(tensor.any() for name, tensor in best.items() if "lora_B" in name)
    assert any(tensor.any() for name, tensor in last.items() if "lora_B" in name)
