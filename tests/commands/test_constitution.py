"""Constitutional AI: what is written trains, a labeller that can't judge labels nothing, and nothing made is lost."""

import json
import shutil

import pytest
import yaml

from qalign import constitution as module
from qalign import dpo, reward, sft
from qalign.config.load import load
from qalign.constitution import ConstitutionRun, constitute
from qalign.data.formats import canonical, canonical_dialogue, canonical_labelled
from qalign.errors import UserError
from qalign.judge.principles import read_principles
from qalign.train.run_folder import RunFolder
from tests.helpers import SMOLLM2, TEST, TRAIN, leaving

LABELLERS = """
def shorter(prompts, firsts, seconds, principles):
    assert prompts[0][-1]["role"] == "user"
    found = []
    for first, second, name in zip(firsts, seconds, principles):
        gap = len(second) - len(first)
        found.append(0.5 if not gap else 0.2 if gap < 0 else 0.9 if name == "sure" else 0.8)
    return found

def first(prompts, firsts, seconds, principles):
    return [0.9] * len(firsts)

def broken(prompts, firsts, seconds, principles):
    return 1 / 0

def score(prompts, firsts, seconds, principles):
    return [len(first) for first in firsts]
"""
PRINCIPLES = [
    {"name": name, "critique": f"Say {name}.", "revise": f"Be {name}.", "choose": f"The more {name} one."}
    for name in ("kind", "sure", "short")
]


@pytest.fixture
def recipe_path(tmp_path, tiny_folder, monkeypatch) -> str:
    """A recipe for the tiny model, of whose tokens a tenth ends an answer, with the shorter answers as the better."""
    (tmp_path / "mine.py").write_text(LABELLERS)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"principles": PRINCIPLES}))
    human = [{"prompt": f"Why {number}?", "chosen": "a" * (number % 7), "rejected": "b" * 9} for number in range(1, 41)]
    (tmp_path / "human.jsonl").write_text("".join(json.dumps(row) + "\n" for row in human if row["chosen"]))
    stage = {"data": "constitution", "batch_size": 2, "max_steps": 1}
    recipe = {
        "model": {"base": tiny_folder, "compute_dtype": "float32", "max_length": 512},
        "lora": {"r": 4, "alpha": 8},
        "output": str(tmp_path / "runs"),
        "constitution": {
            "data": TRAIN, "limit": 6, "principles": "mine.yaml", "revisions": 2, "candidates": 4,
            "labeller": "mine.py:shorter", "agree_with": "human.jsonl", "max_new_tokens": 12,
        },
        "sft": stage, "reward": stage, "dpo": {**stage, "start_from": "sft"},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr("qalign.model.generation.stop_ids_of", lambda *_: tuple(range(0, 2006, 10)))
    monkeypatch.setattr(module, "ANSWERS_PER_PART", 8)  # several parts
    return str(path)


FILES = ("revisions.jsonl", "pairs.jsonl", "judgements.jsonl")


def made(path: str, *overrides: str, resume: bool = False, overwrite: bool = False):
    """The run, and the rows of each file that it wrote."""
    run = ConstitutionRun(load(path, list(overrides), "constitution"), " ".join([path, *overrides]))
    with run.held():
        run.claim(resume=resume, overwrite=overwrite)
        constitute(run.recipe, run)
    return run, rows_of(run)


def rows_of(run) -> dict[str, list[dict]]:
    files = (run.path / name for name in FILES)
    return {file.name: [json.loads(line) for line in file.read_text().splitlines()] for file in files if file.is_file()}


def summary(run) -> dict:
    return json.loads(run.summary.read_text())


@pytest.mark.pictures
def test_what_it_writes_is_what_the_stages_read(recipe_path, capsys):
    run, rows = made(recipe_path)

    revisions, pairs, judgements = (rows[name] for name in FILES)
    assert len(revisions) > 2
    for row in revisions:
        found = canonical_dialogue(row, "")
        assert found.turns[-1] == {"role": "assistant", "content": row["completion"]}
        assert found.first_trained == len(found.turns) - 1
        assert len(row["principles"]) == len(row["critique_texts"]) == 2
        assert len(set(row["principles"])) == 2, "no principle twice before all were drawn"
    assert len({tuple(row["principles"]) for row in revisions}) > 1, "drawn for each prompt"

    assert len(pairs) > 3
    for row in pairs:
        found = canonical(row, "")
        assert (found.chosen["content"], found.rejected["content"]) == (row["chosen"], row["rejected"])
        assert len(row["chosen"]) < len(row["rejected"])
        # The mean of 3 principles and 2 orders, worked out by hand: 0.8, 0.8 (and 0.9 as the first), 0.8.
        assert found.chosen_probability == row["chosen_probability"] == pytest.approx(0.8 + 0.1 / 6, abs=1e-6)
        assert row["principle"] == "sure"
        assert canonical_labelled(row, "").desirable == (True, False)

    facts = summary(run)
    assert (facts["revisions"], facts["pairs"], facts["judgements"]) == tuple(map(len, rows.values()))
    assert facts["can_judge"] is True
    assert (facts["agreement"]["agreement"], facts["agreement"]["length_agreement"]) == (1.0, 0.0)
    assert len([row for row in judgements if "people" in row]) == 35
    assert (run.path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "this labeller can judge: it agrees with people on 100.0% of 35 pairs" in capsys.readouterr().out

    for stage, train in (("sft", sft.train), ("reward", reward.train), ("dpo", dpo.train)):
        recipe = load(recipe_path, ["max_refused_share=0"], stage)
        trained = RunFolder(recipe, stage)
        train(recipe, trained)
        assert summary(trained)["rows"]["used"] == len(revisions if stage == "sft" else pairs)


def test_a_labeller_that_cannot_judge_writes_no_pairs_unless_forced(recipe_path, capsys, monkeypatch):
    only_first = "constitution.labeller=mine.py:first"
    with pytest.raises(UserError, match=r"no pairs were written: this labeller can't judge: .*force=true --resume"):
        made(recipe_path, only_first)
    run = ConstitutionRun(load(recipe_path, [only_first], "constitution"))
    before = rows_of(run)
    assert set(before) == {"revisions.jsonl", "judgements.jsonl"}
    facts = summary(run)
    assert (facts["can_judge"], facts["pairs"], facts["agreement"]["agreement"]) == (False, None, 0.5)
    assert facts["agreement"]["first_place"] == pytest.approx(0.9)
    assert facts["agreement"]["consistent"] == 0.0
    assert "P(first) is 90.0% on average: it prefers the first place" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"dpo\.data: the constitution run wrote no pairs\.jsonl: its labeller can't"):
        load(recipe_path, stage="dpo")

    for name in ("revise", "agree"):
        monkeypatch.setattr(
            f"qalign.judge.ai_feedback.feedback.Feedback.{name}", lambda *_: pytest.fail("it was made already")
        )
    _, after = made(recipe_path, only_first, "constitution.force=true", resume=True)
    assert after["revisions.jsonl"] == before["revisions.jsonl"]
    assert after["pairs.jsonl"] == [], "a judge of places alone calls each pair a tie"
    assert "pairs were forced: this labeller can't judge" in capsys.readouterr().out


def cut_at(run, step: int) -> None:
    """What a kill leaves after a checkpoint: more of the log, no later checkpoint, no results."""
    for name in ("summary.json", *FILES):
        (run.path / name).unlink(missing_ok=True)
    for checkpoint in run.checkpoints.iterdir():
        if int(checkpoint.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(checkpoint)
    with run.metrics.open("a") as file:
        file.write('{"step": 9, "pairs": [{"half')


def test_it_goes_on_where_it_was_killed_to_the_same_rows(recipe_path, monkeypatch):
    monkeypatch.setattr("qalign.train.checkpoints.KEPT", 100)
    run, whole = made(recipe_path)
    log, steps = run.metrics.read_bytes(), sorted(int(c.name.rpartition("-")[2]) for c in run.checkpoints.iterdir())
    assert len(steps) > 5
    for step in (steps[0], steps[len(steps) // 2], steps[-1]):
        cut_at(run, step)
        again, rows = made(recipe_path, resume=True)
        assert rows == whole
        assert again.metrics.read_bytes() == log


def test_another_labeller_or_other_principles_than_it_began_with_are_noticed(recipe_path, tmp_path):
    run, _ = made(recipe_path)
    cut_at(run, 6)
    code = tmp_path / "mine.py"
    text = code.read_text()
    code.write_text(f"{text}\n# edited")
    with pytest.raises(UserError, match=r"constitution\.labeller: was \w+ when this run began and is \w+ now"):
        made(recipe_path, resume=True)
    code.write_text(text)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"principles": PRINCIPLES[:2]}))
    with pytest.raises(UserError, match=r"constitution\.principles: was \w+ when this run began and is \w+ now"):
        made(recipe_path, resume=True)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["constitution.labeller=mine.py:broken"], "broken raised ZeroDivisionError"),
        (["constitution.labeller=mine.py:score"], r"gave \d+; expected \d+ probabilities from 0 to 1"),
        (["constitution.labeller=mine.py:gone"], "mine.py has no function 'gone'"),
        (["constitution.labeller=runs/gone"], "'runs/gone' is neither 'base', 'sft', a run that answers"),
        (["constitution.labeller=sft", "sft=null"], "there is no finished sft run"),
        (["constitution.labeller=sft"], r"constitution\.labeller: 'sft' is trained on this very run's revisions"),
        (["constitution.principles=gone.yaml"], r"constitution\.principles: there is no file 'gone.yaml'"),
        (["constitution.agree_with=null"], r"constitution\.agree_with: pairs are written once the labeller was"),
        (["constitution.candidates=3"], r"constitution\.candidates: 3 answers leave one without"),
        (["constitution.candidates=0", "constitution.revisions=0"], "so there is nothing to do"),
        (["constitution.data=constitution"], r"constitution\.data: 'constitution' is this very run"),
        (["constitution.max_new_tokens=512"], "leaves no room for a prompt"),
        (["constitution.learning_rate=0.1"], "unknown key 'learning_rate' in constitution; did you mean 'sft"),
    ],
)
def test_mistakes_are_said_in_a_line(recipe_path, overrides, problem):
    with pytest.raises(UserError, match=problem):
        made(recipe_path, *overrides)


def test_a_stage_says_which_command_makes_its_data(recipe_path):
    with pytest.raises(UserError, match=r"sft\.data: there is no finished constitution run in .*qalign\.constitution"):
        load(recipe_path, stage="sft")
    with pytest.raises(UserError, match="it has no 'constitution:' section; add one"):
        load(recipe_path, ["constitution=null"], "sft")


def test_it_runs_before_the_stages_that_it_makes_data_for(recipe_path):
    assert load(recipe_path).runs == ("constitution", "sft", "reward", "dpo")
    own_sft = [f"sft.data={TRAIN}", "constitution.labeller=sft"]
    assert load(recipe_path, own_sft).runs == ("sft", "constitution", "reward", "dpo")


def test_the_command_leaves_with_2_where_no_pairs_were_written(recipe_path, capsys, tmp_path):
    words = ["constitution.labeller=mine.py:first", "constitution.revisions=0", "constitution.limit=1"]
    assert leaving(module.main, recipe_path, *words) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("constitution: no pairs were written: this labeller can")
    assert leaving(module.main, recipe_path, *words, "--resume") == 0  # it is complete: nothing was left to do
    assert "this run is complete" in capsys.readouterr().out


@pytest.mark.true_model
def test_smollm2_cannot_judge(recipe_path, tmp_path, capsys):
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump({"principles": [vars(one) for one in read_principles()[-4:]]}))
    words = [f"constitution.agree_with={{path: {TEST}, limit: 24}}", "constitution.labeller=base"]
    words += ["constitution.principles=ours.yaml", "constitution.revisions=0"]
    model = [f"model.base={SMOLLM2}", "model.compute_dtype=auto"]
    assert leaving(module.main, recipe_path, *words, *model) == 2
    assert "no pairs were written: this labeller" in capsys.readouterr().err
    run = ConstitutionRun(load(recipe_path, [*words, *model], "constitution"))
    assert not (run.path / "pairs.jsonl").exists()
    facts = summary(run)
    assert facts["agreement"]["pairs"] == 24
    assert facts["agreement"]["interval"][0] < 0.5
    assert facts["tokens"] < facts["tokens_single"] / 2
