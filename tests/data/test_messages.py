"""What a turn holds: roles, parts of a content, thoughts, tool calls and weights."""

import json

import pytest

from qalign.config.stages import Source
from qalign.data.formats import canonical, canonical_dialogue, canonical_prompt, dialogues
from qalign.data.readers import BadRow
from tests.data.shapes import ASKED, NO, TALKED, YES, assistant, gpt, human, system, user


def turns_of(*turns) -> list:
    return list(canonical_dialogue({"messages": list(turns)}, "").turns)


def refusal(*turns, **columns) -> str:
    with pytest.raises(BadRow) as caught:
        canonical_dialogue({"messages": list(turns), **columns}, "")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 300
    return str(caught.value)


# --- roles and content -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["user", "User", " HUMAN ", "prompter", "USER:"])
def test_names_of_the_user(name):
    assert turns_of({"role": name, "content": "Why?"}, YES) == [*ASKED, YES]


@pytest.mark.parametrize("name", ["Assistant", "gpt", "chatgpt", "bard", "bing", "model", "bot", "agent", "ASSISTANT:"])
def test_names_of_the_assistant(name):
    assert turns_of(*ASKED, {"role": name, "content": "Yes"}) == [*ASKED, YES]


@pytest.mark.parametrize("name", ["SYSTEM", "developer"])
def test_names_of_the_system(name):
    assert turns_of({"role": name, "content": "Be brief."}, *ASKED, YES) == [system("Be brief."), *ASKED, YES]


@pytest.mark.parametrize(
    "name", ["tool", "function", "observation", "ipython", "tool-response", "Tool Response", "environment"]
)
def test_names_of_a_tool(name):
    assert turns_of(*ASKED, CALLED, {"role": name, "content": "5"}, YES)[2] == {"role": "tool", "content": "5"}


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]},
        {"role": "user", "content": ["Wh", "y?"]},
        {"role": "user", "content": {"type": "text", "text": "Why?"}},
        {"role": "user", "content": [{"type": "input_text", "text": "Why?", "annotations": [1]}]},
        {"role": "user", "content": [{"type": "text", "text": "Why?", "image": None, "cache_control": {"a": 1}}]},
        {"role": "user", "parts": [{"text": "Wh"}, {"text": "y?"}]},
        {"role": "user", "parts": ["Why?"]},
        {"role": "user", "text": "Why?"},
        {"role": "user", "content": "Why?", "value": "Why?"},
        {"from": "user", "content": '[{"type": "text", "text": "Why?"}]'},
        {"role": "user", "content": "Why?", "header": {"a": 1}, "country": "US", "toxic": False, "hashed_ip": "h"},
        {"role": "user", "content": "Why?", "id": 7, "created_at": "noon", "turn_identifier": 3, "images": []},
        {"role": "user", "content": "Why?", "weight": 0, "tool_calls": [], "reasoning_content": "", "name": None},
    ],
    ids=str,
)
def test_content_that_is_text(turn):
    assert turns_of(turn, YES) == [*ASKED, YES]


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (user([{"type": "image"}, {"type": "text", "text": "What?"}]), "images are not supported"),
        (user([{"type": "image_url", "image_url": {"url": "a"}}]), "images are not supported"),
        (user([{"type": "input_audio", "input_audio": {}}]), "audio is not supported"),
        (user([{"type": "video", "video": "a.mp4"}]), "videos are not supported"),
        ({"role": "user", "content": "What?", "images": ["a.png"]}, "images are not supported"),
        (user([{"type": "tool_result", "content": "5"}]), "part of a turn's content is 'tool_result'; only text"),
        (user([5]), "part of a turn's content is 'int'; only text"),
        (user([{"type": "text", "text": "Why?", "mood": "sad"}]), "part of a turn's content has mood"),
        (user("Why?") | {"mood": "sad", "tone": 1}, "a turn has mood, tone, which nothing here reads"),
        (user("Why?") | {"value": "How?"}, "content, value mean the same, but differ"),
        (user("Why?") | {"from": "gpt"}, "role, from mean the same, but differ"),
        (user("Why?") | {"\x1b[31m": 1}, "a turn has '\\x1b[31m', which"),
        (user("Why?") | {"reasoning_content": "So"}, "the user's turn has reasoning_content; only an assistant's can"),
        (user("Why?") | {"name": 5}, "name is int, expected text"),
        (user(True), "a turn's content is bool, expected text"),
    ],
    ids=str,
)
def test_what_a_turn_cannot_hold_refuses_the_row_by_name(turn, reason):
    assert reason in refusal(turn, YES)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "thoughts", "thought"])
def test_thoughts_are_kept_beside_the_answer(key):
    thought = YES | {"reasoning_content": "Let me see."}

    assert turns_of(*ASKED, YES | {key: "Let me see."}) == [*ASKED, thought]
    row = canonical({"prompt": "Why?", "chosen": YES | {key: "Let me see."}, "rejected": NO}, "")
    assert (row.chosen, row.rejected) == (thought, NO)
    assert canonical({"prompt": "Why?", "chosen": [thought], "rejected": "Yes"}, "").rejected == YES


def test_thoughts_among_the_parts_of_an_answer():
    parts = [{"type": "thinking", "thinking": "Let me ", "signature": "a"}, {"type": "text", "text": "Yes"}]
    gemini = {"role": "model", "parts": [{"text": "Let me see.", "thought": True}, {"text": "Yes"}]}

    assert turns_of(*ASKED, assistant(parts)) == [*ASKED, YES | {"reasoning_content": "Let me "}]
    assert turns_of(*ASKED, gemini) == [*ASKED, YES | {"reasoning_content": "Let me see."}]
    assert "mean the same, but differ" in refusal(*ASKED, assistant(parts) | {"thinking": "No"})
    assert "reasoning_content is dict" in refusal(*ASKED, YES | {"thinking": {"a": 1}})


# --- tools -----------------------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLED = assistant("") | {"tool_calls": [CALL]}
SCHEMA = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
SUNNY = {"role": "tool", "content": "sun"}
TOOLACE = assistant('[Get Weather(city="Rome"), now()]')


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL | {"id": None, "index": None}]},
        assistant("")
        | {"tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Rome"}'}, "index": 0}]},
        assistant("") | {"tool_calls": [{"name": "weather", "arguments": {"city": "Rome"}}]},
        assistant("") | {"tool_calls": json.dumps([CALL])},
        assistant("") | {"function_call": {"name": "weather", "parameters": {"city": "Rome"}}},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"from": "function_call", "value": f"<tool_call>\n{json.dumps(CALL['function'])}\n</tool_call>"},
        {"role": "assistant", "content": "", "tool_calls": [json.dumps(CALL)], "function_call": "null"},
        {"role": "tool_call", "content": '[{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}]'},
    ],
    ids=str,
)
def test_a_tool_call_comes_in_one_form(turn):
    assert turns_of(*ASKED, turn, SUNNY, YES) == [*ASKED, CALLED, SUNNY, YES]


def test_a_call_keeps_its_id_and_the_tools_turn_its_own_keys():
    called = assistant("Let me look.") | {"tool_calls": [{"id": "c1", **CALL}]}
    answer = SUNNY | {"tool_call_id": "c1", "name": "weather"}

    assert turns_of(*ASKED, called, answer, YES) == [*ASKED, called, answer, YES]


def test_sharegpts_calls_in_a_row_are_one_turn_with_the_words_before_them():
    call = {"from": "function_call", "value": json.dumps(CALL["function"])}

    row = canonical_dialogue({"conversations": [human("Why?"), gpt("Let me look."), call, call]}, "")

    assert list(row.turns) == [*ASKED, assistant("Let me look.") | {"tool_calls": [CALL, CALL]}]


@pytest.mark.parametrize("arguments", ['{"city": null}', {"city": None}])
def test_nulls_that_a_call_has_in_json_are_arguments(arguments, write_jsonl):
    call = {"name": "weather", "arguments": arguments}
    row = {"messages": [*ASKED, assistant("") | {"tool_calls": [call]}], "tools": [SCHEMA | {"strict": None}]}

    (read,), _ = dialogues((Source(path=str(write_jsonl("calls.jsonl", [row]))),), "train", None, 0)

    assert read.turns[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": None}}
    assert read.tools == (SCHEMA | {"strict": None},)


def test_nulls_with_which_parquet_fills_calls_and_tools_are_none(tmp_path):
    """It gives every object all the keys that any row's has."""
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    other = {"name": "time", "arguments": {"zone": "UTC"}}
    rows = [{"messages": [*ASKED, assistant("") | {"tool_calls": [one]}], "tools": [SCHEMA]} for one in (call, other)]
    rows[1]["tools"] = [{"type": "function", "function": {"name": "time", "strict": True}}]
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), tmp_path / "calls.parquet")

    read, _ = dialogues((Source(path=str(tmp_path / "calls.parquet")),), "train", None, 0)

    assert [row.turns[1]["tool_calls"][0]["function"] for row in read] == [call, other]
    assert [list(row.tools) for row in read] == [row["tools"] for row in rows]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"name": "weather", "arguments": "Rome"}, "'Rome' is neither JSON nor a Python list"),
        ({"name": "weather", "arguments": ["Rome"]}, "a tool call needs a function's name and an object of arguments"),
        ({"arguments": {}}, "a tool call needs a function's name"),
        ({"type": "retrieval", "name": "weather"}, "a tool call needs a function's name"),
        ({"name": "weather", "mood": "sad"}, "a tool call has mood"),
        ("null", "a tool call needs a function's name"),
        ("<tool_call>{}</tool_call> as said", "'<tool_call>{}</tool_call> as said' is neither JSON"),
        ("weather", "'weather' is neither JSON nor a Python list"),
        (5, "a tool call needs a function's name"),
    ],
    ids=str,
)
def test_a_call_that_is_none_refuses_the_row(call, reason):
    assert reason in refusal(*ASKED, assistant("") | {"tool_calls": [call]})


def test_only_an_assistant_calls_and_only_after_a_call_a_tool_speaks():
    assert "the user's turn has tool_calls" in refusal(user("Why?") | {"tool_calls": [CALL]}, YES)
    assert "turn 3 of the dialogue is a tool's, but" in refusal(*ASKED, YES, SUNNY, YES)
    assert turns_of(*ASKED, CALLED, SUNNY, SUNNY, YES)[2:4] == [SUNNY, SUNNY]
    spelt = assistant('<tool_call>{"name": "weather", "arguments": {}}</tool_call>')  # Hermes' rows
    assert turns_of(*ASKED, spelt, SUNNY, YES) == [*ASKED, spelt, SUNNY, YES]
    assert turns_of(*ASKED, TOOLACE, SUNNY, YES) == [*ASKED, TOOLACE, SUNNY, YES]
    assert turns_of(*ASKED, CALLED, {"role": "tool", "content": ""}, YES)[2]["content"] == ""


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": [SCHEMA]},
        {"tools": json.dumps([SCHEMA])},
        {"tools": json.dumps([SCHEMA["function"]])},  # sharegpt's
        {"tools": [SCHEMA["function"] | {"type": "function"}]},
        {"tools": SCHEMA},
        {"tools": json.dumps(SCHEMA["function"])},
        {"tools": [json.dumps(SCHEMA)]},
        {"functions": [SCHEMA["function"]]},
    ],
    ids=str,
)
def test_the_tools_column_comes_in_one_form_in_every_kind_of_row(columns):
    pair = {"prompt": ASKED, "chosen": [CALLED], "rejected": [NO], **columns}

    assert canonical_dialogue({"messages": [*ASKED, CALLED], **columns}, "").tools == (SCHEMA,)
    assert (
        canonical(pair, "").tools == canonical_dialogue(pair, "").tools == canonical_prompt(pair, "").tools == (SCHEMA,)
    )
    assert canonical(pair, "").chosen == CALLED


def test_tools_of_openais_preferences_stand_in_the_input():
    row = canonical(
        {"input": {"messages": ASKED, "tools": [SCHEMA]}, "preferred_output": [YES], "non_preferred_output": [NO]}, ""
    )
    assert row.tools == (SCHEMA,)


@pytest.mark.parametrize("tools", [[], "", " ", "[]", None, "nan", "null", float("nan")])
def test_an_empty_tools_column_is_none(tools):
    assert canonical_dialogue({"messages": [*ASKED, YES], "tools": tools}, "").tools == ()


@pytest.mark.parametrize(
    "tools", [5, {"a": 1}, ["weather"], [{"type": "code_interpreter"}], "calculator", "5"], ids=str
)
def test_a_tools_column_that_holds_no_schemas_refuses_the_row(tools):
    assert "tools: expected" in (reason := refusal(*ASKED, YES, tools=tools)) or "neither JSON" in reason


def test_a_prompt_may_end_with_a_tools_turn():
    row = canonical_prompt({"messages": [*ASKED, CALLED, SUNNY, YES]}, "")
    assert list(row.turns) == [*ASKED, CALLED, SUNNY]


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}]
)
def test_a_turn_with_weight_0_is_not_trained_on(mark):
    row = canonical_dialogue({"messages": [user("Hi"), assistant("Hello") | mark, *ASKED, YES | {"weight": 1}]}, "")

    assert (list(row.turns), row.untrained) == ([*TALKED, YES], {1})


def test_weights_of_an_answer_and_of_its_prompt():
    poor = assistant("Hello") | {"weight": 0}

    row = canonical({"prompt": [user("Hi"), poor, *ASKED], "chosen": YES | {"weight": 1}, "rejected": "No"}, "")

    assert (list(row.prompt), row.chosen) == (TALKED, YES)  # turns of a prompt are never trained on
    assert list(canonical_prompt({"messages": [user("Hi"), poor, *ASKED]}, "").turns) == TALKED


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (YES | {"weight": 0.5}, "weight is 0.5; expected 1, or 0"),
        (YES | {"weight": "0"}, "weight is '0'; expected 1, or 0"),
        (YES | {"train": True, "weight": 0}, "weight, train contradict each other"),
    ],
)
def test_a_weight_that_cannot_be_kept_refuses_the_row(turn, reason):
    assert reason in refusal(*ASKED, turn)
    assert "the user's turn can't be trained on" in refusal(user("Why?") | {"train": True}, YES)
