"""A row of every known shape becomes a preference, a dialogue or plain text, and a prompt."""

import json
from itertools import pairwise

import pytest

from qalign.data.formats import (
    Dialogue,
    PlainText,
    Preference,
    Prompt,
    canonical,
    canonical_dialogue,
    canonical_prompt,
    scorable,
)
from qalign.data.readers import BadRow
from tests.data.shapes import (
    ALL,
    ASKED,
    COLUMNS,
    DIALOGUES,
    FIRST_QUESTION,
    NO,
    PROMPTS,
    RANKED,
    SAME,
    TALKED,
    YES,
    assistant,
    user,
    variants,
)

ranked = pytest.mark.parametrize(("prompt", "raw"), RANKED.values(), ids=RANKED.keys())
dialogues = pytest.mark.parametrize(("turns", "first_trained", "raw"), DIALOGUES.values(), ids=DIALOGUES.keys())
SIDED = {  # without those in which another column says which answer is rejected
    name: case for name, case in RANKED.items() if {"chosen", "preferred_output", "output"} & case[1].keys()
}
FILLED = {
    "a pair": SAME,
    "a pair that repeats the prompt": {"chosen": [*TALKED, YES], "rejected": [*TALKED, NO]},
    "transcripts": {side: f"\n\nHuman: Why?\n\nAssistant: {side}" for side in ("chosen", "rejected")},
    "a question and two answers": {"question": "Why?", "response_a": "Yes", "response_b": "No", "winner": "a"},
    "messages": {"messages": [*TALKED, YES]},
    "prompt and completion": {"prompt": "Why?", "completion": "Yes"},
    "alpaca": {"instruction": "Why?", "input": "", "output": "Yes"},
    "a system prompt": {"system": "Be brief.", "conversations": [*TALKED, YES]},
    "a text": {"text": "Once."},
}
NULLS = dict.fromkeys(COLUMNS)  # Parquet files and `datasets` give every row every column


def prompted(raw) -> list:
    return list(canonical_prompt(raw, "").turns)


@ranked
def test_a_ranked_row_in_every_form(prompt, raw):
    where, margin = "rows.jsonl:3", canonical(raw, "").margin
    preference = Preference(tuple(prompt), YES, NO, where, margin)
    dialogue = Dialogue((*prompt, YES), len(prompt), where)

    for row in (raw, NULLS | raw):
        assert canonical(row, where) == scorable(row, where) == preference
        assert canonical_dialogue(row, where) == dialogue  # earlier answers are context
        assert prompted(row) == prompt


@pytest.mark.parametrize("other", [None, "", "Yes", 5, {"role": "tool"}, [], [user("Me")]], ids=repr)
@pytest.mark.parametrize(("prompt", "raw"), SIDED.values(), ids=SIDED)
def test_the_rejected_answer_does_not_matter_for_imitation(prompt, raw, other):
    side = "non_preferred_output" if "preferred_output" in raw else "rejected"
    ranking = isinstance(raw.get("output"), list)
    changed = {"output": [raw["output"][0], other]} if ranking else {side: other}

    assert canonical_dialogue(raw | changed, "") == Dialogue((*prompt, YES), len(prompt), "")


@dialogues
def test_a_dialogue_to_imitate_or_to_score(turns, first_trained, raw):
    for row in (raw, NULLS | raw):
        assert canonical_dialogue(row, "a:3") == scorable(row, "a:3") == Dialogue(tuple(turns), first_trained, "a:3")


@pytest.mark.parametrize(("name", "turns"), [(name, turns) for name, (turns, *_) in DIALOGUES.items()])
def test_the_prompt_of_a_dialogue_ends_with_its_last_question_or_where_the_row_says(name, turns):
    assert prompted(DIALOGUES[name][2]) == (turns[:1] if name in FIRST_QUESTION else turns[:-1])


@pytest.mark.parametrize("empty", ["", " ", [], float("nan")], ids=repr)
@pytest.mark.parametrize("name", FILLED)
def test_empty_cells_of_a_file_of_several_shapes_are_absent(empty, name):
    cells = dict.fromkeys({key for raw in FILLED.values() for key in raw}, empty)
    raw = FILLED[name]

    for convert in (canonical, canonical_dialogue, canonical_prompt):
        expected = outcome_or_reason(convert, raw)
        assert outcome_or_reason(convert, cells | raw) == expected or isinstance(expected, str)
    assert canonical_dialogue(cells | raw, "") == canonical_dialogue(raw, "")


def outcome_or_reason(convert, raw):
    try:
        row = convert(raw, "")
    except BadRow as refusal:
        return str(refusal)
    return row.turns if isinstance(row, Prompt) else row


@pytest.mark.parametrize(("prompt", "raw"), PROMPTS.values(), ids=PROMPTS.keys())
def test_a_prompt(prompt, raw):
    for row in (raw, NULLS | raw):  # with its columns, for functions that score answers
        assert canonical_prompt(row, "rows.jsonl:3") == Prompt(tuple(prompt), "rows.jsonl:3", raw)


def test_a_history_of_tuples_is_one_of_lists():
    """pyarrow gives the items of a map as tuples."""
    assert prompted({"instruction": "Why?", "history": [("Hi", "Hello")]}) == TALKED


def test_the_answer_is_in_no_prompt():
    secret = "the answer that must be found"
    for raw in ALL.values():
        told = json.loads(json.dumps(raw).replace('"Yes"', f'"{secret}"').replace(": Yes", f": {secret}"))
        assert secret not in str(prompted(told))


def test_of_a_row_with_many_keys_the_most_telling_is_imitated():
    everything = {
        "text": "\n\nHuman: Why?\n\nAssistant: text",
        "instruction": "Why?",
        "output": "instruction",
        "prompt": "Why?",
        "completion": "completion",
        "messages": [*ASKED, assistant("messages")],
        "chosen": [*ASKED, assistant("chosen")],
    }

    for key in ("chosen", "messages", "completion", "instruction", "text"):
        assert canonical_dialogue(everything, "").turns[-1]["content"] == key
        del everything["output" if key == "instruction" else key]


@pytest.mark.parametrize("text", ["Once.", " Once\n\na time. ", "Human: Hi\nAssistant: Hello", "\n\nAssistant: 5"])
def test_plain_text_is_kept_as_it_is(text):
    assert canonical_dialogue({"text": text, "id": 7, "label": True}, "a.txt:1") == PlainText(text, "a.txt:1")


# --- white space -----------------------------------------------------------------------------------------------------


def test_texts_keep_their_white_space_and_lines():
    raw = {"prompt": " Why?\n\nReally? \n", "chosen": " Yes,\n\nof course.\n", "rejected": "No "}
    asked = (user(" Why?\n\nReally? \n"),)

    assert canonical(raw, "") == Preference(asked, assistant(" Yes,\n\nof course.\n"), assistant("No "), "")
    assert canonical_dialogue(raw, "").turns == (*asked, assistant(" Yes,\n\nof course.\n"))
    assert canonical_prompt(raw, "").turns == asked
    assert prompted({"prompt": "Why?\n\nAssistant: Yes"}) == [user("Why?\n\nAssistant: Yes")]  # no transcript


@pytest.mark.parametrize(("told", "repeated"), [("a  b\nc", "a b c"), ("a\r\nb", "a\nb"), ("a\u00a0b ", "a b")])
def test_a_prompt_that_the_answers_repeat_with_other_white_space_is_the_same(told, repeated):
    raw = {"prompt": told, "chosen": [user(repeated), YES], "rejected": [user(f"{repeated}\n"), NO]}

    assert canonical(raw, "") == Preference((user(told),), YES, NO, "")
    assert canonical_dialogue(raw, "").turns == (user(told), YES)


def test_answers_that_differ_in_white_space_inside_are_two():
    row = canonical({"prompt": "Code?", "chosen": "if a:\n    b", "rejected": "if a:\nb"}, "")
    assert row.chosen != row.rejected


def test_a_transcript_loses_the_white_space_around_its_turns_and_none_within():
    opening = "\n\nHuman:  Why?\nReally? \n\nAssistant:"

    row = canonical({"chosen": opening + " Yes.\n\nOf course. ", "rejected": opening + " No"}, "")

    assert row == Preference((user("Why?\nReally?"),), assistant("Yes.\n\nOf course."), NO, "")


def test_answers_may_begin_alike():
    """Only whole turns are shared: the prompt never takes the beginning of an answer."""
    raw = {"chosen": [*ASKED, assistant("Yes, sir")], "rejected": [*ASKED, assistant("Yes, madam")]}

    assert canonical(raw, "") == Preference(tuple(ASKED), assistant("Yes, sir"), assistant("Yes, madam"), "")


# --- margin ----------------------------------------------------------------------------------------------------------

NAN, INFINITY, HUGE = float("nan"), float("inf"), 10**400  # all three can stand in a JSON file


GOOD = [(8.0, 4.5, 3.5), (8, 3, 5.0), (9, 8.5, 0.5), (2.0, 3.25, -1.25), (4, 4, 0.0), (0, -1.5, 1.5)]
GOOD += [("9", "4", 5.0), ("9.5", 4, 5.5), (" 1e1", "-2", 12.0)]  # a CSV has numbers as texts
BAD = [bad for no_score in (None, "", "high", "nan", "8,5", True, False, [8.0], NAN, INFINITY, -INFINITY, HUGE)
       for bad in ((no_score, 4.5, None), (8.0, no_score, None), (no_score, no_score, None))]  # fmt: skip
APART = (1.7e308, -1.7e308, None)  # each is finite, their difference is not


@pytest.mark.parametrize(("chosen", "rejected", "margin"), [*GOOD, *BAD, APART])
def test_the_margin_is_the_difference_of_two_finite_scores(chosen, rejected, margin):
    row = canonical(SAME | {"score_chosen": chosen, "score_rejected": rejected}, "here")

    assert row == Preference((user("Why?"),), YES, NO, "here", margin)
    assert type(row.margin) is type(margin)


# --- any JSON value anywhere -----------------------------------------------------------------------------------------


def outcome(convert, raw):
    """What a row is read as; None if it is refused, which must be in one line that can be printed."""
    try:
        row = convert(raw, "here")
    except BadRow as refusal:
        reason = str(refusal)
        assert reason.isprintable()
        assert 0 < len(reason) < 400
        return None
    if isinstance(row, PlainText):
        assert row.text.encode("utf-8").strip()
        return row
    turns = (*row.prompt, row.chosen) if isinstance(row, Preference) else row.turns
    turns = (*turns, NO) if isinstance(row, Prompt) else turns
    spoken = [turn["role"] for turn in turns if turn["role"] != "system"]
    assert "user" in spoken
    assert spoken[-1] == "assistant"
    assert all(one != other for one, other in pairwise(spoken))  # (no row here calls a tool)
    for turn in turns:
        assert turn.keys() - {"name"} == {"role", "content"}
        assert turn["content"].strip().encode("utf-8")
    if isinstance(row, Dialogue):
        assert 0 <= row.first_trained < len(turns)
    return row


@pytest.mark.parametrize("raw", ALL.values(), ids=ALL.keys())
def test_any_json_value_anywhere_is_read_soundly_or_refused_in_one_line(raw):
    for converts in ((canonical, canonical_dialogue, scorable), (canonical_prompt,)):
        read_as = {bool(outcome(convert, odd)) for odd in variants(raw) for convert in converts}
        assert read_as == {True, False}  # or this test would be one of refusals only
