"""The forms in which tools and spreadsheets write rows: read as what they are, or refused in one line."""

import json

import pytest

from qalign.config.stages import Source
from qalign.data.formats import dialogues, preferences
from qalign.errors import UserError

ROWS = [{"prompt": f"Question {n}?", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in (1, 2, 3)]
COLUMNS = {key: [row[key] for row in ROWS] for key in ROWS[0]}
TALK = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Yes"}]
VIEWED = [{"row_idx": n, "row": row, "truncated_cells": []} for n, row in enumerate(ROWS)]


def read(path, content, split="train", into=preferences):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return into((Source(path=str(path)),), split, None, 0)


OBJECTS = {
    "any name": {"results": ROWS},
    "a name beside facts": {"version": "1.0", "results": ROWS, "by": {"name": "me"}, "tags": ["a", "b"]},
    "one within another": {"dataset": {"rows": ROWS}},
    "two within another": {"meta": {"n": 3}, "payload": {"set": {"pairs": ROWS}}},
    "the split": {"test": ROWS[:1], "train": ROWS},
    "the split within another": {"data": {"test": ROWS[:1], "train": ROWS}},
    "the split as columns": {"train": COLUMNS},
    "columns": COLUMNS,
    "columns with objects in cells": COLUMNS | {"meta": [{"a": 1}, {"a": 2}, {"a": 3}]},
    "pandas' columns": {key: dict(zip("012", values, strict=True)) for key, values in COLUMNS.items()},
    "pandas' index": dict(zip("012", ROWS, strict=True)),
    "pandas' split": {"columns": list(COLUMNS), "index": [0, 1, 2], "data": [list(row.values()) for row in ROWS]},
    "pandas' table": {"schema": {"fields": [{"name": "prompt"}]}, "data": ROWS},
    "the hub's viewer": {"features": [{"feature_idx": 0, "name": "prompt"}], "rows": VIEWED, "num_rows_total": 3},
}


@pytest.mark.parametrize("indent", [None, 1], ids=["one line", "many lines"])
@pytest.mark.parametrize("value", OBJECTS.values(), ids=OBJECTS.keys())
def test_rows_are_found_inside_an_object(tmp_path, value, indent):
    rows, refused = read(tmp_path / "rows.json", json.dumps(value, indent=indent))

    assert [(row.prompt[0]["content"], row.chosen["content"], row.rejected["content"]) for row in rows] == [
        tuple(row.values()) for row in ROWS
    ]
    assert [row.where for row in rows] == [f"{tmp_path}/rows.json, row {n}" for n in (1, 2, 3)]
    assert refused == []


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK, "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"prompt": "Why?", "completion": "Yes", "sources": [{"text": "a book"}]},
        {"prompt": TALK[:1], "completion": TALK[1:], "sources": [{"text": "a book"}]},
        {"question": "Why?", "answer": "Yes", "train": {"lists": [{"text": "no row"}]}},
    ],
)
def test_an_object_that_is_a_row_itself_is_one(tmp_path, row):
    (found,), refused = read(tmp_path / "rows.json", json.dumps(row), split="other", into=dialogues)

    assert ([turn["content"] for turn in found.turns], refused) == (["Why?", "Yes"], [])


SEVERAL = {
    "splits": ({"test": ROWS, "validation": ROWS}, "has no 'train', but test, validation; name one of them as `split`"),
    "one other split": ({"test": ROWS}, "has no 'train', but test; name"),
    "a split in capitals": ({"Train": ROWS}, "has no 'train', but Train; name"),
    "two lists": ({"results": ROWS, "mistakes": ROWS[:1]}, "holds several lists of rows: results, mistakes; name"),
    "uneven columns": (COLUMNS | {"chosen": ["a"]}, "different lengths (prompt 3, chosen 1, rejected 3)"),
}


@pytest.mark.parametrize(("value", "complaint"), SEVERAL.values(), ids=SEVERAL.keys())
def test_an_object_in_which_several_lists_could_be_meant_is_one_line(tmp_path, value, complaint):
    with pytest.raises(UserError) as caught:
        read(tmp_path / "rows.json", json.dumps(value))
    (line,) = caught.value.lines
    assert line.startswith(f"{tmp_path}/rows.json: ")
    assert complaint in line


@pytest.mark.parametrize("value", [{}, {"data": None}, {"columns": ["prompt"], "data": [5]}, {"a": {"b": 1}}])
def test_an_object_without_rows_is_a_row_that_is_refused(tmp_path, value):
    rows, refused = read(tmp_path / "rows.json", json.dumps(value))

    assert (rows, len(refused)) == ([], 1)


def test_the_list_to_read_is_named_as_split(tmp_path):
    both = json.dumps({"results": ROWS, "mistakes": ROWS[:1]})

    assert len(read(tmp_path / "rows.json", both, split="mistakes")[0]) == 1


def test_rows_that_the_hubs_viewer_cut_are_refused(tmp_path):
    cut = {"row_idx": 1, "row": ROWS[1], "truncated_cells": ["chosen"]}

    (row,), (bad,) = read(tmp_path / "rows.jsonl", f"{json.dumps(VIEWED[0])}\n{json.dumps(cut)}\n")

    assert (row.chosen["content"], bad.where) == ("good 1", f"{tmp_path}/rows.jsonl:2")
    assert "the hub's viewer cut ['chosen']" in bad.reason


WHOLE = json.dumps(ROWS)
BEGINNINGS = {
    "a colon": '{"data":\n' + WHOLE + "}",
    "a key": '{"data"\n: ' + WHOLE + "}",
    "a number": '{"version": 1\n, "data": ' + WHOLE + "\n}",
    "a text": '{"version": "1"\n, "data": ' + WHOLE + "}",
    "an opening": "[\n" + WHOLE[1:],
}


@pytest.mark.parametrize("text", BEGINNINGS.values(), ids=BEGINNINGS.keys())
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_value_may_go_on_after_any_part_of_it(tmp_path, name, text):
    rows, refused = read(tmp_path / name, text)

    assert ([row.chosen["content"] for row in rows], refused) == (["good 1", "good 2", "good 3"], [])


def test_a_key_that_stands_twice_in_an_object_is_not_read_as_the_last(tmp_path):
    twice = '{"prompt": "Why?", "chosen": "Yes", "rejected": "No", "chosen": "Maybe"}'

    (row,), (bad,) = read(tmp_path / "rows.jsonl", f"{twice}\n{json.dumps(ROWS[0])}\n")
    assert (row.chosen["content"], bad.reason) == ("good 1", "has the key 'chosen' twice")
    with pytest.raises(UserError, match=r"rows\.json: .*has the key 'chosen' twice"):
        read(tmp_path / "rows.json", f"[\n{twice}\n]")


# --- CSV -------------------------------------------------------------------------------------------------------------

PLAIN = "prompt,chosen,rejected\nQuestion 1?,good 1,bad 1\n"
TABLES = {  # name: (file, text, line of the row)
    "blanks around names": ("rows.csv", "prompt , chosen, rejected \nQuestion 1?,good 1,bad 1\n", 2),
    "blanks and quotes": ("rows.csv", 'prompt, chosen, rejected\n"Question 1?", "good 1", "bad 1"\n', 2),
    "blank lines first": ("rows.csv", "\n \n,,\n" + PLAIN, 5),
    "Excel's first line": ("rows.csv", "sep=;\n" + PLAIN.replace(",", ";"), 3),
    "Excel's first line in quotes": ("rows.csv", '"sep=|"\r\n' + PLAIN.replace(",", "|"), 3),
    "commas in .tsv": ("rows.tsv", PLAIN, 2),
    "tabs in .csv": ("rows.csv", PLAIN.replace(",", "\t"), 2),
    "semicolons, and a comma in a name": ("rows.csv", PLAIN.replace(",", ";").replace("\n", ';"a, b, c, d"\n', 1), 2),
    "bars": ("rows.csv", PLAIN.replace(",", "|"), 2),
    "pandas' index": ("rows.csv", ",prompt,chosen,rejected\n0,Question 1?,good 1,bad 1\n", 2),
    "empty rows at the end": ("rows.csv", PLAIN + ",,\n,,\n", 2),
    "UTF-16 with tabs": ("rows.csv", PLAIN.replace(",", "\t").encode("utf-16"), 2),
}


@pytest.mark.parametrize(("name", "text", "line"), TABLES.values(), ids=TABLES.keys())
def test_a_table_is_read_as_spreadsheets_write_it(tmp_path, name, text, line):
    (row,), refused = read(tmp_path / name, text)

    assert (row.prompt[0]["content"], row.chosen["content"]) == ("Question 1?", "good 1")
    assert (row.rejected["content"], row.where, refused) == ("bad 1", f"{tmp_path / name}:{line}", [])


def test_a_column_of_texts_in_a_tsv_may_have_commas(tmp_path):
    (row,), refused = read(tmp_path / "rows.tsv", "text\nOnce, long ago; so\n", into=dialogues)

    assert (row.text, refused) == ("Once, long ago; so", [])


def test_lines_are_counted_after_lines_within_a_field(tmp_path):
    rows, _ = read(tmp_path / "rows.csv", '\n"prompt",chosen,rejected\n"a\nb",c,d\n"e\nf",g,h\n')

    assert [(row.where, row.prompt[0]["content"]) for row in rows] == [
        (f"{tmp_path}/rows.csv:3", "a\nb"),
        (f"{tmp_path}/rows.csv:5", "e\nf"),
    ]
