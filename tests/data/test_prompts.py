"""Rows of every shape become prompts, their answers left out; what can't is refused by place and reason; then ids."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from qalign.config.stages import Source
from qalign.data.formats import Prompt, Refused, canonical_prompt, prompts
from qalign.data.readers import BadRow
from qalign.data.tokenize import encode_question, encode_questions
from tests.conftest import ROOT
from tests.data.test_dialogues import SHAPES as DIALOGUE_SHAPES
from tests.data.test_dialogues import variants
from tests.data.test_formats import SHAPES as PREFERENCE_SHAPES
from tests.data.test_formats import assistant, gpt, human, system, user
from tests.data.test_tokenize import FAMILIES, llama3_prompt


def read(path, limit=None, **source):
    return prompts((Source(path=str(path), **source),), "train", limit, 0)


def turns(raw) -> list:
    return list(canonical_prompt(raw, "").turns)


# --- shapes ----------------------------------------------------------------------------------------------------------

ASKED = [user("Why?")]
TALKED = [user("Hi"), assistant("Hello"), user("Why?")]
BRIEFED = [system("Be brief."), user("Why?")]
LISTED = [human("Hi"), gpt("Hello"), human("Why?")]
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?"
SHAPES = {
    "TRL prompt, a text": (ASKED, {"prompt": "Why?"}),
    "TRL prompt, turns": (TALKED, {"prompt": TALKED}),
    "TRL prompt, one turn": (ASKED, {"prompt": user("Why?")}),
    "TRL prompt, a system turn": (BRIEFED, {"prompt": BRIEFED}),
    "TRL prompt, a system column": (BRIEFED, {"prompt": "Why?", "system": "Be brief."}),
    "TRL prompt, an empty system column": (ASKED, {"prompt": "Why?", "system": " "}),
    "TRL prompt and completion": (ASKED, {"prompt": "Why?", "completion": "Yes"}),
    "TRL prompt and completion, turns": (TALKED, {"prompt": TALKED, "completion": [assistant("Yes")]}),
    "TRL prompt that ends with an answer": (TALKED, {"prompt": [*TALKED, assistant("Yes")]}),
    "prompt and response": (ASKED, {"prompt": "Why?", "response": "Yes"}),
    "KTO": (ASKED, {"prompt": "Why?", "completion": "Nonsense", "label": False}),
    "KTO messages": (TALKED, {"messages": [*TALKED, assistant("Nonsense")], "label": False}),
    "chosen alone": (TALKED, {"prompt": TALKED, "chosen": "Yes"}),
    "chosen alone, the prompt in it": (TALKED, {"chosen": [*TALKED, assistant("Yes")]}),
    "rejected alone": (TALKED, {"rejected": [*TALKED, assistant("No")]}),
    "chosen and rejected alike": (ASKED, {"prompt": "Why?", "chosen": "Yes", "rejected": "Yes"}),
    "an empty rejected answer": (ASKED, {"prompt": "Why?", "chosen": "Yes", "rejected": ""}),
    "HH transcript as prompt": (TALKED, {"prompt": TRANSCRIPT}),
    "HH transcript as prompt, with the assistant's cue": (TALKED, {"prompt": TRANSCRIPT + "\n\nAssistant:"}),
    "HH transcript as prompt, answered": (TALKED, {"prompt": TRANSCRIPT + "\n\nAssistant: Yes"}),
    "HH transcript as text": (TALKED, {"text": TRANSCRIPT}),
    "HH transcript as text, answered": (TALKED, {"text": TRANSCRIPT + "\n\nAssistant: Yes"}),
    "HH transcript as text, a system column": (
        [system("Be brief."), *TALKED],
        {"text": TRANSCRIPT, "system": "Be brief."},
    ),
    "HH transcript, chosen, without its last answer": (TALKED, {"chosen": TRANSCRIPT}),
    "HH transcript, chosen, with an empty answer": (TALKED, {"chosen": TRANSCRIPT + "\n\nAssistant: "}),
    "HH transcript, the assistant answers twice": (
        TALKED,
        {"chosen": TRANSCRIPT + "\n\nAssistant: Yes\n\nAssistant: No"},
    ),
    "sharegpt": (TALKED, {"conversations": LISTED}),
    "sharegpt, answered": (TALKED, {"conversations": [*LISTED, gpt("Yes")]}),
    "sharegpt, a system turn": (BRIEFED, {"conversations": [{"from": "system", "value": "Be brief."}, human("Why?")]}),
    "sharegpt, a system column": (BRIEFED, {"conversations": [human("Why?"), gpt("Yes")], "system": "Be brief."}),
    "alpaca": (ASKED, {"instruction": "Why?", "input": "", "output": "Yes"}),
    "alpaca, no output": (ASKED, {"instruction": "Why?"}),
    "alpaca, an input": (
        [user("Translate:\nWarum?")],
        {"instruction": "Translate:", "input": "Warum?", "output": "Why?"},
    ),
    "alpaca, system and history": (
        [system("Be brief."), *TALKED],
        {"instruction": "Why?", "system": "Be brief.", "history": [["Hi", "Hello"]], "output": "Yes"},
    ),
    "alpaca, all of it in 'text' too": (
        ASKED,
        {"instruction": "Why?", "output": "Yes", "text": "### Instruction: Why?\n### Response: Yes"},
    ),
    "alpaca, all of it, the answer too, in 'prompt' too": (
        ASKED,
        {"instruction": "Why?", "output": "Yes", "prompt": "### Instruction: Why?\n### Response: Yes"},
    ),
    "OpenAI messages": (TALKED, {"messages": TALKED}),
    "OpenAI messages, answered": (TALKED, {"messages": [*TALKED, assistant("Yes")]}),
    "OpenAI messages, an empty answer": (TALKED, {"messages": [*TALKED, assistant("")]}),
    "OpenAI messages, a system turn": (BRIEFED, {"messages": [*BRIEFED, assistant("Yes")]}),
    "OpenAI messages, more in each turn": (ASKED, {"messages": [turn | {"name": None, "n": 1} for turn in ASKED]}),
    "ultrachat, its first question": (ASKED, {"prompt": "Why?", "messages": [*ASKED, assistant("Yes"), user("Oh")]}),
    "MT-bench": (ASKED, {"question_id": 81, "category": "writing", "turns": ["Why?", "Say it again."]}),
    "MT-bench, one turn": (ASKED, {"turns": ["Why?"]}),
    "MT-bench, a system column": (BRIEFED, {"turns": ["Why?"], "system": "Be brief."}),
    "a prompt, and how many turns it has": (ASKED, {"prompt": "Why?", "turns": 2}),
    "messages, and the user's among them": (TALKED, {"messages": TALKED, "turns": ["Hi", "Why?"]}),
}


@pytest.mark.parametrize(("expected", "raw"), SHAPES.values(), ids=SHAPES.keys())
def test_a_row_of_a_known_shape(expected, raw):
    assert canonical_prompt(raw, "rows.jsonl:3") == Prompt(tuple(expected), "rows.jsonl:3", raw)


@pytest.mark.parametrize(("expected", "raw"), PREFERENCE_SHAPES.values(), ids=PREFERENCE_SHAPES.keys())
def test_of_a_preference_row_the_prompt_is_the_one_that_was_answered(expected, raw):
    assert turns(raw) == expected


@pytest.mark.parametrize(("answered", "first_trained", "raw"), DIALOGUE_SHAPES.values(), ids=DIALOGUE_SHAPES.keys())
def test_of_a_dialogue_the_prompt_ends_with_a_question(answered, first_trained, raw):
    """The last, or the first where the row says that its prompt ends there."""
    assert turns(raw) == answered[:-1] or (turns(raw) == answered[:1] and raw.get("prompt") in ("Hi", [user("Hi")]))


@pytest.mark.parametrize(("expected", "raw"), SHAPES.values(), ids=SHAPES.keys())
def test_null_columns_of_other_shapes_do_not_matter(expected, raw):
    """Parquet files and `datasets` give every row every column."""
    others = ("chosen", "rejected", "preferred_output", "messages", "conversations", "prompt", "completion", "response")
    nulls = dict.fromkeys((*others, "instruction", "input", "output", "history", "system", "label", "text", "turns"))

    assert turns(nulls | raw) == expected


def test_texts_keep_their_white_space_and_lines():
    assert turns({"prompt": " Why?\n\nReally? \n"}) == [user(" Why?\n\nReally? \n")]
    assert turns({"prompt": "Why?\n\nAssistant: Yes"}) == [user("Why?\n\nAssistant: Yes")]  # no transcript


def test_the_answer_is_in_no_prompt():
    secret = "the answer that must be found"
    for _, raw in [*SHAPES.values(), *PREFERENCE_SHAPES.values()]:
        told = json.loads(json.dumps(raw).replace('"Yes"', f'"{secret}"').replace(": Yes", f": {secret}"))
        assert secret not in str(turns(told))


def test_a_row_keeps_its_columns_for_functions_that_score():
    raw = {"prompt": "2 + 2?", "answer": 4, "tags": ["sum"], "source": None, "chosen": [assistant("4")]}

    row = canonical_prompt(raw, "sums.jsonl:1")

    assert row.columns == {"prompt": "2 + 2?", "answer": 4, "tags": ["sum"], "chosen": [assistant("4")]}
    assert row.turns == (user("2 + 2?"),)


# --- what is refused -------------------------------------------------------------------------------------------------

KNOWN = "expected prompt, messages, conversations, instruction, turns, or an HH transcript"


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (5, "not an object with keys but int"),
        ("Why?", "not an object with keys but str"),
        (["Why?"], "not an object with keys but list"),
        ({}, f"no user's turn to answer: this row has no keys; {KNOWN}"),
        ({"question": "Why?"}, f"no user's turn to answer: this row has question; {KNOWN}"),
        ({"prompt": None, "q": "Why?"}, f"no user's turn to answer: this row has q; {KNOWN}"),
        ({"text": "Once upon a time."}, f"no user's turn to answer: this row has text; {KNOWN}"),
        ({"text": 5}, f"no user's turn to answer: this row has text; {KNOWN}"),
        ({"system": "Be brief."}, f"no user's turn to answer: this row has system; {KNOWN}"),
        ({"messages": []}, f"no user's turn to answer: this row has messages; {KNOWN}"),
        ({"messages": [assistant("Hello")]}, f"no user's turn to answer: this row has messages; {KNOWN}"),
        ({"messages": [system("Be brief.")]}, f"no user's turn to answer: this row has messages; {KNOWN}"),
        ({"prompt": ""}, "turn 1 of the prompt is empty"),
        ({"prompt": " \n"}, "turn 1 of the prompt is empty"),
        ({"instruction": "", "input": " ", "output": "Yes"}, "turn 1 of the prompt is empty"),
        ({"text": "\n\nHuman: \n\nAssistant: Hello"}, "turn 1 of the prompt is empty"),
        ({"turns": [""]}, "turn 1 of the prompt is empty"),
        ({"messages": [user("Hi"), assistant(""), user("Why?")]}, "turn 2 of the prompt is empty"),
        ({"messages": [user("Hi"), user("Why?")]}, "turn 2 of the prompt is the user's, expected the assistant's"),
        ({"messages": [assistant("Hi"), *ASKED]}, "turn 1 of the prompt is the assistant's, expected the user's"),
        ({"messages": [*ASKED, system("Be brief.")]}, "turn 2 of the prompt is the system's, expected the assistant's"),
        ({"messages": BRIEFED, "system": "Be long."}, "turn 1 of the prompt is the system's, expected the user's"),
        (
            {"messages": [*ASKED, assistant("Yes"), assistant("No")]},
            "the prompt ends with the assistant's turn, expected the user's",
        ),
        (
            {"messages": [*ASKED, {"role": "tool", "content": "5"}]},
            "messages: unknown role 'tool'; known: human, user, gpt, assistant, system",
        ),
        ({"messages": [{"role": "user", "content": ["Why?"]}]}, "messages: a turn's content is list, expected text"),
        ({"prompt": 5}, "prompt: expected a text or turns, found int"),
        ({"prompt": ["Why?", "And?"]}, "prompt: expected a text or turns, found list"),
        ({"conversations": "Why?", "system": ["Be brief."]}, "system: expected a text, found list"),
        ({"instruction": ["Why?"]}, "instruction and input: expected texts"),
        ({"instruction": "Why?", "history": ["Hi"]}, "history: expected a list of [question, answer] texts"),
        ({"turns": "Why?"}, "turns: expected a list of the user's texts"),
        ({"turns": []}, "turns: expected a list of the user's texts"),
        ({"turns": [user("Why?")]}, "turns: expected a list of the user's texts"),
        ({"chosen": [assistant("Yes")]}, "the prompt is empty, and chosen and rejected do not share one"),
        (
            {"chosen": "Yes", "rejected": "No"},
            "no prompt: expected a 'prompt', 'conversations' or 'messages' key, or HH transcripts",
        ),
        ({"text": "Hm.\n\nHuman: Why?"}, f"no user's turn to answer: this row has text; {KNOWN}"),
        ({"chosen": "Hm.\n\nHuman: Why?\n\nAssistant: Yes"}, "the transcript begins with text that nobody speaks"),
        ({"prompt": "a\ud800"}, "the text is not valid Unicode: surrogates not allowed ('\\ud800')"),
    ],
)
def test_a_row_is_refused_with_the_reason(raw, reason):
    with pytest.raises(BadRow) as caught:
        canonical_prompt(raw, "")
    assert str(caught.value) == reason


def outcome(raw) -> bool:
    """Whether a row is read; held to being sound, or refused in one line that can be printed."""
    try:
        row = canonical_prompt(raw, "here")
    except BadRow as refusal:
        row = str(refusal)
    if isinstance(row, str):
        assert row.isprintable()
        assert 0 < len(row) < 400
        return False
    roles = [turn["role"] for turn in row.turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    assert [*spoken, "assistant"] == ["user", "assistant"] * ((len(spoken) + 1) // 2)
    for turn in row.turns:
        assert turn.keys() == {"role", "content"}
        turn["content"].encode("utf-8")
        assert turn["content"].strip() or turn["role"] == "system"
    return True


SAMPLES = {name: raw for name, (_, raw) in (SHAPES | PREFERENCE_SHAPES).items()}


@pytest.mark.parametrize("raw", SAMPLES.values(), ids=SAMPLES.keys())
def test_any_json_value_anywhere_is_read_soundly_or_refused_in_one_line(raw):
    read_as = [outcome(odd) for odd in variants(raw)]

    assert {True, False} == set(read_as)  # or this test would be one of refusals only


# --- files -----------------------------------------------------------------------------------------------------------


def test_rows_of_all_shapes_may_stand_in_one_file(write_jsonl):
    shapes = [*SHAPES.values(), *PREFERENCE_SHAPES.values()]
    path = write_jsonl("mixed.jsonl", [raw for _, raw in shapes])

    rows, refused = read(path)

    assert [list(row.turns) for row in rows] == [expected for expected, _ in shapes]
    assert [row.where for row in rows] == [f"{path}:{number}" for number in range(1, len(shapes) + 1)]
    assert refused == []


def test_what_is_refused_is_named_by_place_and_counts_towards_the_limit(write_jsonl):
    path = write_jsonl("rows.jsonl", [{"prompt": "A"}, {"prompt": ""}, "{", {"prompt": "B"}, {"prompt": "C"}])

    rows, refused = read(path, skip=1, limit=3)

    assert [row.turns for row in rows] == [(user("B"),)]
    assert refused == [
        Refused(f"{path}:2", "turn 1 of the prompt is empty"),
        Refused(f"{path}:3", refused[1].reason),
    ]
    assert refused[1].reason.startswith("not valid JSON: ")


def test_sources_have_limits_and_weights(write_jsonl):
    path = write_jsonl("rows.jsonl", [{"prompt": letter} for letter in "ABCD"])

    def asked(**source):
        return "".join(row.turns[0]["content"] for row in prompts((Source(path=path, **source),), "train", 3, 0)[0])

    assert (asked(), asked(limit=2), asked(skip=2)) == ("ABC", "AB", "CD")
    assert asked(limit=2, weight=2.0) == "ABAB"


def test_prompts_survive_parquet_beside_rows_of_another_shape(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [{"messages": TALKED, "answer": 4}, {"prompt": "Why?", "messages": None}, {"turns": ["Why?", "And?"]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=pyarrow.schema([
        ("messages", pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))),
        ("prompt", pyarrow.string()), ("turns", pyarrow.list_(pyarrow.string())), ("answer", pyarrow.int64()),
    ])), path)  # fmt: skip

    found, refused = read(path)

    assert [list(row.turns) for row in found] == [TALKED, ASKED, ASKED]
    assert [row.columns.get("answer") for row in found] == [4, None, None]
    assert refused == []


def test_the_demos_questions_are_all_used():
    rows, refused = read(ROOT / "recipes" / "data" / "house_style_train.jsonl")

    assert (len(rows), refused) == (300, [])
    assert {len(row.turns) for row in rows} == {1}
    assert [row.turns[0]["content"] for row in rows] == [row.columns["prompt"] for row in rows]


# --- real data -------------------------------------------------------------------------------------------------------


def raw_rows(path) -> list[dict]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return json.load(file) if path.suffix == ".json" else [json.loads(line) for line in file]


def test_hh_prompts_lose_nothing_but_white_space(shared_data):
    """In two the assistant speaks twice in a row within the dialogue; three that lack the answer have a prompt."""
    path = shared_data / "hh_harmless.jsonl.gz"
    raw = raw_rows(path)

    rows, refused = read(path)

    assert refused == [
        Refused(f"{path}:128", "turn 5 of the prompt is the assistant's, expected the user's"),
        Refused(f"{path}:1170", "turn 3 of the prompt is the assistant's, expected the user's"),
    ]
    assert len(rows) == 1798
    speaker = {"user": "Human", "assistant": "Assistant"}
    for row in rows:
        original = raw[int(row.where.rpartition(":")[2]) - 1]["chosen"]
        again = " ".join(f"{speaker[turn['role']]}: {turn['content']}" for turn in row.turns).split()
        assert original.split()[: len(again)] == again
        question, answer, _ = original.rpartition("\n\nHuman:")[2].partition("\n\nAssistant:")
        assert (row.turns[-1]["content"], bool(answer)) == (question.strip(), True)


def test_ultrafeedback_prompts_are_all_used(shared_data):
    raw = raw_rows(shared_data / "alpaca_eval_prefs.jsonl.gz")

    rows, refused = read(shared_data / "alpaca_eval_prefs.jsonl.gz")

    assert (len(rows), refused) == (605, [])
    assert [list(row.turns) for row in rows] == [[user(row["prompt"])] for row in raw]
    assert [row.columns for row in rows] == raw


def test_sharegpt_prompts_are_all_used(shared_data):
    raw = raw_rows(shared_data / "dpo_en_demo.json")

    rows, refused = read(shared_data / "dpo_en_demo.json")

    assert (len(rows), refused) == (300, [])
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    assert [list(row.turns) for row in rows] == [
        [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]] for row in raw
    ]


def test_alpaca_prompts_are_all_used(shared_data):
    raw = raw_rows(shared_data / "alpaca_en_demo.json")

    rows, refused = read(shared_data / "alpaca_en_demo.json")

    assert (len(rows), refused) == (999, [])
    for row, original in zip(rows, raw, strict=True):
        given = f"\n{original['input']}" if original["input"] else ""
        assert row.turns == (user(original["instruction"] + given),)


def test_labelled_prompts_are_all_used_whatever_was_thought_of_the_answer(shared_data):
    raw = raw_rows(shared_data / "kto_en_demo.json")

    rows, refused = read(shared_data / "kto_en_demo.json")

    assert (len(rows), refused) == (300, [])
    assert {row["messages"][-1]["role"] for row in raw} == {"assistant"}
    assert [list(row.turns) for row in rows] == [
        [{key: turn[key] for key in ("role", "content")} for turn in row["messages"][:-1]] for row in raw
    ]


def test_mt_bench_questions_are_all_used(shared_data):
    raw = raw_rows(shared_data / "mt_bench_questions.jsonl")

    rows, refused = read(shared_data / "mt_bench_questions.jsonl")

    assert (len(rows), refused) == (80, [])
    assert [list(row.turns) for row in rows] == [[user(row["turns"][0])] for row in raw]
    assert rows[0].columns["category"] == "writing"


# --- as ids ----------------------------------------------------------------------------------------------------------

LONG = [("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "D"), ("user", "E")]


def messages(turns) -> tuple:
    return tuple({"role": role, "content": text} for role, text in turns)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("asked", [LONG[:1], LONG], ids=["one turn", "five turns"])
def test_a_question_ends_where_the_assistant_begins_to_answer(name, asked):
    family = FAMILIES[name]
    expected = family.prompt_ids(asked)

    assert encode_question(family.prepared(), messages(asked), len(expected), {}) == expected


@pytest.mark.parametrize("first", [[], [("system", "Be brief.")]], ids=["no system", "system"])
def test_the_oldest_turns_are_dropped_until_a_question_leaves_room(first):
    tokenizer = FAMILIES["llama3"].prepared()
    whole, shorter, shortest = (llama3_prompt([*first, *LONG[drop:]]) for drop in (0, 2, 4))
    question = messages([*first, *LONG])

    for room, expected in (
        (len(whole), whole),
        (len(whole) - 1, shorter),
        (len(shorter), shorter),
        (len(shorter) - 1, shortest),
        (len(shortest), shortest),
    ):
        assert encode_question(tokenizer, question, room, {}) == expected
    with pytest.raises(BadRow) as caught:
        encode_question(tokenizer, question, len(shortest) - 1, {})
    assert str(caught.value) == (
        f"the prompt is {len(shortest)} tokens; max_length less max_new_tokens leaves {len(shortest) - 1}"
    )


def test_a_question_that_is_too_long_by_itself_is_refused_with_its_numbers():
    tokenizer = FAMILIES["llama3"].prepared()
    length = len(llama3_prompt([("user", "x" * 50)]))

    with pytest.raises(BadRow) as caught:
        encode_question(tokenizer, messages([("user", "x" * 50)]), 20, {})
    assert str(caught.value) == f"the prompt is {length} tokens; max_length less max_new_tokens leaves 20"
    assert length > 20


def test_a_question_is_refused_for_other_reasons_in_their_own_words():
    tokenizer = FAMILIES["llama3"].prepared()
    with pytest.raises(BadRow, match=r"^the text contains the model's special token <\|eot_id\|>$"):
        encode_question(tokenizer, messages([("user", "Say <|eot_id|>")]), 500, {})
    tokenizer.chat_template = "{{ raise_exception('no!') }}"
    with pytest.raises(BadRow, match=r"^the chat template refuses it: no!$"):
        encode_question(tokenizer, messages([("user", "Hi")]), 500, {})


def test_template_kwargs_reach_the_template():
    tokenizer = FAMILIES["llama3"].prepared()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if polite %}, please{% endif %}"

    plain, polite = (encode_question(tokenizer, messages([("user", "Go")]), 50, {"polite": is_}) for is_ in (0, 1))

    assert [tokenizer.decode(ids) for ids in (plain, polite)] == ["Go", "Go, please"]


def test_refused_questions_keep_their_places_and_the_rest_their_order():
    tokenizer = FAMILIES["llama3"].prepared()
    texts = {"a:1": "A", "a:2": "x" * 100, "a:3": "C", "b:1": "<|eot_id|>"}
    rows = [Prompt(messages([("user", text)]), where, {"n": where}) for where, text in texts.items()]
    long = len(llama3_prompt([("user", "x" * 100)]))

    questions, refused = encode_questions(tokenizer, rows, 30, {})

    assert [row for row, _ in questions] == [rows[0], rows[2]]
    assert [ids for _, ids in questions] == [llama3_prompt([("user", text)]) for text in "AC"]
    assert refused == [
        Refused("a:2", f"the prompt is {long} tokens; max_length less max_new_tokens leaves 30"),
        Refused("b:1", "the text contains the model's special token <|eot_id|>"),
    ]


def test_real_questions_fit_and_end_with_the_last_of_their_turns(shared_data):
    """HH's dialogues have up to 35 turns: what is dropped comes from the front, in pairs."""
    family, room = FAMILIES["llama3"], 256
    tokenizer = family.prepared()
    rows, _ = read(shared_data / "hh_harmless.jsonl.gz", limit=300)

    questions, refused = encode_questions(tokenizer, rows, room, {})

    shortened = 0
    assert len(questions) + len(refused) == len(rows)
    for row, ids in questions:
        asked = [(turn["role"], turn["content"]) for turn in row.turns]
        fitting = (drop for drop in range(0, len(asked), 2) if len(llama3_prompt(asked[drop:])) <= room)
        dropped = next(fitting)
        assert ids == llama3_prompt(asked[dropped:])
        shortened += dropped > 0
    assert shortened > 10
    too_long = {row.where for row in rows} - {row.where for row, _ in questions}
    assert {row.where for row in refused} == too_long
    for row in refused:
        assert row.reason.endswith(f"leaves {room}")
