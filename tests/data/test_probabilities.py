"""A preference row's `chosen_probability`: what is read, what is refused, and which answer counts as chosen."""

import json

import pytest
from transformers import AutoTokenizer

from qalign.config.stages import Source
from qalign.data.formats import canonical, canonical_dialogue, canonical_prompt, preferences, scorable
from qalign.data.readers import BadRow
from qalign.data.templates import ChatTemplate
from qalign.data.tokenize import encode_pair
from tests.conftest import FIXTURES

ROW = {"prompt": "Why?", "chosen": "yes", "rejected": "no"}


def row(probability, **more):
    return ROW | {"chosen_probability": probability} | more


def said(preference):
    return preference.chosen["content"], preference.rejected["content"], preference.chosen_probability


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1, ("yes", "no", 1.0)), (0.9, ("yes", "no", 0.9)), ("0.75", ("yes", "no", 0.75)), (0.5, ("yes", "no", 0.5)),
        (0.25, ("no", "yes", 0.75)), (0, ("no", "yes", 1.0)), (None, ("yes", "no", 1.0)), ("", ("yes", "no", 1.0)),
    ],
)  # fmt: skip
def test_the_more_probable_answer_is_the_chosen_one(given, expected):
    assert said(canonical(row(given), "here")) == expected


def test_a_row_without_it_is_a_hard_label():
    assert canonical(ROW, "here") == canonical(row(1), "here") == canonical(row(1.0), "here")


@pytest.mark.parametrize(
    "given", [-0.1, 1.01, float("nan"), float("inf"), "high", "nan", True, [0.5], {"p": 0.5}, 10**400]
)
@pytest.mark.parametrize("read", [canonical, scorable, canonical_dialogue])
def test_what_is_no_probability_is_refused_by_name(given, read):
    with pytest.raises(BadRow, match="chosen_probability: expected a number from 0 to 1, found "):
        read(row(given), "here")


def test_scores_change_sides_with_the_answers():
    found = canonical(row(0.2, score_chosen=1.0, score_rejected=4.0), "here")
    assert (said(found), found.margin) == (("no", "yes", 0.8), 3.0)


def test_what_is_scored_is_called_as_the_row_calls_it():
    assert said(scorable(row(0.25), "here")) == ("yes", "no", 0.25)


@pytest.mark.parametrize(("given", "imitated"), [(0.9, "yes"), (0.5, "yes"), (0.1, "no")])
def test_sft_imitates_the_better_answer_and_a_prompt_has_none(given, imitated):
    assert canonical_dialogue(row(given), "here").turns[-1]["content"] == imitated
    assert [turn["content"] for turn in canonical_prompt(row(given), "here").turns] == ["Why?"]


def test_a_pair_of_ids_has_it():
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tokenizers" / "llama3")
    found = encode_pair(ChatTemplate(tokenizer), canonical(row(0.3), "here"), 64)
    assert found.chosen_probability == 0.7
    assert tokenizer.decode(found.chosen_ids).startswith("no")


def test_a_file_with_one_bad_row_names_it(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row(p)) + "\n" for p in (0.9, 2, 0.5)))
    rows, refused = preferences((Source(path=str(file)),), "train", None, 0)
    assert [found.chosen_probability for found in rows] == [0.9, 0.5]
    assert [(one.where, one.reason) for one in refused] == [
        (f"{file}:2", "chosen_probability: expected a number from 0 to 1, found 2")
    ]
