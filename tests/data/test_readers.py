"""Files of every kind, folders and data sets: each row knows its place, and what can't be read is said in one line."""

import csv
import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from qalign.config.stages import Source
from qalign.data.formats import Dialogue, PlainText, dialogues, preferences, prompts
from qalign.errors import UserError
from tests.conftest import ROOT
from tests.data.shapes import ALL, ASKED, RANKED, TALKED, YES, user

ROWS = [{"prompt": f"Question {n}?", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in (1, 2, 3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def read(path, split="train", limit=None, into=preferences):
    return into((Source(path=str(path)),), split, limit, 0)


def said(turn) -> str:
    return turn["content"]


def chosen(rows) -> list[str]:
    return [said(row.chosen) for row in rows]


def write_csv(path):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "chosen", "rejected"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path, rows=ROWS):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


# --- files -----------------------------------------------------------------------------------------------------------

KINDS = {
    "rows.json": (lambda path: path.write_text(json.dumps(ROWS, indent=1)), ", row 1|, row 2|, row 3"),
    "rows.jsonl": (lambda path: path.write_text(LINES), ":1|:2|:3"),
    "rows.jsonl.gz": (lambda path: path.write_bytes(gzip.compress(LINES.encode())), ":1|:2|:3"),
    "rows.csv": (write_csv, ":2|:3|:4"),  # the first line names the columns
    "rows.parquet": (write_parquet, ", row 1|, row 2|, row 3"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_is_read_in_order_and_each_row_knows_its_place(tmp_path, name):
    path, (write, places) = tmp_path / name, KINDS[name]
    write(path)

    rows, refused = read(path)

    assert refused == []
    assert [row.where for row in rows] == [f"{path}{place}" for place in places.split("|")]
    assert [row.prompt for row in rows] == [(user(f"Question {n}?"),) for n in (1, 2, 3)]
    assert [(said(row.chosen), said(row.rejected)) for row in rows] == [(f"good {n}", f"bad {n}") for n in (1, 2, 3)]


ARRAY = json.dumps(ROWS)
ROW = ROWS[0]
MADE_OTHERWISE = {  # name: (file, its content, places of its rows)
    "lines in .json": ("rows.json", LINES, ":1|:2|:3"),
    "one line in .json": ("rows.json", json.dumps(ROW), ":1"),
    "blank lines first": ("rows.json", "\n\n" + LINES, ":3|:4|:5"),
    "one row over many lines": ("rows.json", json.dumps(ROW, indent=2), ":1"),
    "rows over many lines": ("rows.json", "\n".join(json.dumps(row, indent=2) for row in ROWS), ":1|:6|:11"),
    "an array in .jsonl": ("rows.jsonl", ARRAY, ", row 1|, row 2|, row 3"),
    "an array over many lines in .jsonl": ("rows.jsonl", json.dumps(ROWS, indent=1), ", row 1|, row 2|, row 3"),
    "an array, one row a line": ("rows.jsonl", ARRAY.replace("}, {", "},\n{"), ", row 1|, row 2|, row 3"),
    "rows on one line": ("rows.jsonl", LINES.replace("\n", ""), ":1|:1|:1"),
    "rows with commas after them": ("rows.jsonl", LINES.replace("}\n", "},\n"), ":1|:2|:3"),
    "ndjson": ("rows.ndjson", LINES, ":1|:2|:3"),
    "under data": ("rows.json", json.dumps({"data": ROWS}), ", row 1|, row 2|, row 3"),
    "under rows, with a version": (
        "rows.json",
        json.dumps({"v": 1, "rows": ROWS}, indent=1),
        ", row 1|, row 2|, row 3",
    ),
    "under the split": ("rows.json", json.dumps({"test": [], "train": ROWS}), ", row 1|, row 2|, row 3"),
    "UTF-16": ("rows.jsonl", LINES.encode("utf-16"), ":1|:2|:3"),
    "packed array": ("rows.json.gz", gzip.compress(ARRAY.encode()), ", row 1|, row 2|, row 3"),
    "semicolons": ("rows.csv", "prompt;chosen;rejected\nQuestion 1?;good 1;bad 1\n", ":2"),
    "tabs": ("rows.tsv", "prompt\tchosen\trejected\nQuestion 1?\tgood 1\tbad 1\n", ":2"),
    "packed CSV": ("rows.csv.gz", gzip.compress(b"prompt,chosen,rejected\nQuestion 1?,good 1,bad 1\n"), ":2"),
}


@pytest.mark.parametrize(("name", "content", "places"), MADE_OTHERWISE.values(), ids=MADE_OTHERWISE.keys())
def test_what_is_plain_is_read_whatever_the_file_is_called(tmp_path, name, content, places):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)

    rows, refused = read(path)

    assert refused == []
    assert [row.where for row in rows] == [f"{path}{place}" for place in places.split("|")]
    assert chosen(rows) == [f"good {n}" for n in range(1, len(rows) + 1)]


def test_a_csv_row_with_too_many_fields_is_refused_alone(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected\nWhy?,Yes, sir,No\nQuestion 1?,good 1,bad 1\n")

    rows, (bad,) = read(tmp_path / "rows.csv")

    assert (chosen(rows), bad.where) == (["good 1"], f"{tmp_path}/rows.csv:2")
    assert "more fields than the first line has names" in bad.reason


def test_files_have_no_revision_and_are_not_streamed(write_jsonl):
    path = write_jsonl("rows.jsonl", ROWS)
    for option in ({"revision": "main"}, {"streaming": True}):
        with pytest.raises(UserError, match="is a file; revision and streaming are for data sets of the hub"):
            preferences((Source(path=str(path), **option),), "train", None, 0)


def test_rows_of_all_shapes_may_stand_in_one_file(write_jsonl):
    path = write_jsonl("mixed.jsonl", list(ALL.values()))

    asked, refused = read(path, into=prompts)
    learned, _ = read(path, into=dialogues)
    ranked, _ = read(path)

    assert refused == []
    assert [row.where for row in asked] == [f"{path}:{number}" for number in range(1, len(ALL) + 1)]
    assert [list(row.prompt) for row in ranked] == [prompt for prompt, _ in RANKED.values()]
    assert len(ranked) < len(learned) < len(asked)


def test_dialogues_texts_and_labels_may_stand_in_one_parquet_file(tmp_path):
    """Parquet gives every row every column, null where the row has none."""
    answered, path = [*TALKED, YES], tmp_path / "rows.parquet"
    raw = [{"messages": answered, "label": True}, {"messages": answered, "label": False}, {"text": "Once."}]
    write_parquet(path, [{key: row.get(key) for key in ("messages", "label", "text")} for row in raw])

    rows, refused = read(path, into=dialogues)

    assert rows == [Dialogue(tuple(answered), 0, f"{path}, row 1"), PlainText("Once.", f"{path}, row 3")]
    assert [row.where for row in refused] == [f"{path}, row 2"]


def test_turns_and_columns_survive_parquet(tmp_path):
    turns = {"chosen": [*TALKED, YES], "rejected": [*TALKED, {"role": "assistant", "content": "No"}], "answer": 4}
    write_parquet(tmp_path / "rows.parquet", [turns])

    (row,), _ = read(tmp_path / "rows.parquet")
    (asked,), _ = read(tmp_path / "rows.parquet", into=prompts)

    assert (row.prompt, said(row.chosen), said(row.rejected)) == (tuple(TALKED), "Yes", "No")
    assert (asked.turns, asked.columns) == (tuple(TALKED), turns)


THREE = [(1, "good 1"), (2, "good 2"), (3, "good 3")]
FIRST, SECOND, _ = LINES.splitlines(keepends=True)
PARTED = json.dumps(ROWS[0] | {"chosen": "a\u2028b\u0085c"}, ensure_ascii=False)
LONG_NUMBER = '{"prompt": "?", "chosen": "Yes", "rejected": "No", "id": ' + "1" * 5000 + "}"
TEXTS = {  # name: (text of a .jsonl file, (line, chosen) of the rows, {line: reason} of those refused)
    "lines as on Windows": (LINES.replace("\n", "\r\n"), THREE, {}),
    "a byte order mark": ("\ufeff" + LINES, THREE, {}),
    "no line": ("", [], {}),
    "blank lines": (FIRST + "\n  \n[]\n" + SECOND, [(1, "good 1"), (5, "good 2")], {4: "expected an object with keys"}),
    "a line separator within a text": (f"{PARTED}\n{SECOND}", [(1, "a\u2028b\u0085c"), (2, "good 2")], {}),
    "a first line cut short": ('{"prompt": "Wh\n' + SECOND, [(2, "good 2")], {1: "Unterminated string"}),
    "no JSON": (FIRST + '{"chosen": }\n' + SECOND, [(1, "good 1"), (3, "good 2")],
                {2: "not valid JSON: Expecting value at column 12"}),
    "a number too long for Python": (FIRST + LONG_NUMBER, [(1, "good 1")], {2: "a number too long"}),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected", "reasons"), TEXTS.values(), ids=TEXTS.keys())
def test_each_line_of_a_jsonl_file_is_a_row_or_refused_alone(tmp_path, text, expected, reasons):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text.encode())

    rows, refused = read(path)

    assert [(row.where, said(row.chosen)) for row in rows] == [
        (f"{path}:{number}", answer) for number, answer in expected
    ]
    assert [row.where for row in refused] == [f"{path}:{number}" for number in reasons]
    for row, reason in zip(refused, reasons.values(), strict=True):
        assert reason in row.reason


def test_a_byte_order_mark_before_a_json_array_is_no_part_of_it(tmp_path):
    (tmp_path / "rows.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode())

    assert chosen(read(tmp_path / "rows.json")[0]) == ["good 1", "good 2", "good 3"]


def test_a_csv_from_a_spreadsheet(tmp_path):
    """A byte order mark, lines within a field, and rows that are short or blank."""
    path = tmp_path / "rows.csv"
    lines = ["prompt,chosen,rejected", '"Why?', 'Really?","Yes, sir",No', "How?,,No", "", "Who?,Me", ""]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())

    (row,), refused = read(path)

    assert row.where == f"{path}:2"
    assert (row.prompt, said(row.chosen), said(row.rejected)) == ((user("Why?\r\nReally?"),), "Yes, sir", "No")
    assert [bad.where for bad in refused] == [f"{path}:4", f"{path}:6"]
    assert "chosen" in refused[0].reason
    assert "rejected" in refused[1].reason


def test_a_csv_of_labelled_answers(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion,label\nWhy?,Yes,True\nWhy?,No,False\n")

    rows, refused = read(tmp_path / "rows.csv", into=dialogues)

    assert rows == [Dialogue((*ASKED, YES), 1, f"{tmp_path}/rows.csv:2")]
    assert [row.where for row in refused] == [f"{tmp_path}/rows.csv:3"]


BROKEN = {
    "a bad line": ("rows.json", b'[{"prompt": "Why?"},\n{"prompt": ]\n', ":2: not valid JSON: Expecting value"),
    "a long number": ("rows.json", b"[" + b"1" * 5000 + b"]", ": can't be read: "),
    "one number": ("rows.json", b"7", ": expected rows, found one int"),
    "an array cut short": ("rows.jsonl", b'[{"prompt": "Why?"},\n', ":2: not valid JSON: "),
    "a column twice": ("rows.csv", b"prompt,chosen,chosen\na,b,c\n", ":1: has the column 'chosen' twice"),
    "an open quote": (
        "rows.csv",
        b'prompt,chosen,rejected\n"a,b,c\nd,e,f\n',
        ":2: not valid CSV: unexpected end of data",
    ),
    "Latin-1": (
        "rows.jsonl",
        b'{"prompt": "\xe9"}\n',
        ": its text isn't UTF-8 (invalid continuation byte: 0xe9); save",
    ),
    "no gzip": ("rows.jsonl.gz", b'{"prompt": "Why?"}\n', ": can't be read: Not a gzipped file"),
    "half a gzip": (
        "rows.jsonl.gz",
        gzip.compress(b"{}\n" * 999, mtime=0)[:-12],
        ": can't be read: Compressed file ended",
    ),
    "no parquet": ("rows.parquet", b"PAR1 and nothing else", ": can't be read: "),
    "another kind": (
        "rows.txt",
        b"Why?",
        ": expected a file that ends in .jsonl, .json, .ndjson, .csv, .tsv, .parquet",
    ),
    "no file": ("gone.jsonl", None, ": there is no such file"),
}


@pytest.mark.parametrize(("name", "content", "complaint"), BROKEN.values(), ids=BROKEN.keys())
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, content, complaint):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(UserError) as caught:
        read(path)

    (line,) = caught.value.lines
    assert line.startswith(f"{path}{complaint}")
    assert "\n" not in line


def test_the_demos_questions_are_all_used():
    rows, refused = read(ROOT / "recipes" / "data" / "house_style_train.jsonl", into=prompts)

    assert (len(rows), refused) == (300, [])
    assert [[turn["content"] for turn in row.turns] for row in rows] == [[row.columns["prompt"]] for row in rows]


# --- folders and data sets -------------------------------------------------------------------------------------------


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
    assert [(row.where, said(row.chosen)) for row in rows] == [
        (f"{folder}[train], row {n}", f"good {n}") for n in (1, 2, 3)
    ]


def test_data_sets_saved_to_disk_are_chosen_by_the_split_of_the_source_or_of_the_stage(tmp_path, quiet_datasets):
    whole, folder = datasets.Dataset.from_list(ROWS), tmp_path / "saved"
    datasets.DatasetDict({"train": whole.select([0, 1]), "test": whole.select([2])}).save_to_disk(folder)

    both = (Source(path=str(folder), split="test"), Source(path=str(folder)))
    assert chosen(preferences(both, "train", None, 0)[0]) == ["good 3", "good 1", "good 2"]
    assert chosen(read(folder, split="test")[0]) == ["good 3"]
    assert chosen(read(folder, limit=1)[0]) == ["good 1"]
    with pytest.raises(UserError, match=r"saved: the data set can't be loaded \(split 'validation'\).*train, test"):
        read(folder, split="validation")


def test_a_folder_of_jsonl_files_is_read_by_split(tmp_path, quiet_datasets):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text(LINES)
    (folder / "test.jsonl").write_text(json.dumps(ROWS[1]) + "\n")

    rows, refused = read(folder)
    held_out, _ = read(folder, split="test")

    assert (chosen(rows), refused) == (["good 1", "good 2", "good 3"], [])
    assert [(row.where, said(row.chosen)) for row in held_out] == [(f"{folder}[test], row 1", "good 2")]


@pytest.mark.parametrize("name", ["no-such-org/no-such-data", "no-such-data"])
def test_a_hub_data_set_out_of_reach_is_one_line(name, quiet_datasets):
    with pytest.raises(UserError) as caught:
        read(name, split="train_prefs")

    (line,) = caught.value.lines
    assert line.startswith(f"{name}: the data set can't be loaded (split 'train_prefs'): ")
    assert "\n" not in line
