"""Rows far beyond any bound, and dialogues of very many turns: neither may cost gigabytes or minutes."""

import pytest

from qalign.data.formats import Dialogue, PlainText, Preference, Prompt
from qalign.data.readers import BadRow
from qalign.data.templates import ChatTemplate
from qalign.data.tokenize import encode_answer, encode_dialogues, encode_pairs, encode_questions
from tests.data.chat_families import FAMILIES, HELLO, messages


def huge(size: int = 2_000_000) -> list:
    """The same text in every kind of row, and in a turn's every part."""
    text = "word " * (size // 5)
    long, short, no = ({"role": "assistant", "content": text}, *messages([("assistant", "Yes"), ("assistant", "No")]))
    asked, told = messages([HELLO]), messages([("user", text)])
    call = {"type": "function", "function": {"name": "find", "arguments": {"words": [text]}}}
    tool = {"type": "function", "function": {"name": "find", "description": text}}
    return [
        Preference(told, short, no, "w"),
        Preference(asked, long, no, "w"),
        Preference(asked, short, long, "w"),
        Preference(asked, short, no, "w", None, (tool,)),
        Dialogue((*asked, long), 0, "w"),
        Dialogue((*asked, short | {"reasoning_content": text}), 0, "w"),
        Dialogue((*asked, short | {"tool_calls": [call]}), 0, "w"),
        Dialogue((*told, short) * 3, 5, "w"),
        PlainText(text, "w"),
        Prompt(told, "w", {}),
    ]


def test_a_row_of_megabytes_is_refused_before_it_is_rendered_or_tokenised(monkeypatch):
    template = FAMILIES["llama3"].prepared()
    monkeypatch.setattr(ChatTemplate, "render", None)
    monkeypatch.setattr(type(template.tokenizer), "__call__", None)
    encoders = {Preference: encode_pairs, Prompt: encode_questions}

    for row in huge():
        _, (bad,) = encoders.get(type(row), encode_dialogues)(template, [row], 2048)
        assert "characters long; at most 1,000,000 are taken at this max_length" in bad.reason
    with pytest.raises(BadRow, match="characters long"):
        encode_answer(template, huge()[4], 2048)


def test_the_bound_grows_with_max_length():
    template, row = FAMILIES["llama3"].prepared(), PlainText("word " * 210_000, "w")  # 1,050,000 characters

    assert encode_dialogues(template, [row], 5000)[1]
    assert not encode_dialogues(template, [row], 5250)[1]


def test_a_dialogue_of_very_many_turns_is_refused_and_one_of_many_is_learned():
    template, talk = FAMILIES["llama3"].prepared(), messages([("user", "A"), ("assistant", "B")])

    _, (bad,) = encode_dialogues(template, [Dialogue(talk * 501, 0, "w")], 64)
    assert bad.reason == "the row has 1,002 turns; at most 1,000 are taken at this max_length; split it"
    sequences, refused = encode_dialogues(template, [Dialogue(talk * 60, 0, "w")], 64)
    assert not refused
    assert sum(label == 2005 for sequence in sequences for label in sequence.labels) == 60
    assert sequences[0].dropped_turns == 0 < sequences[-1].dropped_turns


def test_each_of_many_answers_keeps_as_many_turns_before_it_as_fit():
    """What is looked for near the place where the answer before it was cut is what is found from the beginning."""
    template, most = FAMILIES["llama3"].prepared(), 100
    turns = [
        turn for n in range(40) for turn in (("user", "so " * (n * 7 % 5)), ("assistant", "no " * (n * 3 % 4) + "B"))
    ]
    rows = [Dialogue(messages(turns[: n + 1]), n, "w") for n in range(1, len(turns), 2)]
    alone = [encode_dialogues(template, [row], most)[0][0] for row in rows]

    together, _ = encode_dialogues(template, [Dialogue(messages(turns), 0, "w")], most)

    for one in alone:
        size = len(one)
        assert any(one.ids == sequence.ids[:size] for sequence in together)
