"""Rows of answers that are good or bad, in every shape: for KTO."""

import json

import pytest

from qalign.config.stages import Source
from qalign.data.formats import LeftOut, canonical_dialogue, canonical_labelled, labelled_answers
from qalign.data.readers import BadRow, NoPair
from qalign.data.shapes import RawRow
from qalign.data.templates import ChatTemplate
from qalign.data.tokenize import encode_labelled
from qalign.page.session import Reply
from qalign.page.votes import Choice
from qalign.page.votes import row as vote

ASKED = [{"role": "user", "content": "Why?"}]
YES, NO = {"role": "assistant", "content": "Yes"}, {"role": "assistant", "content": "No"}
TALKED = [*ASKED, NO, {"role": "user", "content": "Really?"}]


def of(raw: dict) -> tuple[list, list, list]:
    row = canonical_labelled(raw, "here")
    assert row.where == "here"
    return [*row.prompt], [*row.answers], [*row.desirable]


SHAPES = {
    "TRL": ({"prompt": "Why?", "completion": "Yes", "label": True}, ASKED, True),
    "TRL, disliked": ({"prompt": "Why?", "completion": "Yes", "label": False}, ASKED, False),
    "TRL, conversational": ({"prompt": ASKED, "completion": [YES], "label": False}, ASKED, False),
    "messages": ({"messages": [*TALKED, YES], "label": False}, TALKED, False),
    "LLaMA-Factory, sharegpt": (
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Yes"}], "kto_tag": True},
        ASKED,
        True,
    ),
    "LLaMA-Factory, alpaca": ({"instruction": "Why?", "input": "", "output": "Yes", "kto_tag": "false"}, ASKED, False),
    "a thumb": ({"question": "Why?", "answer": "Yes", "thumb": "down"}, ASKED, False),
    "only a chosen answer": ({"prompt": "Why?", "chosen": "Yes"}, ASKED, True),
    "only a rejected answer": ({"prompt": "Why?", "rejected": "Yes"}, ASKED, False),
    "the other one is null": ({"prompt": "Why?", "chosen": None, "rejected": "Yes"}, ASKED, False),
    "a label beside a chosen answer": ({"prompt": "Why?", "chosen": "Yes", "label": 0}, ASKED, False),
}


@pytest.mark.parametrize("name", SHAPES)
def test_one_answer_with_its_label(name):
    raw, prompt, good = SHAPES[name]
    assert of(raw) == (prompt, [YES], [good])


def test_what_was_read_is_noted():
    raw = RawRow({"prompt": "Why?", "rejected": "Yes", "topic": "a"})
    canonical_labelled(raw, "here")
    assert raw.read >= {"prompt", "rejected"}
    assert "topic" not in raw.read


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": "Why?", "chosen": "Yes", "rejected": "No"},
        {"chosen": [*ASKED, YES], "rejected": [*ASKED, NO], "label": False},  # the two say it already
        {"prompt": "Why?", "response_a": "No", "response_b": "Yes", "winner": "b"},
    ],
)
def test_a_pair_is_a_good_and_a_bad_answer(raw):
    assert of(raw) == (ASKED, [YES, NO], [True, False])


WORDS = {
    True: [True, 1, 1.0, "true", "True", "1", "good", "up", "thumbs up", " yes ", "positive", "👍"],
    False: [False, 0, 0.0, -1, "false", "FALSE", "0", "bad", "down", "thumbs_down", "negative", "👎"],
}


@pytest.mark.parametrize(("good", "label"), [(good, label) for good, labels in WORDS.items() for label in labels])
def test_labels_as_numbers_and_words(good, label):
    assert of({"prompt": "Why?", "completion": "Yes", "label": label}) == (ASKED, [YES], [good])


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"prompt": "Why?", "completion": "Yes"}, "no label says whether the answer is good"),
        ({"prompt": "Why?", "completion": "Yes", "label": None}, "no label says whether the answer is good"),
        ({"prompt": "Why?", "completion": "Yes", "label": "nan"}, "no label says whether the answer is good"),
        ({"prompt": "Why?", "completion": "Yes", "label": 0.5}, "label: expected true or false"),
        ({"prompt": "Why?", "completion": "Yes", "label": 5}, "label: expected true or false"),
        ({"prompt": "Why?", "completion": "Yes", "label": [True]}, "label: expected true or false"),
        ({"prompt": "Why?", "completion": "Yes", "kto_tag": "perhaps"}, "kto_tag: expected true or false"),
        ({"prompt": "Why?", "completion": "", "label": True}, "empty"),
        ({"text": "Words without roles.", "label": 1}, "plain text"),
        ({"messages": [YES], "label": True}, "the dialogue has no user's turn"),
        ({"messages": ASKED, "label": True}, "ends with the user's turn"),
        ({"messages": [*ASKED, {**YES, "weight": 0}], "label": True}, "weight 0"),
    ],
)
def test_a_row_without_answer_or_label_is_refused_with_its_reason(raw, said):
    with pytest.raises(BadRow, match=said):
        canonical_labelled(raw, "here")


def reply(model: str, text: str, prompt=("Why?",)) -> Reply:
    turns = [{"role": "user", "content": words} for words in prompt]
    return Reply(model, None, tuple(turns), [1], seed=1, ids=(1,), text=text, state="ended")


@pytest.mark.parametrize(
    ("choice", "answers", "labels"),
    [
        (Choice.A, [YES, NO], [True, False]),
        (Choice.B, [NO, YES], [True, False]),
        (Choice.BOTH_BAD, [YES, NO], [False] * 2),
    ],
)
def test_votes_of_the_page(choice, answers, labels):
    """Two bad answers are no pair, but two thumbs down."""
    raw = vote(choice, reply("one", "Yes"), reply("other", "No"), "base", {})
    assert of(json.loads(json.dumps(raw))) == (ASKED, answers, labels)


def test_a_vote_that_says_nothing_of_an_answer_is_left_out():
    raw = vote(Choice.TIE, reply("one", "Yes"), reply("other", "No"), "base", {})
    with pytest.raises(NoPair, match="tie"):
        canonical_labelled(raw, "here")
    raw = vote(Choice.BOTH_BAD, reply("one", "Yes"), reply("other", "No", ("How?",)), "base", {})
    with pytest.raises(NoPair, match="both bad"):
        canonical_labelled(json.loads(json.dumps(raw)), "here")


@pytest.mark.parametrize("word", ["down", "👎", "bad", 0, -1])
def test_sft_does_not_imitate_what_has_a_thumb_down(word):
    with pytest.raises(BadRow, match="not to be imitated"):
        canonical_dialogue({"prompt": "Why?", "completion": "Yes", "thumb": word}, "here")


def test_second_answers_come_last_with_their_prompts_ids(write_jsonl, tiny_base):
    """So a prompt's own two answers are no neighbours, from which the KL estimate takes an answer."""
    rows = [{"prompt": f"{n}?", "chosen": f"Yes {n}", "rejected": f"No {n}"} for n in range(3)]
    rows.insert(1, {"prompt": "Alone?", "completion": "Here", "label": 0})
    rows.append({"prompt": "?", "no_pair": "a vote for 'tie'"})
    found, refused = labelled_answers((Source(path=write_jsonl("rows.jsonl", rows)),), "train", None, seed=0)
    assert [type(row) for row in refused] == [LeftOut]
    encoded, refused = encode_labelled(ChatTemplate(tiny_base.tokenizer), found, 256)
    assert not refused
    assert [row.desirable for row in encoded] == [True, False, True, True, False, False, False]
    texts = [tiny_base.tokenizer.decode(row.answer_ids) for row in encoded]
    for text, words in zip(texts, ["Yes 0", "Here", "Yes 1", "Yes 2", "No 0", "No 1", "No 2"], strict=True):
        assert text.startswith(words)
    assert encoded[0].prompt_ids == encoded[4].prompt_ids
