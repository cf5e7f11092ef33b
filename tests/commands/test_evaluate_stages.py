"""`python -m qalign.evaluate` for SFT, reward models, PPO and best_of, and the alignment tax: figures against what the
runs logged and against plain transformers."""

import json
import math

import pytest
import torch

from qalign import evaluate
from qalign.config.load import load as load_recipe
from qalign.config.recipe import Lora, Model
from qalign.config.stages import Source
from qalign.data.formats import dialogues
from qalign.data.store.sequences import IGNORED, TokenDialogue
from qalign.data.tokenize import encode_dialogues
from qalign.errors import UserError
from qalign.judge.measures import held_out
from qalign.model import lineage
from qalign.model.base import Role, load
from qalign.reports.answers import change, verdict
from qalign.train.processes.world import World, entered
from tests.helpers import TEST, leaving, metrics, refusal, scramble, summary
from tests.reward_runs import DATA, run_stage, write_recipe

DIALOGUES = str(DATA / "house_style_dialogues_test.jsonl")
REWARDS = "def words(completions):\n    return [float(len(set(text))) for text in completions]\n"
NO_ANSWERS = {"answers": 4, "ended": 1.0, "looping": 0.0, "length": 5.0}


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(held_out, "MAX_NEW_TOKENS", 3)


def kept(run) -> dict:
    return json.loads((run.path / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def sft_run(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "runs"
    held = {"eval_data": {"path": DIALOGUES, "limit": 6}, "max_steps": 3}
    path = write_recipe(folder, tiny_folder, "sft", **held)
    return path, run_stage(path)


@pytest.fixture(scope="module")
def ppo_run(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo") / "runs"
    folder.mkdir(parents=True)
    (folder / "mine.py").write_text(REWARDS)
    keys = {"reward": f"{folder / 'mine.py'}:words", "eval_data": {"path": TEST, "limit": 5}, "samples_per_prompt": 2}
    keys |= {"max_new_tokens": 6, "max_steps": 2, "batch_size": 4, "scheduler": "constant", "kl_stop": None}
    path = write_recipe(folder, tiny_folder, "ppo", model={"max_length": 256}, **keys)
    return path, run_stage(path)


def test_the_loss_of_dialogues_is_that_of_plain_transformers(tiny_folder):
    base = load(Model(base=tiny_folder, compute_dtype="float32"))
    base.add_adapter(Role.POLICY, Lora(r=4))
    scramble(base)
    rows, _ = dialogues((Source(path=DIALOGUES),), "train", 7, seed=0)
    rows, refused = encode_dialogues(base.template, rows, 512)
    assert not refused
    rows.append(TokenDialogue([5, 6, 7, 8], [IGNORED, 6, IGNORED, 8], "two of its tokens count"))
    losses, right, tokens = {}, {}, 0
    for role in (Role.BASE, Role.POLICY):
        total, hits, tokens = 0.0, 0, 0
        for row in rows:
            with torch.no_grad(), base.acting_as(role) as lm:
                logits = lm(input_ids=torch.tensor([row.ids])).logits[0, :-1].double()
            labels = torch.tensor(row.labels[1:])
            counted = labels != IGNORED
            total -= logits.log_softmax(-1)[counted].gather(1, labels[counted, None]).sum().item()
            hits += (logits[counted].argmax(-1) == labels[counted]).sum().item()
            tokens += int(counted.sum())
        losses[role], right[role] = total / tokens, hits / tokens
    found = held_out.of_dialogues(base, rows, Role.BASE)
    assert (found["rows"], found["tokens"]) == (len(rows), tokens)
    assert found["loss"]["before"] == pytest.approx(losses[Role.BASE], rel=1e-5)
    assert found["loss"]["after"] == pytest.approx(losses[Role.POLICY], rel=1e-5)
    assert found["loss"]["change"] == pytest.approx(losses[Role.POLICY] - losses[Role.BASE], abs=1e-5)
    assert found["perplexity"]["after"] == pytest.approx(math.exp(losses[Role.POLICY]), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx({"before": right[Role.BASE], "after": right[Role.POLICY]})
    assert losses[Role.BASE] != pytest.approx(losses[Role.POLICY], abs=1e-2), "the test would show nothing"


def test_a_change_is_a_weighted_mean_and_its_interval_a_bootstrap():
    found = change([1.0, 2.0, 4.0], [2.0, 2.0, 1.0], [1, 1, 2])
    assert (found["before"], found["after"], found["change"]) == (2.75, 1.5, -1.25)
    low, high = found["interval"]
    assert low == -3.0, "a resample of the last row alone"
    assert 0 < high <= 1.0
    assert change([0.0] * 9, [0.5] * 9)["interval"] == [0.5, 0.5], "rows that all change alike leave no doubt"
    differences = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = change([0.0] * 400, differences.tolist())["interval"]
    error = differences.std().item() / 20
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_an_sft_run_is_measured_by_the_loss_that_it_logged_last(sft_run, capsys):
    path, run = sft_run
    capsys.readouterr()
    assert leaving(evaluate.main, path) == 0
    said, found = capsys.readouterr().out, kept(run)
    assert found["loss"]["after"] == pytest.approx(metrics(run)[-1]["eval_loss"], rel=1e-4)
    assert found["loss"]["before"] != found["loss"]["after"]
    assert found["answers"]["after"]["answers"] == 6
    assert f"{run.adapter} on 6 held-out dialogues" in said
    assert "tax" not in found, "its own held-out rows are no other ones"
    for word in ("perplexity", "verdict", "prompt", "base", "aligned"):
        assert f"\n  {word} " in said or f"\n{word} " in said, word


def test_a_reward_model_is_trusted_as_at_the_end_of_its_training(tiny_folder, tmp_path, capsys):
    held = {"eval_data": {"path": TEST, "limit": 8}, "max_steps": 2, "members": 2, "member_layers": 0.5}
    run = run_stage(path := write_recipe(tmp_path / "runs", tiny_folder, "reward", **held))
    capsys.readouterr()
    assert leaving(evaluate.main, path, "--stage", "reward") == 0
    found, said = kept(run), capsys.readouterr().out
    assert found["trust"]["accuracy"] == summary(run)["trust"]["accuracy"]
    assert found["trust"]["mean_log_loss"] == pytest.approx(summary(run)["trust"]["mean_log_loss"], rel=1e-5)
    assert len(found["trust"]["members"]["accuracy"]) == 2
    assert 0 <= found["accuracy_base"] <= 1
    assert f"{found['accuracy_base']:.1%} → {found['trust']['accuracy']:.1%}" in said
    assert (run.path / "evaluation.png").is_file()
    assert "no alignment tax" in refusal(capsys, evaluate.report, run.recipe, "reward", DIALOGUES)


def test_a_ppo_run_earns_what_its_monitor_saw(ppo_run, capsys):
    path, run = ppo_run
    capsys.readouterr()
    assert leaving(evaluate.main, path, "--dialogues", DIALOGUES) == 0
    found, points = kept(run), [line for line in metrics(run) if "eval_proxy" in line]
    assert found["reward"]["before"] == pytest.approx(points[0]["eval_proxy"])
    assert found["reward"]["after"] == pytest.approx(points[-1]["eval_proxy"])
    assert found["kl_nats"]["after"] == pytest.approx(points[-1]["eval_kl_nats"], abs=1e-4)
    assert found["prompts"] == found["answers"]["after"]["answers"] == 5
    assert found["tax"]["rows_of"] == DIALOGUES
    assert found["tax"]["rows"] == 30
    said = capsys.readouterr().out
    assert "on 5 held-out prompts" in said
    assert f"{found['reward']['before']:+.3f} → {found['reward']['after']:+.3f}" in said
    assert "alignment tax" in said


def test_processes_compare_the_adapters_and_scorers_that_they_measure(ppo_run):
    compared = {}

    class Several(World):
        def connect(self, facts, go_on):
            compared.update(facts)
            raise UserError("no more is needed")

    path, run = ppo_run
    with entered(Several()), pytest.raises(UserError, match="no more"):
        evaluate.report(load_recipe(path, stage="ppo"), "ppo")
    assert compared[str(run.adapter)] == lineage.adapter_hash(run.adapter)
    assert compared["ppo.reward (words)"] is None, "the hash of an adapter; this one is a function"


def test_best_of_without_rounds_is_what_sampling_gained(ppo_run, tmp_path, capsys):
    from qalign.best_of import main

    path, _ = ppo_run
    out = f"output={tmp_path / 'sampled'}"
    assert leaving(main, path, "n=4", "ppo.limit=2", out) == 0
    capsys.readouterr()
    assert leaving(evaluate.main, path, "ppo.limit=2", out, "--stage", "best_of") == 0
    first, *_, last = json.loads((tmp_path / "sampled" / "best_of" / "summary.json").read_text())["held_out"]
    said = capsys.readouterr().out
    assert f"{first['proxy']:+.3f} → {last['proxy']:+.3f}: the best of 1 → of 4" in said
    assert json.loads((tmp_path / "sampled" / "best_of" / "evaluation.json").read_text())["held_out"][-1] == last


def test_an_adapter_that_does_nothing_costs_nothing(tiny_folder):
    base = load(Model(base=tiny_folder, compute_dtype="float32"))
    base.add_adapter(Role.POLICY, Lora(r=4))
    rows, _ = encode_dialogues(base.template, dialogues((Source(path=DIALOGUES),), "train", 4, seed=0)[0], 512)
    tax = {"rows_of": "x.jsonl", **held_out.of_dialogues(base, rows, Role.BASE)}
    assert tax["loss"]["change"] == 0.0
    assert tax["loss"]["interval"] == [0.0, 0.0]
    said = verdict({"stage": "sft", "loss": tax["loss"], "perplexity": tax["perplexity"], "tax": tax})
    assert said[-1] == "no alignment tax shown: +0.000 nats a token on x.jsonl"
    dear = {"before": 1.0, "after": 1.5, "change": 0.5, "interval": [0.4, 0.6]}
    said = verdict({"stage": "sft", "loss": dear, "tax": tax | {"loss": dear}})
    assert said[0].startswith("worse than before, 1.000 → 1.500 nats a token; try fewer sft.epochs")
    assert said[-1] == "alignment tax: dialogues of x.jsonl cost +0.500 nats a token"


def test_a_reward_that_rises_while_the_judge_falls_is_called_hacked():
    rise = {"before": 0.0, "after": 2.0, "change": 2.0, "interval": [1.0, 3.0]}
    fall = {"before": 0.0, "after": -2.0, "change": -2.0, "interval": [-3.0, -1.0]}
    figures = {"stage": "ppo", "reward": rise, "kl_nats": rise}
    assert verdict(figures)[0] == "it learned: held-out reward +0.000 → +2.000, KL 2.00 nats"
    assert "it is hacked" in verdict(figures | {"judge": fall})[0]
    assert verdict(figures | {"reward": fall})[0].endswith("try half the ppo.learning_rate")


def test_what_can_not_be_measured_is_said_at_once(sft_run, ppo_run, tmp_path, capsys, monkeypatch):
    path, _ = sft_run
    assert leaving(evaluate.main, path, "--dialogues", str(tmp_path / "none.jsonl")) == 2
    assert "none.jsonl" in capsys.readouterr().err
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    assert leaving(evaluate.main, path, "--tasks", "arc_easy") == 2
    assert "lm-eval is not installed; pip install 'qalign[tasks]'" in capsys.readouterr().err
    assert leaving(evaluate.main, path, "--limit", "0") == 2
    assert "--limit" in capsys.readouterr().err
    assert leaving(evaluate.main, ppo_run[0], "--stage", "best_of") == 2
    assert "train it with python -m qalign.best_of" in capsys.readouterr().err
