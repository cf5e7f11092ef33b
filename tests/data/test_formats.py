"""Rows of every shape and file kind become one form; what can't is refused by place and reason."""

import csv
import gzip
import json
import re

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from qalign.config.stages import Source
from qalign.data.formats import Preference, Refused, canonical, preferences
from qalign.data.readers import BadRow
from qalign.errors import UserError


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def read(path, split="train", limit=None, seed=0, **source):
    return preferences((Source(path=str(path), **source),), split, limit, seed)


# --- shapes ----------------------------------------------------------------------------------------------------------

SAME = {"prompt": "Why?", "chosen": "Yes", "rejected": "No"}
ASKED = [user("Why?")]
TALKED = [user("Hi"), assistant("Hello"), user("Why?")]
BRIEFED = [system("Be brief."), user("Why?")]
SHAPES = {
    "TRL standard": (ASKED, {"prompt": "Why?", "chosen": "Yes", "rejected": "No"}),
    "TRL standard, more columns": (
        ASKED,
        {"id": 7, "prompt": "Why?", "chosen": "Yes", "rejected": "No", "score_chosen": 9.5, "tags": ["a"]},
    ),
    "TRL conversational": (
        TALKED,
        {"prompt": TALKED, "chosen": [assistant("Yes")], "rejected": [assistant("No")]},
    ),
    "TRL conversational, a system prompt": (
        BRIEFED,
        {"prompt": BRIEFED, "chosen": [assistant("Yes")], "rejected": [assistant("No")]},
    ),
    "TRL conversational, prompt implicit": (
        TALKED,
        {"chosen": [*TALKED, assistant("Yes")], "rejected": [*TALKED, assistant("No")]},
    ),
    "TRL conversational, prompt implicit, a system prompt": (
        BRIEFED,
        {"chosen": [*BRIEFED, assistant("Yes")], "rejected": [*BRIEFED, assistant("No")]},
    ),
    "TRL conversational, prompt explicit and repeated": (
        TALKED,
        {"prompt": TALKED, "chosen": [*TALKED, assistant("Yes")], "rejected": [*TALKED, assistant("No")]},
    ),
    "HH transcripts": (
        TALKED,
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: Yes",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: No",
        },
    ),
    "HH transcripts, one turn": (
        ASKED,
        {"chosen": "\n\nHuman: Why?\n\nAssistant: Yes", "rejected": "\n\nHuman: Why?\n\nAssistant: No"},
    ),
    "UltraFeedback binarized": (
        ASKED,
        {
            "prompt": "Why?",
            "prompt_id": "0f",
            "chosen": [user("Why?"), assistant("Yes")],
            "rejected": [user("Why?"), assistant("No")],
            "messages": [user("Why?"), assistant("Yes")],
            "score_chosen": 8.0,
            "score_rejected": 4.5,
        },
    ),
    "UltraFeedback binarized, a system prompt": (
        BRIEFED,
        {"prompt": "Why?", "chosen": [*BRIEFED, assistant("Yes")], "rejected": [*BRIEFED, assistant("No")]},
    ),
    "UltraFeedback binarized, a system column": (
        BRIEFED,
        {"system": "Be brief.", "chosen": [*ASKED, assistant("Yes")], "rejected": [*ASKED, assistant("No")]},
    ),
    "UltraFeedback binarized, the prompt opens a longer dialogue": (
        TALKED,
        {"prompt": "Hi", "chosen": [*TALKED, assistant("Yes")], "rejected": [*TALKED, assistant("No")]},
    ),
    "sharegpt ranking": (
        TALKED,
        {"conversations": [human("Hi"), gpt("Hello"), human("Why?")], "chosen": gpt("Yes"), "rejected": gpt("No")},
    ),
    "sharegpt ranking, a system turn": (
        BRIEFED,
        {
            "conversations": [{"from": "system", "value": "Be brief."}, human("Why?")],
            "chosen": gpt("Yes"),
            "rejected": gpt("No"),
        },
    ),
    "sharegpt ranking, a system column": (
        BRIEFED,
        {"system": "Be brief.", "conversations": [human("Why?")], "chosen": gpt("Yes"), "rejected": gpt("No")},
    ),
    "sharegpt ranking, an empty system column": (
        ASKED,
        {"system": "", "conversations": [human("Why?")], "chosen": gpt("Yes"), "rejected": gpt("No")},
    ),
    "alpaca ranking": (
        ASKED,
        {"instruction": "Why?", "input": "", "chosen": "Yes", "rejected": "No"},
    ),
    "alpaca ranking, an input": (
        [user("Translate:\nWarum?")],
        {"instruction": "Translate:", "input": "Warum?", "chosen": "Yes", "rejected": "No"},
    ),
    "alpaca ranking, output pair": (
        ASKED,
        {"instruction": "Why?", "input": None, "output": ["Yes", "No"]},
    ),
    "alpaca ranking, system and history": (
        [system("Be brief."), *TALKED],
        {
            "instruction": "Why?",
            "system": "Be brief.",
            "history": [["Hi", "Hello"]],
            "chosen": "Yes",
            "rejected": "No",
        },
    ),
    "alpaca ranking, a longer history": (
        [user("A"), assistant("B"), user("C"), assistant("D"), user("Why?")],
        {"instruction": "Why?", "history": [["A", "B"], ["C", "D"]], "output": ["Yes", "No"]},
    ),
    "OpenAI preference": (
        TALKED,
        {
            "input": {"messages": TALKED, "tools": [], "parallel_tool_calls": True},
            "preferred_output": [assistant("Yes")],
            "non_preferred_output": [assistant("No")],
        },
    ),
    "OpenAI messages with chosen and rejected": (
        BRIEFED,
        {"messages": BRIEFED, "chosen": assistant("Yes"), "rejected": assistant("No")},
    ),
    "OpenAI messages with plain answers": (
        TALKED,
        {"messages": TALKED, "chosen": "Yes", "rejected": "No"},
    ),
}


@pytest.mark.parametrize(("prompt", "raw"), SHAPES.values(), ids=SHAPES.keys())
def test_a_row_of_a_known_shape(prompt, raw):
    row = canonical(raw, "rows.jsonl:3")
    assert (row.prompt, row.chosen, row.rejected, row.where) == (tuple(prompt), "Yes", "No", "rows.jsonl:3")


def test_answers_keep_their_white_space_and_lines():
    row = canonical({"prompt": " Why?\n", "chosen": " Yes,\n\nof course.\n", "rejected": "No "}, "")

    assert row.prompt == (user(" Why?\n"),)
    assert (row.chosen, row.rejected) == (" Yes,\n\nof course.\n", "No ")


def test_a_transcript_loses_the_white_space_around_its_turns_and_none_within():
    row = canonical(
        {
            "chosen": "\n\nHuman:  Why?\nReally? \n\nAssistant: Yes.\n\nOf course. ",
            "rejected": "\n\nHuman:  Why?\nReally? \n\nAssistant: No",
        },
        "",
    )

    assert row == Preference((user("Why?\nReally?"),), "Yes.\n\nOf course.", "No", "")


def test_answers_may_open_alike():
    """Only whole turns are shared: the prompt never takes the beginning of an answer."""
    turns = {"chosen": [*ASKED, assistant("Yes, sir")], "rejected": [*ASKED, assistant("Yes, madam")]}

    assert canonical(turns, "") == Preference(tuple(ASKED), "Yes, sir", "Yes, madam", "")


def test_a_row_keeps_the_order_of_its_sides():
    row = canonical({"rejected": "No", "chosen": "Yes", "prompt": "Why?"}, "")

    assert (row.chosen, row.rejected) == ("Yes", "No")


# --- margin ----------------------------------------------------------------------------------------------------------

NAN, INFINITY, HUGE = float("nan"), float("inf"), 10**400  # all three can stand in a JSON file


@pytest.mark.parametrize(
    ("chosen", "rejected", "margin"),
    [
        (8.0, 4.5, 3.5),
        (8, 3, 5.0),
        (9, 8.5, 0.5),
        (2.0, 3.25, -1.25),  # a judge's scores may go against the choice
        (4, 4, 0.0),
        (0, -1.5, 1.5),
        (None, 4.5, None),
        (8.0, None, None),
        ("8.0", 4.5, None),
        (8.0, "4.5", None),
        (True, 0, None),
        (1, False, None),
        ([8.0], 4.5, None),
        (NAN, 4.5, None),
        (8.0, NAN, None),
        (INFINITY, 4.5, None),
        (8.0, -INFINITY, None),
        (INFINITY, INFINITY, None),
        (HUGE, 4.5, None),
        (8.0, HUGE, None),
        (1.7e308, -1.7e308, None),  # each is finite, their difference is not
    ],
)
def test_the_margin_is_the_difference_of_two_finite_scores(chosen, rejected, margin):
    row = canonical(SAME | {"score_chosen": chosen, "score_rejected": rejected}, "here")

    assert row == Preference((user("Why?"),), "Yes", "No", "here", margin)
    assert type(row.margin) is type(margin)


def test_a_row_without_scores_has_no_margin():
    assert canonical(SAME, "here").margin is None
    assert canonical(SAME | {"score_chosen": 8.0}, "here").margin is None
    assert canonical(SAME | {"score_rejected": 8.0}, "here").margin is None


# --- refusals --------------------------------------------------------------------------------------------------------

REFUSALS = {
    "no keys": ({}, "no 'chosen' answer: a preference row needs both; this one has no keys"),
    "a key of two lines and half a character": (
        {"pro\nmpt": "Why?", "\ud800": 1, "réponse": "Yes"},
        "no 'chosen' answer: a preference row needs both; this one has 'pro\\nmpt', '\\ud800', réponse",
    ),
    "a role as long as a book": (
        {"prompt": [{"role": "x" * 9999, "content": "Why?"}], "chosen": "Yes", "rejected": "No"},
        "prompt: unknown role 'xxxxxxxxxxxx...xxxxxxxxxxxxx'; known: human, user, gpt, assistant, system",
    ),
    "no object": (["Why?", "Yes", "No"], "not an object with keys but list"),
    "null": (None, "not an object with keys but NoneType"),
    "chosen missing": (
        {"prompt": "Why?", "rejected": "No"},
        "no 'chosen' answer: a preference row needs both; this one has prompt, rejected",
    ),
    "rejected missing": (
        {"prompt": "Why?", "chosen": "Yes"},
        "no 'rejected' answer: a preference row needs both; this one has prompt, chosen",
    ),
    "rejected null": (
        SAME | {"rejected": None},
        "no 'rejected' answer: a preference row needs both; this one has prompt, chosen",
    ),
    "alpaca without preference": (
        {"instruction": "Why?", "input": "", "output": "Yes"},
        "no 'chosen' answer: a preference row needs both; this one has instruction, input, output",
    ),
    "alpaca with three outputs": (
        {"instruction": "Why?", "output": ["Yes", "No", "Maybe"]},
        "no 'chosen' answer: a preference row needs both; this one has instruction, output",
    ),
    "messages with a label": (
        {"messages": [*ASKED, assistant("Yes")], "label": True},
        "no 'chosen' answer: a preference row needs both; this one has messages, label",
    ),
    "chosen empty": (SAME | {"chosen": " \n"}, "chosen: the answer is empty"),
    "rejected empty": (SAME | {"rejected": ""}, "rejected: the answer is empty"),
    "both the same": (SAME | {"rejected": "Yes"}, "chosen and rejected are the same answer"),
    "both the same but for white space": (SAME | {"rejected": " Yes\n"}, "chosen and rejected are the same answer"),
    "both the same, in turns": (
        {"chosen": [*TALKED, assistant("Yes")], "rejected": [*TALKED, assistant("Yes")]},
        "chosen and rejected are the same answer",
    ),
    "one dialogue goes on where the other ends": (
        {"chosen": [*ASKED, assistant("Yes"), user("Oh"), assistant("So")], "rejected": [*ASKED, assistant("Yes")]},
        "chosen: expected one assistant turn after the prompt, found assistant → user → assistant",
    ),
    "answers of no text": (SAME | {"chosen": 5}, "chosen: expected a text or turns, found int"),
    "answers in a list of texts": (SAME | {"rejected": ["No"]}, "rejected: expected a text or turns, found list"),
    "no answer after the prompt": (
        {"prompt": ASKED, "chosen": [], "rejected": []},
        "chosen: expected one assistant turn after the prompt, found nothing",
    ),
    "an answer by the user": (
        {"conversations": [human("Why?")], "chosen": gpt("Yes"), "rejected": human("No")},
        "rejected: expected one assistant turn after the prompt, found user",
    ),
    "an answer of three turns": (
        {"prompt": ASKED, "chosen": [assistant("Yes"), user("Really?"), assistant("Yes")], "rejected": "No"},
        "chosen: expected one assistant turn after the prompt, found assistant → user → assistant",
    ),
    "answers that repeat another prompt": (
        {"prompt": "Why?", "chosen": [user("How?"), assistant("Yes")], "rejected": [user("How?"), assistant("No")]},
        "chosen: expected one assistant turn after the prompt, found user → assistant",
    ),
    "no prompt at all": (
        {"chosen": "Yes", "rejected": "No"},
        "no prompt: expected a 'prompt', 'conversations' or 'messages' key, or HH transcripts",
    ),
    "another word for prompt": (
        {"question": "Why?", "chosen": "Yes", "rejected": "No"},
        "no prompt: expected a 'prompt', 'conversations' or 'messages' key, or HH transcripts",
    ),
    "prompt without turns": (
        {"conversations": [], "chosen": gpt("Yes"), "rejected": gpt("No")},
        "the prompt is empty, and chosen and rejected do not share one",
    ),
    "prompt of a system turn only": (
        SAME | {"prompt": [system("Be brief.")]},
        "the prompt is empty, and chosen and rejected do not share one",
    ),
    "transcripts that share no prompt": (
        {"chosen": "\n\nHuman: Why?\n\nAssistant: Yes", "rejected": "\n\nHuman: How?\n\nAssistant: No"},
        "the prompt is empty, and chosen and rejected do not share one",
    ),
    "alpaca, instruction no text": (
        {"instruction": 5, "chosen": "Yes", "rejected": "No"},
        "instruction and input: expected texts",
    ),
    "alpaca, input no text": (
        {"instruction": "Why?", "input": 5, "chosen": "Yes", "rejected": "No"},
        "instruction and input: expected texts",
    ),
    "a transcript with a preamble": (
        {"chosen": "Rules.\n\nHuman: Why?\n\nAssistant: Yes", "rejected": "Rules.\n\nHuman: Why?\n\nAssistant: No"},
        "the transcript begins with text that nobody speaks",
    ),
    "alpaca, half a history": (
        {"instruction": "Why?", "history": [["Hi"]], "chosen": "Yes", "rejected": "No"},
        "history: expected a list of [question, answer] texts",
    ),
    "a role that is no text": (
        SAME | {"prompt": [{"role": ["user"], "content": "Why?"}]},
        "prompt: unknown role ['user']; known: human, user, gpt, assistant, system",
    ),
    "half a character": (
        SAME | {"chosen": "\ud800"},
        "the text is not valid Unicode: surrogates not allowed ('\\ud800')",
    ),
    "prompt blank": (SAME | {"prompt": " "}, "turn 1 of the prompt is empty"),
    "prompt of no text": (SAME | {"prompt": 5}, "prompt: expected a text or turns, found int"),
    "a blank turn": (
        SAME | {"prompt": [user("Hi"), assistant(""), user("Why?")]},
        "turn 2 of the prompt is empty",
    ),
    "the assistant begins": (
        SAME | {"prompt": [assistant("Hi"), *ASKED]},
        "turn 1 of the prompt is the assistant's, expected the user's",
    ),
    "the user speaks twice": (
        SAME | {"prompt": [user("Hi"), user("Why?")]},
        "turn 2 of the prompt is the user's, expected the assistant's",
    ),
    "the user speaks twice after a system turn": (
        SAME | {"prompt": [system("Be brief."), user("Hi"), user("Why?")]},
        "turn 2 of the prompt is the user's, expected the assistant's",
    ),
    "a system turn in the middle": (
        SAME | {"prompt": [user("Hi"), system("Be brief."), user("Why?")]},
        "turn 2 of the prompt is the system's, expected the assistant's",
    ),
    "the assistant has the last word": (
        SAME | {"prompt": [user("Hi"), assistant("Hello")]},
        "the prompt ends with the assistant's turn, expected the user's",
    ),
    "an unknown role": (
        SAME | {"prompt": [user("Hi"), {"role": "tool", "content": "5"}, user("Why?")]},
        "prompt: unknown role 'tool'; known: human, user, gpt, assistant, system",
    ),
    "an unknown speaker": (
        {"conversations": [{"from": "observation", "value": "5"}], "chosen": gpt("Yes"), "rejected": gpt("No")},
        "conversations: unknown role 'observation'; known: human, user, gpt, assistant, system",
    ),
    "a turn without content": (
        SAME | {"prompt": [{"role": "user"}]},
        "prompt: a turn's content is NoneType, expected text",
    ),
    "a turn with parts for content": (
        SAME | {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]},
        "prompt: a turn's content is list, expected text",
    ),
    "a transcript in which the assistant speaks twice": (
        {
            "chosen": "\n\nHuman: Why?\n\nAssistant: Well\n\nAssistant: Yes",
            "rejected": "\n\nHuman: Why?\n\nAssistant: No",
        },
        "chosen: expected one assistant turn after the prompt, found assistant → assistant",
    ),
}


@pytest.mark.parametrize(("raw", "reason"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_row_is_refused_with_the_reason(raw, reason):
    with pytest.raises(BadRow) as caught:
        canonical(raw, "")
    assert str(caught.value) == reason


@pytest.mark.parametrize("side", ["preferred_output", "non_preferred_output"])
def test_an_openai_preference_without_one_side_is_refused(side):
    raw = {
        "input": {"messages": ASKED},
        "preferred_output": [assistant("Yes")],
        "non_preferred_output": [assistant("No")],
    }
    raw[side] = None

    with pytest.raises(BadRow, match="rejected" if "non" in side else "chosen"):
        canonical(raw, "")


# --- files -----------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"Question {n}?", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in (1, 2, 3)]


def write_json(path):
    path.write_text(json.dumps(ROWS, indent=1))


def write_jsonl(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_jsonl_gz(path):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))


def write_csv(path):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "chosen", "rejected"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("name", "write", "places"),
    [
        ("rows.json", write_json, [", row 1", ", row 2", ", row 3"]),
        ("rows.jsonl", write_jsonl, [":1", ":2", ":3"]),
        ("rows.jsonl.gz", write_jsonl_gz, [":1", ":2", ":3"]),
        ("rows.csv", write_csv, [":2", ":3", ":4"]),  # the first line names the columns
        ("rows.parquet", write_parquet, [", row 1", ", row 2", ", row 3"]),
    ],
)
def test_every_kind_of_file_is_read_in_order_and_each_row_knows_its_place(tmp_path, name, write, places):
    path = tmp_path / name
    write(path)

    rows, refused = read(path)

    assert refused == []
    assert [row.where for row in rows] == [f"{path}{place}" for place in places]
    assert [row.prompt for row in rows] == [(user(f"Question {n}?"),) for n in (1, 2, 3)]
    assert [(row.chosen, row.rejected) for row in rows] == [(f"good {n}", f"bad {n}") for n in (1, 2, 3)]


def test_nested_turns_survive_parquet(tmp_path):
    raw = [{"chosen": [*TALKED, assistant("Yes")], "rejected": [*TALKED, assistant("No")]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(raw), tmp_path / "rows.parquet")

    (row,), _ = read(tmp_path / "rows.parquet")

    assert (row.prompt, row.chosen, row.rejected) == (tuple(TALKED), "Yes", "No")


@pytest.fixture
def quiet_datasets(tmp_path, monkeypatch):
    """`datasets` without progress bars, its cache in `tmp_path`, the hub switched off."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def test_a_data_set_saved_to_disk(tmp_path, quiet_datasets):
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)

    rows, refused = read(folder)

    assert refused == []
    assert [(row.where, row.chosen) for row in rows] == [(f"{folder}[train], row {n}", f"good {n}") for n in (1, 2, 3)]


def test_data_sets_saved_to_disk_are_chosen_by_split(tmp_path, quiet_datasets):
    folder = tmp_path / "saved"
    whole = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": whole.select([0, 1]), "test": whole.select([2])}).save_to_disk(folder)

    assert [row.chosen for row in read(folder)[0]] == ["good 1", "good 2"]
    assert [row.chosen for row in read(folder, split="test")[0]] == ["good 3"]
    assert [row.chosen for row in read(folder, split="train", limit=1)[0]] == ["good 1"]
    with pytest.raises(UserError, match=r"saved: the data set can't be loaded \(split 'validation'\)"):
        read(folder, split="validation")


def test_a_folder_of_jsonl_files_is_read_by_split(tmp_path, quiet_datasets):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl")
    (folder / "test.jsonl").write_text(json.dumps(ROWS[1]) + "\n")

    rows, refused = read(folder)
    held_out, _ = read(folder, split="test")

    assert refused == []
    assert [row.chosen for row in rows] == ["good 1", "good 2", "good 3"]
    assert [(row.where, row.chosen) for row in held_out] == [(f"{folder}[test], row 1", "good 2")]


@pytest.mark.parametrize("name", ["no-such-org/no-such-data", "no-such-data"])
def test_a_hub_data_set_out_of_reach_is_one_line(name, quiet_datasets):
    with pytest.raises(UserError) as caught:
        read(name, split="train_prefs")

    (line,) = caught.value.lines
    assert line.startswith(f"{name}: the data set can't be loaded (split 'train_prefs'): ")
    assert "\n" not in line


def test_invalid_json_is_refused_at_its_own_line(write_jsonl):
    good = [{"prompt": f"{n}?", "chosen": "Yes", "rejected": "No"} for n in range(1, 1001)]
    lines = [*good[:730], '{"prompt": "731?", "chosen": "Yes", "rejected": }', *good[731:]]
    path = write_jsonl("rows.jsonl", lines)

    rows, refused = read(path)

    assert refused == [Refused(f"{path}:731", "not valid JSON: Expecting value at column 49")]
    assert [row.where for row in rows] == [f"{path}:{n}" for n in range(1, 1001) if n != 731]


def test_blank_lines_count_as_lines_but_are_no_rows(write_jsonl):
    path = write_jsonl("rows.jsonl", [ROWS[0], "", "  ", "[]", ROWS[1]])

    rows, refused = read(path)

    assert [row.where for row in rows] == [f"{path}:1", f"{path}:5"]
    assert refused == [Refused(f"{path}:4", "not an object with keys but list")]


def test_a_line_separator_within_a_text_ends_no_line(write_jsonl):
    path = write_jsonl("rows.jsonl", [json.dumps(ROWS[0] | {"chosen": "a\u2028b\u0085c"}, ensure_ascii=False), ROWS[1]])

    rows, refused = read(path)

    assert refused == []
    assert [(row.where, row.chosen) for row in rows] == [(f"{path}:1", "a\u2028b\u0085c"), (f"{path}:2", "good 2")]


def test_lines_may_end_as_on_windows(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\r\n".join(json.dumps(row).encode() for row in ROWS))

    assert [row.chosen for row in read(tmp_path / "rows.jsonl")[0]] == ["good 1", "good 2", "good 3"]


def test_a_csv_from_a_spreadsheet(tmp_path):
    """A byte order mark, lines within a field, and rows that are short or blank."""
    path = tmp_path / "rows.csv"
    lines = ["prompt,chosen,rejected", '"Why?', 'Really?","Yes, sir",No', "How?,,No", "", "Who?,Me", ""]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())

    (row,), refused = read(path)

    assert (row.prompt, row.chosen, row.rejected) == ((user("Why?\r\nReally?"),), "Yes, sir", "No")
    assert refused == [
        Refused(f"{path}:4", "chosen: the answer is empty"),
        Refused(f"{path}:6", "no 'rejected' answer: a preference row needs both; this one has prompt, chosen"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("rows.json", b'[{"prompt": "Why?"},\n{"prompt": ]\n', ":2: not valid JSON: Expecting value"),
        ("rows.json", b"[" + b"1" * 5000 + b"]", ": can't be read: "),
        ("rows.json", b'{"prompt": "Why?"}', ": expected a list of rows, found dict; one row a line is .jsonl"),
        ("rows.jsonl", b'{"prompt": "\xe9"}\n', ": can't be read: 'utf-8' codec can't decode byte 0xe9 "),
        ("rows.jsonl.gz", b'{"prompt": "Why?"}\n', ": can't be read: Not a gzipped file"),
        ("rows.jsonl.gz", gzip.compress(b"{}\n" * 999)[:-12], ": can't be read: Compressed file ended before"),
        ("rows.parquet", b"PAR1 and nothing else", ": can't be read: "),
        ("rows.txt", b"Why?", ": expected a file that ends in .jsonl, .jsonl.gz, .json, .csv, .parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(UserError) as caught:
        read(path)

    (line,) = caught.value.lines
    assert line.startswith(f"{path}{complaint}")
    assert "\n" not in line


def test_a_number_too_long_for_python_refuses_its_row_alone(write_jsonl):
    long = '{"prompt": "?", "chosen": "Yes", "rejected": "No", "id": ' + "1" * 5000 + "}"
    path = write_jsonl("rows.jsonl", [{"prompt": "1?", "chosen": "Yes", "rejected": "No"}, long])
    rows, refused = read(path)
    assert len(rows) == 1
    assert refused == [Refused(f"{path}:2", "not readable JSON: nested too deeply, or a number too long")]


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError) as caught:
        read(tmp_path / "gone.jsonl")

    assert caught.value.lines == (f"{tmp_path}/gone.jsonl: there is no such file",)


def test_an_empty_file_has_no_rows(tmp_path):
    (tmp_path / "rows.jsonl").touch()

    assert read(tmp_path / "rows.jsonl") == ([], [])


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def ten(write_jsonl) -> str:
    return write_jsonl("ten.jsonl", [{"prompt": f"{n}?", "chosen": str(n), "rejected": "No"} for n in range(1, 11)])


def chosen(rows) -> list[int]:
    return [int(row.chosen) for row in rows]


def test_a_limit_takes_the_first_rows(ten):
    assert chosen(read(ten, limit=3)[0]) == [1, 2, 3]
    assert chosen(read(ten, limit=99)[0]) == list(range(1, 11))
    assert chosen(read(ten, limit=2)[0]) == [1, 2]


def test_a_source_has_a_limit_and_split_of_its_own(ten, write_jsonl):
    other = write_jsonl("other.jsonl", [{"prompt": f"{n}?", "chosen": str(n), "rejected": "No"} for n in range(11, 21)])

    rows, _ = preferences((Source(path=ten, limit=2), Source(path=other), Source(path=ten, limit=7)), "train", 4, 0)

    assert chosen(rows) == [1, 2, 11, 12, 13, 14, 1, 2, 3, 4, 5, 6, 7]


def test_a_source_has_a_split_of_its_own(tmp_path, quiet_datasets):
    folder = tmp_path / "saved"
    whole = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": whole.select([0, 1]), "test": whole.select([2])}).save_to_disk(folder)

    rows, _ = preferences((Source(path=str(folder), split="test"), Source(path=str(folder))), "train", None, 0)

    assert [row.chosen for row in rows] == ["good 3", "good 1", "good 2"]


def test_a_refused_row_counts_towards_the_limit(write_jsonl):
    path = write_jsonl("rows.jsonl", ["{", *ROWS])

    rows, refused = read(path, limit=2)

    assert [row.chosen for row in rows] == ["good 1"]
    assert [row.where for row in refused] == [f"{path}:1"]


def test_nothing_is_read_beyond_the_limit(write_jsonl):
    path = write_jsonl("rows.jsonl", [ROWS[0], "{", "{"])

    assert len(read(path, limit=1)[1]) == 0


def test_a_whole_weight_repeats_every_row(ten):
    assert sorted(chosen(read(ten, weight=3.0)[0])) == sorted([*range(1, 11)] * 3)


def test_half_a_weight_takes_a_random_half_of_the_rows_once_each(ten):
    halves = [chosen(read(ten, weight=0.5, seed=seed)[0]) for seed in range(20)]

    for half in halves:
        assert len(half) == len(set(half)) == 5
        assert set(half) <= set(range(1, 11))
    assert len({tuple(sorted(half)) for half in halves}) > 10  # the seed decides which
    assert {n for half in halves for n in half} == set(range(1, 11))
    assert chosen(read(ten, weight=0.5, seed=7)[0]) == halves[7]  # and nothing else does


def test_a_weight_of_two_and_a_half_takes_every_row_twice_and_half_of_them_thrice(ten):
    taken = chosen(read(ten, weight=2.5)[0])

    assert sorted(taken.count(n) for n in range(1, 11)) == [2] * 5 + [3] * 5


def test_refused_rows_are_listed_once_whatever_the_weight(write_jsonl):
    path = write_jsonl("rows.jsonl", [ROWS[0], "{"])

    rows, refused = read(path, weight=3.0)

    assert (len(rows), len(refused)) == (3, 1)


def test_refused_rows_of_all_sources_are_listed_in_order(write_jsonl):
    first = write_jsonl("first.jsonl", ["{", ROWS[0]])
    second = write_jsonl("second.jsonl", [ROWS[1], {"prompt": "Why?", "chosen": "Yes"}])

    rows, refused = preferences((Source(path=first), Source(path=second)), "train", None, 0)

    assert [row.where for row in rows] == [f"{first}:2", f"{second}:1"]
    assert [row.where for row in refused] == [f"{first}:1", f"{second}:2"]


# --- real data -------------------------------------------------------------------------------------------------------


def raw_lines(path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_hh_rows_lose_nothing_but_white_space(shared_data):
    path = shared_data / "hh_harmless.jsonl.gz"
    speaker = {"user": "Human", "assistant": "Assistant"}

    rows, refused = read(path)

    assert (len(rows), len(refused)) == (1790, 10)
    raw = raw_lines(path)
    for row in rows:
        original = raw[int(row.where.rpartition(":")[2]) - 1]
        for side in ("chosen", "rejected"):
            turns = [*row.prompt, assistant(getattr(row, side))]
            again = " ".join(f"{speaker[turn['role']]}: {turn['content']}" for turn in turns)
            assert again.split() == original[side].split()


def test_hh_rows_are_refused_for_a_reason(shared_data):
    """The ten were looked at by hand: three lack an answer, seven have the assistant speaking twice in a row."""
    path = shared_data / "hh_harmless.jsonl.gz"

    _, refused = read(path)

    lines = {int(row.where.removeprefix(f"{path}:")): row.reason for row in refused}
    assert sorted(lines) == [128, 159, 234, 279, 652, 1099, 1170, 1210, 1670, 1761]
    assert {line for line, reason in lines.items() if reason == "chosen: the answer is empty"} == {159, 1099, 1670}
    twice = re.compile(r"found assistant → assistant$|is the assistant's, expected the user's$")
    assert {line for line, reason in lines.items() if twice.search(reason)} == set(lines) - {159, 1099, 1670}


def test_alpaca_eval_rows_are_all_used(shared_data):
    path = shared_data / "alpaca_eval_prefs.jsonl.gz"

    rows, refused = read(path)

    assert refused == []
    assert [(list(row.prompt), row.chosen, row.rejected) for row in rows] == [
        ([user(raw["prompt"])], raw["chosen"][1]["content"], raw["rejected"][1]["content"]) for raw in raw_lines(path)
    ]
    assert len(rows) == 605


def test_alpaca_eval_rows_have_the_margins_of_their_scores(shared_data):
    """Counted apart, with jq: 248 verdicts were certain, and the least certain saw 2.1 points."""
    path = shared_data / "alpaca_eval_prefs.jsonl.gz"

    margins = [row.margin for row in read(path)[0]]

    assert margins == [raw["score_chosen"] - raw["score_rejected"] for raw in raw_lines(path)]
    assert (min(margins), max(margins), margins.count(10.0)) == (pytest.approx(2.1), 10.0, 248)


def test_sharegpt_rows_are_all_used(shared_data):
    path = shared_data / "dpo_en_demo.json"

    rows, refused = read(path)

    assert refused == []
    assert [([turn["content"] for turn in row.prompt], row.chosen, row.rejected) for row in rows] == [
        ([turn["value"] for turn in raw["conversations"]], raw["chosen"]["value"], raw["rejected"]["value"])
        for raw in json.loads(path.read_text(encoding="utf-8"))
    ]
    assert [row.margin for row in rows] == [None] * 300


@pytest.mark.parametrize(
    ("name", "count", "keys"),
    [("alpaca_en_demo.json", 999, "instruction, input, output"), ("kto_en_demo.json", 300, "messages, label")],
)
def test_rows_that_are_no_preferences_are_all_refused_and_the_missing_side_is_named(shared_data, name, count, keys):
    path = shared_data / name

    rows, refused = read(path)

    assert rows == []
    assert [row.where for row in refused] == [f"{path}, row {n}" for n in range(1, count + 1)]
    assert {row.reason for row in refused} == {f"no 'chosen' answer: a preference row needs both; this one has {keys}"}


# --- what once went wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": None, "conversations": [{"from": "human", "value": "Why?"}], "chosen": "Yes", "rejected": "No"},
        {"prompt": None, "instruction": "Why?", "input": None, "chosen": "Yes", "rejected": "No"},
        {"instruction": "Why?", "chosen": None, "rejected": None, "output": ["Yes", "No"]},
        {"preferred_output": None, "prompt": "Why?", "chosen": "Yes", "rejected": "No"},
        {"prompt": [{"role": None, "from": "human", "content": "Why?"}], "chosen": "Yes", "rejected": "No"},
    ],
)
def test_null_columns_of_other_shapes_do_not_matter(row):
    """Parquet files and `datasets` give every row every column."""
    found = canonical(row, "here")
    assert (found.prompt, found.chosen, found.rejected) == ((user("Why?"),), "Yes", "No")


def test_a_transcript_prompt_may_end_with_the_assistants_cue():
    row = {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": "Yes", "rejected": "No"}
    assert canonical(row, "here").prompt == (user("Why?"),)


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    for name, text in (("a.jsonl", json.dumps(SAME)), ("a.json", json.dumps([SAME]))):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        rows, refused = read(tmp_path / name)
        assert (len(rows), refused) == (1, [])


def test_ultrafeedbacks_own_columns_are_understood():
    """It has `messages` beside `prompt`, which hold the chosen answer once more."""
    chosen, rejected = [user("Why?"), assistant("Yes")], [user("Why?"), assistant("No")]
    found = canonical({"prompt": "Why?", "messages": chosen, "chosen": chosen, "rejected": rejected}, "here")
    assert (found.prompt, found.chosen, found.rejected) == ((user("Why?"),), "Yes", "No")
