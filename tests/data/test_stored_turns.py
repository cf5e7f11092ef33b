"""Turns that a file holds as text are read, or refuse the row: they are never learned as an answer."""

import json
from types import SimpleNamespace

import pytest

from qalign.data.formats import canonical, canonical_dialogue, canonical_prompt
from qalign.data.readers import BadRow
from tests.data.shapes import ASKED, BRIEFED, NO, TALKED, TRANSCRIPT, YES, assistant, user

NUMPY = "[{'role': 'user', 'content': 'It\\'s } {?'}\n {'content': 'Yes', 'role': 'assistant'}]"
STORED = {
    "JSON": json.dumps,
    "JSON with spaces": lambda turns: json.dumps(turns, indent=1),
    "pandas": str,
    "a tuple": lambda turns: str(tuple(turns)),
    "NumPy": lambda turns: str(turns).replace("}, {", "}\n {"),
    "NumPy on one line": lambda turns: str(turns).replace("}, {", "} {"),
    "NumPy's repr": lambda turns: f"array({turns}, dtype=object)".replace("}, {", "},\n       {"),
    "JSON in JSON": lambda turns: json.dumps(json.dumps(turns)),
    "JSON after a byte order mark": lambda turns: "\ufeff" + json.dumps(turns),
    "JSON in a code block": lambda turns: f"```json\n{json.dumps(turns)}\n```",
    "a list of one list": lambda turns: json.dumps([turns]),
    "an object of messages": lambda turns: json.dumps({"messages": turns}),
    "a list of JSON texts": lambda turns: json.dumps([json.dumps(turn) for turn in turns]),
    "pairs of role and text": lambda turns: str([(turn["role"], turn["content"]) for turn in turns]),
    "columns": lambda turns: json.dumps({key: [turn[key] for turn in turns] for key in ("role", "content")}),
    "sharegpt": lambda turns: json.dumps([{"from": turn["role"], "value": turn["content"]} for turn in turns]),
}


@pytest.mark.parametrize("write", STORED.values(), ids=STORED)
def test_turns_stored_as_text_are_read(write):
    whole = write([*TALKED, YES])
    pair = {"prompt": write(TALKED), "chosen": write([YES]), "rejected": write([NO])}

    for key in ("messages", "conversations", "conversation"):
        assert list(canonical_dialogue({key: whole}, "").turns) == [*TALKED, YES]
    row = canonical(pair, "")
    assert (list(row.prompt), row.chosen, row.rejected) == (TALKED, YES, NO)
    assert list(canonical_prompt(pair, "").turns) == TALKED
    repeated = canonical({"chosen": whole, "rejected": write([*TALKED, NO])}, "")
    assert (list(repeated.prompt), repeated.chosen) == (TALKED, YES)
    for before, answer in (("prompt", "completion"), ("question", "answer"), ("instruction", "output")):
        assert list(canonical_dialogue({before: write(TALKED), answer: write([YES])}, "").turns) == [*TALKED, YES]
    assert list(canonical_dialogue({"text": whole}, "").turns) == [*TALKED, YES]
    assert list(canonical_prompt({"text": whole}, "").turns) == TALKED
    assert list(canonical_prompt({"system": write(BRIEFED[:1]), "prompt": "Why?"}, "").turns) == BRIEFED
    told = canonical_dialogue({"instruction": "Why?", "history": write(TALKED[:2]), "output": "Yes"}, "")
    assert list(told.turns) == [*TALKED, YES]


def test_braces_and_quotes_within_a_stored_text_are_text():
    assert list(canonical_dialogue({"messages": NUMPY}, "").turns) == [user("It's } {?"), YES]


def test_a_list_of_turns_that_are_each_stored_as_text():
    assert list(canonical_dialogue({"messages": [json.dumps(turn) for turn in (*ASKED, YES)]}, "").turns) == [
        *ASKED,
        YES,
    ]


def test_a_history_stored_as_text():
    row = {"instruction": "Why?", "history": '[["Hi", "Hello"]]', "output": "Yes"}
    assert list(canonical_dialogue(row, "").turns) == [*TALKED, YES]


BROKEN = {
    "cut off": lambda turns: str(turns)[:-5],
    "doubled quotes": lambda turns: json.dumps(turns).replace('"', '""'),
    "escaped quotes": lambda turns: json.dumps(turns).replace('"', '\\"'),
    "HTML": lambda turns: json.dumps(turns).replace('"', "&quot;"),
    "curly quotes": lambda turns: json.dumps(turns).replace('"', "”"),
    "no quotes": lambda turns: str(turns).replace("'role'", "role").replace("'content'", "content"),
    "JSON lines": lambda turns: "\n".join(map(json.dumps, [*turns, *turns])),
    "objects as Python prints them": lambda turns: str([SimpleNamespace(**turn) for turn in turns]).replace(
        "namespace", "Turn"
    ),
    "LangChain's objects": lambda turns: f"[HumanMessage(content={turns[0]['content']!r})]",
    "YAML": lambda turns: "".join(f"- role: {turn['role']}\n  content: {turn['content']}\n" for turn in turns),
    "sorted YAML": lambda turns: "".join(f"- content: {turn['content']}\n  role: {turn['role']}\n" for turn in turns),
}


@pytest.mark.parametrize("write", BROKEN.values(), ids=BROKEN)
def test_turns_stored_as_text_that_is_broken_refuse_the_row(write):
    row = {"prompt": "Why?", "chosen": "Yes", "rejected": "No"}
    reason = "looks like turns stored as text, but is neither JSON nor a Python list"
    for convert, raw, key in (
        *((canonical, row, key) for key in row),
        *((canonical_dialogue, {"question": "Why?", "answer": "Yes"}, key) for key in ("question", "answer", "system")),
        *((canonical_dialogue, {"instruction": "Why?", "output": "Yes"}, key) for key in ("instruction", "output")),
        (canonical_dialogue, {}, "text"),
    ):
        with pytest.raises(BadRow, match=f"^{key}: {reason}$"):
            convert(raw | {key: write(ASKED)}, "")


def test_an_object_of_messages_and_more_as_text_refuses_the_row():
    with pytest.raises(BadRow, match=r"^prompt: holds messages and tools; give each a column of its own$"):
        canonical_prompt({"prompt": json.dumps({"messages": ASKED, "tools": [{"name": "f"}]})}, "")


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2, 3]",
        '{"name": "Ann", "age": 5}',
        '[{"name": "Ann"}, {"name": "Bob"}]',
        '{"role": "admin"}',
        '{"role": "user", "name": "Ann"}',
        '{"from": "Paris", "role": "manager"}',
        '{"from": "user@example.org", "text": "Hi"}',
        '[{"role": "director", "text": "Ann"}, {"role": "manager", "text": "Bob"}]',
        '[{"from": "Berlin", "to": "Paris", "value": 12}]',
        '["user", "assistant", "system"]',
        '["Yes", "No"]',
        '[{"name": "Ann"',
        "{'a': 1}",
        "[INST",
        '[{"role": "user", "content": "Hi"}] is how a chat is written.',
        'A turn is written so: {"role": "user", "content": "Hi"}',
        'Like this:\n```json\n[{"role": "user", "content": "Hi"}]\n```\nEach turn has a role.',
        '```python\nmessages = [{"role": "user", "content": "Hi"}]\n```',
        '(In short, "role": "user" marks the user.)',
        "- role: user, assistant or system\n- content: the text",
        "Role: Assistant\nContent: none",
        "The user says: Human: Hi\n\nAssistant: Hello",
        "Human: a member of the species Homo sapiens.",
        "User, please wait.",
        "User: ann\n\nHost: example.org",
    ],
)
def test_other_json_and_words_about_roles_are_a_text_like_any_other(text):
    row = canonical({"prompt": text, "chosen": text, "rejected": "No"}, "")
    assert (row.prompt[0], row.chosen) == (user(text), assistant(text))
    assert canonical_dialogue({"text": text}, "").text == text


@pytest.mark.parametrize(
    "spell",
    [
        lambda text: text.strip(),
        lambda text: " " + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n\n", "### ").strip(),
        lambda text: text.replace("\n\n", "\n### ").strip(),
        lambda text: text.replace("Human:", "User:"),
        lambda text: text.replace("Human:", "USER:").replace("Assistant:", "ASSISTANT:").strip(),
        lambda text: text.replace("Human:", "User:").replace("\n\n", "\n### ").strip(),
    ],
)
def test_transcripts_in_other_spellings(spell):
    whole = {side: spell(f"{TRANSCRIPT}\n\nAssistant: {side}") for side in ("Yes", "No")}

    row = canonical({"chosen": whole["Yes"], "rejected": whole["No"]}, "")
    assert (list(row.prompt), row.chosen, row.rejected) == (TALKED, YES, NO)
    for raw in ({"text": whole["Yes"]}, {"prompt": spell(TRANSCRIPT + "\n\nAssistant:"), "completion": "Yes"}):
        assert list(canonical_dialogue(raw, "").turns) == [*TALKED, YES]
    assert list(canonical_prompt({"instruction": spell(TRANSCRIPT)}, "").turns) == TALKED


def test_a_text_that_is_turns_is_not_parsed_where_another_column_is_read():
    row = canonical_dialogue({"text": str(ASKED)[:-5], "messages": [*ASKED, YES]}, "")
    assert list(row.turns) == [*ASKED, YES]
