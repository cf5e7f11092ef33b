"""`holdout`: a share of `data` is kept out of training, the same rows in every stage."""

import json
from pathlib import Path

import pytest

from qalign.config.load import load
from qalign.data.formats import dialogues, preferences, prompts
from qalign.errors import UserError
from qalign.evaluate import report
from qalign.train.dataset import rows_under
from tests.conftest import ROOT
from tests.helpers import summary, train_recipe

DEMO = str(ROOT / "recipes" / "smollm2_demo.yaml")
DATA = str(ROOT / "recipes" / "data" / "house_style_train.jsonl")


def recipe(*words):
    rows = (
        f"{stage}.{key}" for stage in ("sft", "dpo", "ppo") for key in (f"data={DATA}", "limit=null", "holdout=0.2")
    )
    emptied = (f"{stage}.eval_data=null" for stage in ("sft", "dpo", "ppo"))
    return load(DEMO, [*rows, *emptied, *words])


def places(key, stage, read, seed=42):
    rows, refused = rows_under(key, stage, seed, read)
    assert not refused
    return [row.where for row in rows]


def test_every_stage_holds_out_the_same_fifth_and_trains_on_the_rest():
    asked = recipe()
    stages = ((asked.sft, dialogues), (asked.dpo, preferences), (asked.ppo, prompts))

    trained = [places("data", stage, read) for stage, read in stages]
    held_out = [places("eval_data", stage, read) for stage, read in stages]

    assert trained[0] == trained[1] == trained[2]
    assert held_out[0] == held_out[1] == held_out[2]
    assert sorted(trained[0] + held_out[0]) == sorted(f"{DATA}:{number}" for number in range(1, 301))
    assert 45 <= len(held_out[0]) <= 75
    assert places("eval_data", asked.dpo, preferences, seed=1) != held_out[0]


def test_rows_with_the_same_question_stay_together(write_jsonl):
    rows = [{"prompt": f"Question {n % 10}?", "chosen": f"Yes {n}", "rejected": "No"} for n in range(100)]
    asked = recipe(f"dpo.data={{path: {write_jsonl('rows.jsonl', rows)}, weight: 2}}")

    trained, _ = rows_under("data", asked.dpo, 0, preferences)
    held_out, _ = rows_under("eval_data", asked.dpo, 0, preferences)

    assert held_out
    assert not {row.prompt[0]["content"] for row in trained} & {row.prompt[0]["content"] for row in held_out}
    assert len(trained) == 2 * (100 - len(held_out))  # the weight is for training


def test_too_few_rows_to_hold_any_out_are_refused(write_jsonl):
    rows = [{"prompt": "Why?", "chosen": "Yes", "rejected": "No"}] * 3
    asked = recipe(f"dpo.data={write_jsonl('rows.jsonl', rows)}")

    with pytest.raises(UserError, match="leaves none on one side; use `eval_data`"):
        rows_under("eval_data", asked.dpo, 0, preferences)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["dpo.holdout=0"], "dpo.holdout"),
        (["dpo.holdout=1"], "dpo.holdout"),
        ([f"dpo.eval_data={DATA}"], "holdout: there is eval_data already"),
    ],
)
def test_a_share_that_makes_no_sense_is_refused(words, key):
    with pytest.raises(UserError) as caught:
        recipe(*words)
    assert key in str(caught.value)


def test_a_run_measures_what_it_held_out(recipe_file):
    run = train_recipe(load(recipe_file(holdout=0.3, eval_every=1, max_steps=1), stage="dpo"))

    rows = summary(run)["rows"]
    assert rows["used"] + rows["held_out"] == 24
    logged = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert any("eval_loss" in line for line in logged)


def test_evaluate_refuses_rows_that_were_edited_since_they_were_held_out(recipe_file, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(Path(DATA).read_text())
    recipe = load(recipe_file(data=str(data), limit=24, holdout=0.3, max_steps=1), stage="dpo")
    train_recipe(recipe)
    data.write_text("".join(data.read_text().splitlines(keepends=True)[5:]))

    with pytest.raises(UserError, match=r"^dpo\.eval_data: its rows are no longer those that "):
        report(recipe)
