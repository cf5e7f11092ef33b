"""Rows and ids in files: the same as in lists, made once for the same content, and whole or not there at all."""

import json
from dataclasses import replace
from datetime import datetime

import pyarrow as pa
import pyarrow.parquet
import pytest

from qalign.config import cache
from qalign.config.stages import Source
from qalign.data import tokenize
from qalign.data.formats import Dialogue, Labelled, PlainText, Preference, Prompt, collect, dialogues
from qalign.data.rows import rows_hash
from qalign.data.store import rows as row_files
from qalign.data.store import tokens
from qalign.data.store.rows import RowFile, RowPool
from qalign.data.store.tokens import TokenFile, cache_key, outlines, supervised_tokens
from qalign.data.templates import ChatTemplate
from qalign.data.tokenize import encode_dialogues, encode_labelled, encode_pairs, encode_questions
from tests.data.chat_families import FAMILIES, messages
from tests.data.shapes import assistant

TEXTS = [f"Question {number}, {'long ' * (number % 5)}?" for number in range(11)]
ASKED = [messages([("user", text)]) for text in TEXTS]
ASKED[4] = messages([("user", "x" * 900)])  # too long
ASKED[7] = messages([("user", "a <|eot_id|> b")])  # a forged end of turn
LONG = messages([(role, f"{role} {n}") for n in range(6) for role in ("user", "assistant")])
TEMPLATE = FAMILIES["llama3"].prepared()


def in_file(rows: list) -> RowFile:
    pool = RowPool()
    for row in rows:
        pool.append(row)
    return pool.rows(range(len(rows)))


@pytest.fixture(autouse=True)
def large(monkeypatch, tmp_path):
    """Every row counts as too large for the memory, and the cache is empty."""
    monkeypatch.setattr(row_files, "SMALL", 0)
    monkeypatch.setattr(tokens, "AT_ONCE", 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def encoded_rows(monkeypatch) -> list[str]:
    """The places of the rows that are encoded from now on."""
    found, real = [], tokenize._pair
    monkeypatch.setattr(tokenize, "_pair", named(lambda t, row, m: found.append(row.where) or real(t, row, m), "_pair"))
    return found


def named(function, name: str):
    function.__name__ = name
    return function


def pairs() -> list[Preference]:
    kinds = [
        {"margin": 0.1 + 0.2, "chosen_probability": 0.75},
        {},
        {"tools": ({"type": "function", "function": {"name": "look"}},)},
    ]
    rows = [Preference(p, assistant("Yes"), assistant("No"), f"a:{n}", **kinds[n % 2]) for n, p in enumerate(ASKED)]
    return [*rows, Preference((*LONG, *ASKED[0]), assistant("é ü 🙂"), assistant("No"), "a:long")]


def labelled() -> list[Labelled]:
    two = (assistant("Yes"), assistant("No"))
    return [
        Labelled(prompt, two if n % 3 else two[:1], (True, False) if n % 3 else (n % 2 == 0,), f"a:{n}")
        for n, prompt in enumerate(ASKED)
    ]


def talks() -> list[Dialogue | PlainText]:
    rows: list[Dialogue | PlainText] = [
        Dialogue((*prompt, assistant("Yes")), 0, f"a:{n}") for n, prompt in enumerate(ASKED)
    ]
    untrained = frozenset([3])
    return [*rows, Dialogue(tuple(LONG), 0, "a:12", untrained=untrained), PlainText("word " * 300, "a:13")]


def questions() -> list[Prompt]:
    return [Prompt(prompt, f"a:{n}", {"answer": n, "on": datetime(2024, 1, 1)}) for n, prompt in enumerate(ASKED)]


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_in_a_file_are_those_of_the_list_in_the_same_order(monkeypatch, tmp_path, write_jsonl):
    raw = [{"messages": [*prompt, assistant("Yes")]} for prompt in ASKED] + [{"messages": "none"}, {"text": " "}]
    first, second = (str(write_jsonl(f"{name}.jsonl", raw)) for name in "ab")
    sources = (Source(path=first, weight=2.5), Source(path=second, weight=0.5, skip=1, limit=8))
    saw = {"file": [], "list": []}

    def read(kind):
        return dialogues(sources, "train", None, seed=3, saw=lambda source, raw, row: saw[kind].append(row.where))

    in_a_file, refused = read("file")
    monkeypatch.setattr(row_files, "SMALL", 2**24)
    listed, refused_too = read("list")

    assert (type(in_a_file), type(listed)) == (RowFile, list)
    assert [*in_a_file] == listed
    assert rows_hash(in_a_file) == rows_hash(listed), "a stopped run resumes with either"
    assert in_a_file[3:1:-1] == listed[3:1:-1]
    assert in_a_file[-1] == listed[-1]
    assert (refused, saw["file"]) == (refused_too, saw["list"])
    assert len(refused) == 2
    assert not [*(tmp_path / "cache" / "qalign").iterdir()], "the file has no name"


def test_a_list_becomes_a_file_where_it_grows_too_large(monkeypatch):
    monkeypatch.setattr(row_files, "SMALL", 1000)
    pool = RowPool()
    for number in range(90):
        pool.append(f"row {number}")
        assert isinstance(pool.rows([0]), list) == (pool._starts[-1] <= 1000)
    assert [*pool.rows([7, 89, 7])] == ["row 7", "row 89", "row 7"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_a_data_set_streams_into_the_file(tmp_path, monkeypatch, kind, streaming):
    """From local files through `datasets`, the way that the hub's data sets take."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    raw = [{"messages": [*prompt, assistant("Yes")]} for prompt in ASKED]
    folder = tmp_path / "set"
    folder.mkdir()
    if kind == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(raw), folder / "train.parquet", row_group_size=4)
    else:
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raw))

    found, refused = dialogues((Source(path=str(folder), streaming=streaming, limit=9),), "train", None, 0)

    assert isinstance(found, RowFile)
    assert not refused
    assert [row.turns for row in found] == [tuple(row["messages"]) for row in raw[:9]]


# --- ids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encode", "rows"),
    [
        (encode_pairs, pairs()),
        (encode_labelled, labelled()),
        (encode_dialogues, talks()),
        (encode_questions, questions()),
    ],
    ids=["pairs", "labelled", "dialogues", "questions"],
)
def test_ids_in_a_file_are_those_of_the_list(encode, rows, capsys):
    listed, refused = encode(TEMPLATE, rows, 60)

    for source in ("written", "from the cache"):
        in_a_file, refused_too = encode(TEMPLATE, in_file(rows), 60)

        assert not isinstance(in_a_file, list)
        assert ("from the cache" in capsys.readouterr().out) == (source == "from the cache")
        assert [*in_a_file] == listed
        assert [*map(repr, in_a_file)] == [*map(repr, listed)], "a bool stays a bool and a tuple a tuple"
        assert in_a_file[2:5] == listed[2:5]
        assert refused_too == refused
    assert {row.where for row in refused} == {"a:4", "a:7"}
    if isinstance(in_a_file, TokenFile):
        assert [*map(len, outlines(in_a_file))] == [*map(len, listed)]
        assert [row.where for row in outlines(in_a_file)] == [row.where for row in listed]
    if encode is encode_dialogues:
        assert supervised_tokens(in_a_file) == supervised_tokens(listed) > 0


def test_all_rows_refused_is_an_empty_file():
    found, refused = encode_pairs(TEMPLATE, in_file(pairs()), 5)
    assert len(found) == 0
    assert [row.where for row in refused] == [row.where for row in pairs()]


def test_facts_that_the_template_left_out_are_known_from_the_cache_too(encoded_rows):
    asked = [({**turn, "name": "Ann"},) for (turn,) in ASKED]
    rows = [Preference(prompt, assistant("Yes"), assistant("No"), f"a:{n}") for n, prompt in enumerate(asked)]
    for _ in range(2):
        template = replace(TEMPLATE, left_out=set())
        encode_pairs(template, in_file(rows), 60)
        assert template.left_out == {"name"}
    assert len(encoded_rows) == len(rows)


# --- the cache -------------------------------------------------------------------------------------------------------


def changed_tokenizer() -> ChatTemplate:
    template = FAMILIES["llama3"].prepared()
    template.tokenizer.add_tokens(["Question"])
    return template


def dated(day: int) -> ChatTemplate:
    template = FAMILIES["llama3"].prepared()
    template.tokenizer.chat_template = "{{ strftime_now('%d %b') }}" + template.tokenizer.chat_template
    return replace(template, now=datetime(2026, 3, day))


def other_source() -> ChatTemplate:
    template = FAMILIES["llama3"].prepared()
    template.tokenizer.chat_template += "{# a note #}"
    return template


CHANGES = {
    "a row": lambda rows: (TEMPLATE, [*rows[:-1], replace(rows[-1], chosen=assistant("Never"))], 60),
    "the order": lambda rows: (TEMPLATE, [*reversed(rows)], 60),
    "a place": lambda rows: (TEMPLATE, [*rows[:-1], replace(rows[-1], where="b:1")], 60),
    "a margin": lambda rows: (TEMPLATE, [replace(rows[0], margin=2.0), *rows[1:]], 60),
    "the longest": lambda rows: (TEMPLATE, rows, 61),
    "the template": lambda rows: (other_source(), rows, 60),
    "its keywords": lambda rows: (replace(TEMPLATE, kwargs={"thinking": True}), rows, 60),
    "system turns": lambda rows: (replace(TEMPLATE, system_turn="refuse"), rows, 60),
    "its name, which refused rows give": lambda rows: (replace(TEMPLATE, words="mine.jinja"), rows, 60),
    "the date": lambda rows: (dated(2), rows, 60),
    "the tokenizer": lambda rows: (changed_tokenizer(), rows, 60),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_decides_the_ids_decides_the_place_in_the_cache(what):
    before = cache_key(dated(1) if what == "the date" else TEMPLATE, pairs(), tokenize._pair, 60)
    template, rows, longest = CHANGES[what](pairs())

    assert cache_key(template, rows, tokenize._pair, longest) != before
    assert cache_key(TEMPLATE, pairs(), tokenize._labelled, 60) != before
    same = dated(1) if what == "the date" else FAMILIES["llama3"].prepared()
    assert cache_key(same, in_file(pairs()), tokenize._pair, 60) == before


def test_the_same_rows_are_encoded_once(encoded_rows, capsys):
    rows, places = pairs(), [row.where for row in pairs()]
    encode_pairs(TEMPLATE, in_file(rows), 60)
    encode_pairs(FAMILIES["llama3"].prepared(), in_file(rows), 60)
    assert sorted(encoded_rows) == sorted(places)  # threads take their turns as they like
    assert "token ids: from the cache, " in capsys.readouterr().out
    encode_pairs(TEMPLATE, in_file(rows), 61)
    assert sorted(encoded_rows) == sorted([*places, *places])


def damaged(file, how: str) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if how == "flipped" else content[:-40])


@pytest.mark.parametrize("how", ["flipped", "cut", "no manifest", "half written"])
def test_a_damaged_or_half_written_file_is_written_again(how, encoded_rows, capsys, tmp_path):
    rows = pairs()
    expected = [*encode_pairs(TEMPLATE, in_file(rows), 60)[0]]
    (file,) = tmp_path.glob("cache/qalign/tokens/*/ids/tokens.arrow")
    if how == "no manifest":
        (file.parent / "manifest.json").unlink()
    elif how == "half written":  # as a process leaves it that is killed while it writes
        file.parent.rename(file.parent.parent / ".ids.qalign-abc")
    else:
        damaged(file, how)

    found, _ = encode_pairs(TEMPLATE, in_file(rows), 60)

    assert [*found] == expected
    assert len(encoded_rows) == 2 * len(rows)
    assert ("is damaged" in capsys.readouterr().out) == (how != "half written")
    assert {place.name for place in file.parent.parent.iterdir()} == {"ids", cache.LOCK}


def test_a_cache_that_cannot_be_written_costs_memory_and_not_the_run(tmp_path, capsys):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "qalign").write_text("a file")
    rows = pairs()
    found, refused = encode_pairs(TEMPLATE, in_file(rows), 60)
    assert isinstance(found, list)
    assert (found, refused) == encode_pairs(TEMPLATE, rows, 60)
    assert "can't be written" in capsys.readouterr().out


def test_few_rows_leave_no_file_and_start_no_thread(monkeypatch, tmp_path, write_jsonl):
    monkeypatch.setattr(row_files, "SMALL", 2**24)
    monkeypatch.setattr(tokens, "ThreadPoolExecutor", None)
    path = str(write_jsonl("a.jsonl", [{"messages": [*prompt, assistant("Yes")]} for prompt in ASKED]))
    rows, _ = dialogues((Source(path=path),), "train", None, 0)
    assert isinstance(encode_dialogues(TEMPLATE, rows, 60)[0], list)
    assert not (tmp_path / "cache").exists()


def test_a_row_that_cannot_be_kept_is_refused(write_jsonl):
    path = str(write_jsonl("a.jsonl", [{"prompt": "a"}]))
    rows, refused = collect((Source(path=path),), "train", None, 0, lambda raw, where: lambda: raw)
    assert not len(rows)
    assert "can't be kept" in refused[0].reason


# --- texts that go on ------------------------------------------------------------------------------------------------

ODD = ["  two spaces", "\n\nlines", "é🙂", "▁word", "x", " ", "tabs\t\t", "1234567 12", "Ünïcode …", "<|not special|>"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_that_goes_on_gets_the_ids_of_the_whole_text(name):
    template, turns = FAMILIES[name].prepared(), []
    for number, text in enumerate(ODD):
        turns += messages([("user", f"{text}{number}{text}"), ("assistant", f"{text}answer{text}")])
        for end in (None, -1):
            text = template.render(turns[:end], add_generation_prompt=end == -1)
            whole = template.tokenizer(text, add_special_tokens=False).input_ids
            assert template.ids(text) == whole


def test_each_turn_of_a_dialogue_is_encoded_about_once(monkeypatch):
    """Without what is known of earlier turns, the characters grow with the square of the number of turns."""
    read: list[int] = []
    real = ChatTemplate._all_ids
    monkeypatch.setattr(ChatTemplate, "_all_ids", lambda self, text: read.append(len(text)) or real(self, text))
    talk = messages([(role, "words and words" * 4) for _ in range(20) for role in ("user", "assistant")])

    encode_dialogues(TEMPLATE, [Dialogue(tuple(talk), 0, "a:1")], 10_000)

    assert sum(read) < 3 * len(TEMPLATE.render(talk, add_generation_prompt=False))
