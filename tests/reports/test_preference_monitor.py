"""Held-out answers during DPO on a tiny model: when they are sampled, that sampling changes nothing, and resuming."""

import json
import random
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from qalign.config.stages import DPO
from qalign.data.store.sequences import TokenAnswers
from qalign.errors import Stopped
from qalign.model.base import Base, Role
from qalign.model.generation import TransformersEngine
from qalign.reports import preference_monitor
from qalign.reports.preference_monitor import PreferenceMonitor, sampling_plan
from qalign.train.run_folder import RunFolder
from tests.conftest import FIXTURES
from tests.families import family
from tests.helpers import TEST, metrics, slow, summary
from tests.reward_runs import run_stage, write_recipe
from tests.train.runs import WEIGHTS
from tests.train.talks import write_kind

HELD_OUT = {"path": TEST, "limit": 9}
KEYS = {"eval_data": HELD_OUT, "limit": 20, "lora": {"dropout": 0.1}, "save_every": 100}
SAMPLED = {"sample_prompts": 5, "sample_every": 2, "max_new_tokens": 12}


def sampled_lines(run) -> list[dict]:
    return [line for line in metrics(run) if "eval_samples_kl" in line or "eval_samples_rows" in line]


def settings(**keys) -> DPO:
    return DPO(data="org/pairs", eval_data="org/others", **keys)


@pytest.mark.parametrize(
    ("keys", "cost", "steps", "prompts"),
    [
        # 100 steps that cost 1,000 in all, of which a tenth may be spent.
        ({}, 10.0, {0, 20, 40, 60, 80, 100}, 24),
        ({}, 25.0, {0, 34, 68, 100}, 24),
        ({}, 50.0, {0, 100}, 24),
        ({}, 51.0, set(), 0),
        ({"sample_every": 50}, 33.0, {0, 50, 100}, 24),
        ({"sample_every": 50}, 34.0, set(), 0),
        ({"sample_every": 500}, 50.0, {0, 100}, 24),
        ({"sample_prompts": 24}, 999.0, {0, 20, 40, 60, 80, 100}, 24),
        ({"sample_prompts": 24, "sample_every": 40}, 999.0, {0, 40, 80, 100}, 24),
        ({"sample_prompts": 0}, 1.0, set(), 0),
    ],
)
def test_when_to_sample_by_hand(keys, cost, steps, prompts):
    plan = sampling_plan(settings(**keys), "dpo", 100, 24, 1000.0, cost)
    assert (plan.steps, plan.prompts) == (steps, prompts)


def test_what_was_decided_is_said():
    def words(cost: float, **keys) -> str:
        return sampling_plan(settings(**keys), "dpo", 100, 24, 1000.0, cost).words

    assert words(10.0) == (
        "24 held-out prompts before, every 20 steps and after, at most 6% of the run's cost "
        "(dpo.sample_prompts=0: none)"
    )
    assert words(50.0).startswith("24 held-out prompts before and after, at most 10%")
    assert words(300.0) == (
        "none: 24 prompts before and after may cost 60% of the run; dpo.sample_prompts=24 samples all the same"
    )
    assert not words(10.0, sample_prompts=0)
    assert not sampling_plan(DPO(data="org/pairs"), "dpo", 100, 0, 1000.0, 1.0).words
    assert sampling_plan(settings(), "dpo", 9, 0, 1000.0, 1.0).words.startswith("none: no held-out prompt leaves 256")


@pytest.mark.parametrize(("stage", "rows", "logging_steps"), [("dpo", 20, 3), slow("kto", 10, 1)])
def test_sampling_changes_no_number_of_the_run(tiny_folder, tmp_path, monkeypatch, stage, rows, logging_steps):
    """With dropout, so that the state of the random generators counts."""
    states, look = [], PreferenceMonitor.look

    def recorded(self, step):
        before = torch.get_rng_state(), random.getstate(), self.base.role
        look(self, step)
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1:] == (random.getstate(), self.base.role)
        states.append(before[0])

    monkeypatch.setattr(PreferenceMonitor, "look", recorded)
    keys = KEYS | {"limit": rows, "trainer": {"logging_steps": logging_steps}}
    plain = run_stage(write_recipe(tmp_path / "plain", tiny_folder, stage, **keys))
    watched = run_stage(write_recipe(tmp_path / "watched", tiny_folder, stage, **keys, **SAMPLED))
    assert len(states) == 2 * 6
    assert all(torch.equal(one, other) for one, other in zip(states[:6], states[6:], strict=True))
    one, other = (load_file(run.adapter / WEIGHTS) for run in (plain, watched))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    trained = [
        [{name: value for name, value in line.items() if name != "tokens_per_second"}
         for line in metrics(run) if "loss" in line]
        for run in (plain, watched)
    ]  # fmt: skip
    assert trained[0] == trained[1]
    assert [line["step"] for line in sampled_lines(watched)] == [0, 2, 4, 5]
    assert not sampled_lines(plain)


@pytest.mark.parametrize("kind", ["lfm2", slow("falcon")])
def test_families_with_other_layouts_are_sampled_with_their_own_attention(kind, tmp_path):
    """Layers without attention have hooks while packed rows run; a family that can't run packed rows has none."""
    base = str(tmp_path / "base")
    if kind == "falcon":
        tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / "llama3")
        family(kind, len(tokenizer), dtype=torch.float32, spread=0.1).save_pretrained(base)
        tokenizer.save_pretrained(base)
    else:
        write_kind(kind, base)
    keys = {"eval_data": HELD_OUT, "limit": 8}
    runs = [
        run_stage(write_recipe(tmp_path / name, base, "dpo", **keys, **more))
        for name, more in (("plain", {}), ("watched", SAMPLED))
    ]
    one, other = (load_file(run.adapter / WEIGHTS) for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [line["eval_samples_kl"] for line in sampled_lines(runs[1])][:1] == [pytest.approx(0, abs=1e-5)]


def test_what_is_measured(tiny_folder, tmp_path, monkeypatch, capsys):
    """KL is 0 before training; later it is that of whole rows alone, by the model's own logits. The figures of pairs
    are those of `evaluate`, and every evaluation draws the same random numbers."""
    seen, kls = Counter(), []
    generate, kl = TransformersEngine.generate, PreferenceMonitor._kl

    def counting(self, base, role, prompts, sampling, *, num_samples, seed):
        seen[role, sampling.temperature, sampling.top_p, seed, len(prompts)] += 1
        return generate(self, base, role, prompts, sampling, num_samples=num_samples, seed=seed)

    def by_hand(self, found):
        self.base.model.eval()
        with self.base.packing.left(self.base.lm), torch.no_grad():
            rows = [TokenAnswers(row.prompt_ids, (ids,)) for row, (ids,) in zip(self.prompts, found, strict=True)]
            kls.append(sum(alone(self.base, Role.POLICY, row) - alone(self.base, Role.REFERENCE, row) for row in rows))
        return kl(self, found)

    monkeypatch.setattr(TransformersEngine, "generate", counting)
    monkeypatch.setattr(PreferenceMonitor, "_kl", by_hand)
    run = run_stage(write_recipe(tmp_path, tiny_folder, "dpo", **KEYS | {"eval_every": 4}, **SAMPLED))
    assert seen == {(Role.POLICY, 1.0, 1.0, 0, 5): 4}
    lines = sampled_lines(run)
    assert lines[0]["eval_samples_kl"] == 0
    assert [line["eval_samples_kl"] for line in lines] == pytest.approx([total / 5 for total in kls], abs=1e-4)
    assert abs(kls[-1]) > 0.01
    evaluated, _ = [line for line in metrics(run) if "eval_loss" in line]  # of steps 4 and 5
    for name in ("logps/chosen", "rewards/accuracies", "rewards/margins"):
        assert lines[2][f"eval_samples_{name}"] == pytest.approx(evaluated[f"eval_{name}"], abs=1e-4)
    kept = summary(run)
    assert kept["held_out"]["last"]["chosen_logps"] == lines[-1]["eval_samples_logps/chosen"]
    assert (kept["alarm_steps"], kept["warnings"]) == ([], [])
    for name in ("dpo_report.png", "samples/step-0.jsonl", "samples/step-5.jsonl"):
        assert (run.path / name).is_file()
    sample = json.loads((run.path / "samples" / "step-5.jsonl").read_text().splitlines()[0])
    assert sample.keys() == {"prompt", "completion", "tokens", "ended", "looping", "where"}
    assert sample["tokens"] <= 12
    assert "held_out.last.kl_nats" in (run.adapter / "README.md").read_text()
    shown = "".join(capsys.readouterr())
    assert "sampling       5 held-out prompts before, every 2 steps and after" in shown
    assert shown.count("5 sampled answers: KL ") == 4


def alone(base: Base, role: str, row: TokenAnswers) -> float:
    """The log-prob of an answer in a row of its own."""
    (answer,) = row.answers
    with base.acting_as(role) as lm:
        logps = lm(input_ids=torch.tensor([row.prompt_ids + answer])).logits[0, :-1].double().log_softmax(dim=-1)
    return logps[-len(answer) :].gather(1, torch.tensor(answer)[:, None]).sum().item()


@pytest.mark.parametrize("keys", [{}, {"eval_data": HELD_OUT}, {"eval_data": HELD_OUT, "sample_prompts": 0}])
def test_nothing_is_sampled_without_held_out_rows_or_where_it_costs_too_much(
    keys, tiny_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(TransformersEngine, "generate", lambda *_, **__: pytest.fail("it sampled"))
    run = run_stage(write_recipe(tmp_path, tiny_folder, "dpo", **keys))
    assert not (run.path / "dpo_report.png").exists()
    assert "held_out" not in summary(run)
    assert ("sampling       none: 9 prompts before and after may cost" in capsys.readouterr().out) == (len(keys) == 1)


@pytest.mark.parametrize(
    ("loss", "beta"),
    [("orpo", 0.1), *(slow(*loss) for loss in (("simpo", 2.0), ("ipo", 0.1)))],
)
def test_every_loss_is_sampled_and_one_without_a_reference_has_no_kl(loss, beta, tiny_folder, tmp_path):
    run = run_stage(write_recipe(tmp_path, tiny_folder, "dpo", loss=loss, beta=beta, **KEYS, **SAMPLED))
    lines = sampled_lines(run)
    assert [line["step"] for line in lines] == [0, 2, 4, 5]
    assert all(("eval_samples_kl" in line) == (loss == "ipo") for line in lines)
    assert all("eval_samples_rewards/accuracies" in line for line in lines)


def test_alarms_are_said_with_the_worst_answers(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preference_monitor, "alarms", lambda points, *_, **__: ["it loops"] * (len(points) > 2))
    run = run_stage(write_recipe(tmp_path, tiny_folder, "dpo", **KEYS, **SAMPLED))
    shown = "".join(capsys.readouterr())
    assert "warning: step 4: it loops" in shown
    assert "warning: step 2" not in shown
    assert shown.count("' → '") == 2 * 2, "two answers at each of two alarms"
    assert summary(run)["alarm_steps"] == [4, 5]
    assert summary(run)["warnings"] == ["it loops"]


def test_memory_that_runs_out_ends_no_run(tiny_folder, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(TransformersEngine, "generate", full)
    run = run_stage(write_recipe(tmp_path, tiny_folder, "dpo", **KEYS, **SAMPLED))
    assert summary(run)["steps"] == 5
    assert "held_out" not in summary(run)
    assert "step 2: no memory is left to sample" in "".join(capsys.readouterr())


RESUMED = KEYS | SAMPLED | {"save_every": 2, "eval_every": 2}


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    return run_stage(write_recipe(tmp_path_factory.mktemp("whole"), tiny_folder, "dpo", **RESUMED))


CUTS = ("in the first", "in one at a checkpoint", "after one was logged", "in the last", "after the last")


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS)
def test_a_run_that_was_killed_repeats_the_same_evaluations(cut, whole, tiny_folder, tmp_path, monkeypatch):
    """A checkpoint is written before the evaluation of its step."""
    path = write_recipe(tmp_path, tiny_folder, "dpo", **RESUMED)
    place = {"in the first": 0, "in one at a checkpoint": 2, "in the last": 5, "after one was logged": 4}.get(cut)
    evaluate, say, finish = PreferenceMonitor._evaluate, PreferenceMonitor._say, RunFolder.finish

    def dying(call, at):
        def instead(self, first, *more, **named):
            if at is None or getattr(first, "step", first) == at:
                raise Stopped(9)
            return call(self, first, *more, **named)

        return instead

    with monkeypatch.context() as patch:
        if cut.startswith("in"):
            patch.setattr(PreferenceMonitor, "_evaluate", dying(evaluate, place))
        elif place:
            patch.setattr(PreferenceMonitor, "_say", dying(say, place))
        else:
            patch.setattr(RunFolder, "finish", dying(finish, None))
        with pytest.raises(Stopped):
            run_stage(path)
    resumed = run_stage(path, resume=True)
    clock = ("tokens_per_second", "eval_runtime")
    lines = [
        [{name: value for name, value in line.items() if name not in clock} for line in metrics(run)]
        for run in (resumed, whole)
    ]
    assert lines[0] == lines[1]
    for name in ("held_out", "alarm_steps", "steps"):
        assert summary(resumed)[name] == summary(whole)[name]
    one, other = (load_file(run.adapter / WEIGHTS) for run in (resumed, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)
    for file in (whole.path / "samples").iterdir():
        assert (resumed.path / "samples" / file.name).read_bytes() == file.read_bytes()
