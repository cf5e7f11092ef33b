"""`python -m qalign.evaluate`: its figures against a count pair by pair, and what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qalign import evaluate
from qalign.config.load import load as load_recipe
from qalign.config.recipe import Lora, Model
from qalign.config.stages import DPO, Source
from qalign.data.formats import labelled_answers
from qalign.errors import UserError
from qalign.evaluate import paired
from qalign.judge.measures import held_out
from qalign.model.base import Role, load
from tests.families import alone
from tests.helpers import TEST, TRAIN, house_style, leaving, metrics, scramble, train
from tests.reward_runs import run_stage, write_recipe


@pytest.fixture
def base(tiny_folder):
    base = load(Model(base=tiny_folder, compute_dtype="float32"))
    base.add_adapter(Role.POLICY, Lora(r=4))
    scramble(base)
    return base


def test_figures_equal_a_count_pair_by_pair(base):
    pairs = house_style(base.tokenizer, 9)
    found = held_out.of_pairs(base, pairs, DPO(data="x", beta=0.5))
    before = after = right = gained = lost = 0
    margins = []
    base.model.eval()
    for pair in pairs:
        (chosen, rejected), logps = (len(pair.chosen_ids), len(pair.rejected_ids)), {}
        for role in Role:
            with torch.no_grad(), base.acting_as(role) as lm:
                logps[role] = alone(lm, [pair])[0].tolist()
        prefers = [logps[role][0] / chosen > logps[role][1] / rejected for role in (Role.REFERENCE, Role.POLICY)]
        before, after = before + prefers[0], after + prefers[1]
        gained, lost = gained + (prefers == [False, True]), lost + (prefers == [True, False])
        gains = [after - before for after, before in zip(logps[Role.POLICY], logps[Role.REFERENCE], strict=True)]
        margins.append(0.5 * (gains[0] - gains[1]))
        right += margins[-1] > 0
    assert found["pairs"] == 9
    assert found["accuracy_before"] == pytest.approx(before / 9)
    assert found["accuracy_after"] == pytest.approx(after / 9)
    assert (found["pairs_gained"], found["pairs_lost"]) == (gained, lost)
    assert gained + lost
    assert found["reward_accuracy"] == pytest.approx(right / 9)
    assert found["reward_margin"] == pytest.approx(sum(margins) / 9, rel=1e-4)
    assert 0 < found["accuracy_after"] < 1, "if every pair agrees, the test shows nothing"


@pytest.mark.parametrize(
    ("loss", "reward"),
    [
        ("ipo", lambda policy, reference, tokens: (policy - reference) / tokens),
        ("sigmoid_norm", lambda policy, reference, tokens: (policy - reference) / tokens),
        ("simpo", lambda policy, _, tokens: policy / tokens),
        ("orpo", lambda policy, _, tokens: policy / tokens),
        ("hinge", lambda policy, reference, _: policy - reference),
    ],
)
def test_a_run_is_judged_by_the_reward_that_its_loss_trains(base, loss, reward):
    pairs = house_style(base.tokenizer, 9)
    with torch.no_grad():
        logps = []
        for role in (Role.POLICY, Role.REFERENCE):
            with base.acting_as(role) as lm:
                logps.append(alone(lm, pairs))
    tokens = torch.tensor([[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in pairs])
    rewards = 2.0 * reward(*logps, tokens)
    margins = rewards[:, 0] - rewards[:, 1]
    found = held_out.of_pairs(base, pairs, DPO(data="x", beta=2.0, loss=loss))
    assert found["reward_margin"] == pytest.approx(margins.mean().item(), rel=1e-4)
    assert found["reward_accuracy"] == pytest.approx((margins > 0).double().mean().item())
    assert 0 < found["reward_accuracy"] < 1, "if every pair agrees, the test shows nothing"


def test_a_tie_counts_a_half_and_gains_nothing(base):
    pairs = house_style(base.tokenizer, 9)
    likely = [0.5, 0.9, 0.5, 1.0, 0.6, 1.0, 1.0, 0.5, 1.0]
    soft = [replace(pair, chosen_probability=p) for pair, p in zip(pairs, likely, strict=True)]
    settled = [pair for pair, p in zip(pairs, likely, strict=True) if p != 0.5]
    found, of_settled = (held_out.of_pairs(base, some, DPO(data="x")) for some in (soft, settled))
    for name in ("accuracy_before", "accuracy_after", "reward_accuracy"):
        assert found[name] == pytest.approx((6 * of_settled[name] + 3 * 0.5) / 9), name
    for name in ("pairs_gained", "pairs_lost"):
        assert found[name] == of_settled[name], name


@pytest.mark.parametrize("loss", ["simpo", "ipo", "aot", {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}])
def test_the_figures_of_a_run_are_those_it_logged_last(recipe_file, loss, monkeypatch):
    monkeypatch.setattr("qalign.judge.measures.held_out.MAX_NEW_TOKENS", 2)
    run = train(recipe_file(loss=loss, eval_data={"path": TEST, "limit": 8}, eval_every=3, max_steps=3))
    evaluate.report(run.recipe)
    kept, logged = json.loads((run.path / "evaluation.json").read_text()), metrics(run)[-1]
    assert kept["reward_margin"] == pytest.approx(logged["eval_rewards/margins"], rel=1e-4)
    assert kept["reward_accuracy"] == pytest.approx(logged["eval_rewards/accuracies"])


def test_the_report_of_a_run(recipe_file, capsys, monkeypatch):
    monkeypatch.setattr("qalign.judge.measures.held_out.MAX_NEW_TOKENS", 5)
    run = train(recipe_file(eval_data=TEST, max_steps=3))
    capsys.readouterr()
    evaluate.report(run.recipe)
    said = capsys.readouterr().out
    assert "72 held-out pairs" in said
    assert [said.count(f"\n{word} ") for word in ("prompt", "base", "aligned")] == [3, 3, 3]
    kept = json.loads((run.path / "evaluation.json").read_text())
    assert kept["pairs"] == 72
    assert f"{kept['accuracy_before']:.1%}" in said
    assert f"{kept['reward_accuracy']:.1%}" in said
    answers = kept["answers"]
    assert answers["before"]["answers"] == answers["after"]["answers"] == held_out.ANSWERED
    assert answers["max_new_tokens"] == 5
    assert answers["after"]["ended"] == 0.0, "a random model doesn't end an answer in five tokens"
    assert answers["after"]["length"] == 5.0
    assert "0% → 0%" in said
    assert "\n  verdict " in said


def test_a_run_from_sft_is_measured_against_it_and_answers_beside_the_base(recipe_file, capsys, monkeypatch):
    monkeypatch.setattr("qalign.judge.measures.held_out.MAX_NEW_TOKENS", 3)
    parent = train(recipe_file(output="parent", max_steps=1)).adapter
    run = train(recipe_file(start_from=str(parent), max_steps=1, eval_data={"path": TEST, "limit": 7}))
    capsys.readouterr()
    evaluate.report(run.recipe)
    said = capsys.readouterr().out
    assert [said.count(f"\n{word} ") for word in ("prompt", "base", "SFT", "aligned")] == [3, 3, 3, 3]
    assert json.loads((run.path / "evaluation.json").read_text())["answers"]["before"]["answers"] == 7


@pytest.mark.parametrize("change", [{"beta": 0.3}, {"loss": "ipo"}, {"model": {"double_quant": False}}])
def test_another_recipe_than_the_runs_is_refused(recipe_file, change):
    train(recipe_file(eval_data=TEST, max_steps=1))
    with pytest.raises(UserError, match="was trained with another"):
        evaluate.report(load_recipe(recipe_file(eval_data=TEST, max_steps=1, **change)))


@pytest.mark.parametrize("word", ["seed=7", "dpo.holdout=0.2", "dpo.limit=20", "dpo.data.skip=2"])
def test_rows_that_were_trained_on_never_count_as_held_out(recipe_file, word):
    train(path := recipe_file(holdout=0.4, max_steps=1))
    recipe = load_recipe(path)
    if word.startswith("dpo.data"):
        word = f"dpo.data={{path: {recipe.dpo.data[0].path}, skip: 2}}"
    with pytest.raises(UserError, match="was trained with another"):
        evaluate.report(load_recipe(path, [word]))


def test_a_missing_adapter_or_missing_held_out_rows_are_named(recipe_file):
    with pytest.raises(UserError, match=r"there is no adapter yet; train it with python -m qalign\.dpo"):
        evaluate.report(load_recipe(recipe_file(eval_data=TEST)))
    run = train(recipe_file(max_steps=1))
    with pytest.raises(UserError, match=r"dpo\.eval_data: .+; add them to the recipe"):
        evaluate.report(run.recipe)


def test_held_out_rows_that_cannot_be_measured_are_named(recipe_file, write_jsonl, capsys, monkeypatch):
    monkeypatch.setattr("qalign.judge.measures.held_out.MAX_NEW_TOKENS", 1)
    trained = Path(TRAIN).read_text().splitlines()[0]
    good = [json.loads(line) for line in (*Path(TEST).read_text().splitlines()[:2], trained)]
    held_out = write_jsonl("held_out.jsonl", [*good, "{broken", good[0] | {"chosen": "a<|eot_id|>b"}])
    run = train(recipe_file(max_steps=1))
    capsys.readouterr()
    evaluate.report(load_recipe(recipe_file(max_steps=1, eval_data=held_out)))
    said = capsys.readouterr()
    assert f"{run.adapter} on 3 held-out pairs" in said.out
    assert said.out.startswith("overlap: 1 rows of eval_data are in data too: they don't measure what was learned\n")
    refusals = [line for line in said.err.splitlines() if line.startswith("refused: ")]
    assert [line.split(": ")[1] for line in refusals] == [f"{held_out}:4", f"{held_out}:5"]


def test_the_same_base_by_another_path_is_accepted(recipe_file, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("qalign.judge.measures.held_out.MAX_NEW_TOKENS", 1)
    shutil.copytree(tiny_folder, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    keys = {"max_steps": 1, "model": {"base": "model"}, "eval_data": {"path": TEST, "limit": 2}}
    run = train(recipe_file(**keys))
    path = recipe_file(**keys)
    monkeypatch.chdir("/")
    evaluate.report(load_recipe(path))
    assert (run.path / "evaluation.json").is_file()


def test_a_reference_that_was_trained_again_is_refused(recipe_file, tmp_path):
    """The figures would be those of an adapter that the run never used."""
    parent = train(recipe_file(output="parent", max_steps=1)).adapter
    keys = {"start_from": str(parent), "max_steps": 1, "eval_data": {"path": TEST, "limit": 2}}
    train(recipe_file(**keys))
    train(recipe_file(output="parent", max_steps=2), overwrite=True)
    with pytest.raises(
        UserError, match=r"runs/dpo: started from an adapter \w{16}, but \S+/parent/dpo/adapter is \w{16} now"
    ):
        evaluate.report(load_recipe(recipe_file(**keys)))


def test_a_kto_run_is_measured_on_pairs_of_good_and_bad_answers(
    tiny_folder, tmp_path, write_jsonl, monkeypatch, capsys
):
    """The held-out pairs, and two answers to one prompt in rows of their own; a lone answer has nothing beside it."""
    monkeypatch.setattr("qalign.judge.measures.held_out.MAX_NEW_TOKENS", 2)
    pairs = [json.loads(line) for line in Path(TEST).read_text().splitlines()[:4]]
    asked = {"prompt": "Why is that?", "label": True, "completion": "Because it is."}
    single = [asked, asked | {"label": False, "completion": "No."}, asked | {"prompt": "Alone?"}]
    held_out = write_jsonl("held_out.jsonl", [*pairs, *single])
    path = write_recipe(tmp_path / "run", tiny_folder, "kto", eval_data=held_out, max_steps=2, beta=0.5)
    run = run_stage(path)
    capsys.readouterr()
    assert leaving(evaluate.main, path) == 0
    kept = json.loads((run.path / "evaluation.json").read_text())
    assert (kept["pairs"], kept["stage"], kept["loss"]) == (5, "kto", "kto")
    assert f"{run.adapter} on 5 held-out pairs" in capsys.readouterr().out

    rows, _ = labelled_answers((Source(path=held_out),), "train", None, seed=0)
    found = [(row.prompt[-1]["content"], row.chosen["content"], row.rejected["content"]) for row in paired(rows)]
    wanted = [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs]
    assert found == [*wanted, ("Why is that?", "Because it is.", "No.")]


def test_single_answers_to_different_prompts_are_measured_as_kto_measures_them(
    tiny_folder, tmp_path, write_jsonl, monkeypatch, capsys
):
    """What the trainer measured at the end of the run stands in its summary, in several groups of `batch_size` rows."""
    monkeypatch.setattr("qalign.judge.measures.held_out.MAX_NEW_TOKENS", 2)
    rows = [{"prompt": f"{n}?", "completion": f"It is {n}.", "label": n % 3 == 0} for n in range(7)]
    keys = {"max_steps": 3, "learning_rate": 0.01, "batch_size": 4, "undesirable_weight": 0.5}
    held_out = write_jsonl("rows.jsonl", rows)
    run = run_stage(path := write_recipe(tmp_path / "run", tiny_folder, "kto", eval_data=held_out, **keys))
    wanted = json.loads(run.summary.read_text())["measured"]
    assert f"next           python -m qalign.evaluate {path}" in capsys.readouterr().out

    assert leaving(evaluate.main, path) == 0

    kept, said = json.loads((run.path / "evaluation.json").read_text()), capsys.readouterr().out
    desirable, undesirable = kept["rewards"]["desirable"], kept["rewards"]["undesirable"]
    assert (kept["rows"], desirable["answers"], undesirable["answers"], kept["loss"]) == (7, 3, 4, "kto")
    assert kept["loss_change"]["before"] == pytest.approx((3 * 0.5 + 4 * 0.25) / 7)
    assert kept["loss_change"]["after"] == pytest.approx(wanted["eval_loss"], rel=1e-3)
    assert (desirable["before"], undesirable["before"]) == (0, 0)
    assert desirable["after"] == pytest.approx(wanted["eval_rewards/chosen"], abs=1e-4)
    assert undesirable["after"] == pytest.approx(wanted["eval_rewards/rejected"], abs=1e-4)
    assert abs(desirable["after"]) > 1e-2, "the test shows nothing of a policy that hasn't moved"
    assert f"{run.adapter} on 7 held-out answers" in said
    assert "4 undesirable answers" in said
