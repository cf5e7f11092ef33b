"""Bad paths in recipes and on the command line, and bad rows: one line each, exit code 2, in no time."""

import json
import os

import pytest

from tests.bad_inputs.conftest import PAIR

NOWHERE = {  # paths that can't be read or written
    "no such user": "~nosuchuser/x",
    "too long a name": "n" * 300,
    "too long a path": "n/" * 5_000,
    "below a file": "file/x/y",
    "a loop": "./loop/x",
    "a link to nothing": "./nowhere/x",
    "ESC": "./\x1b[31m",
    "a line": "./a\nb",
    "half a surrogate": "./\udcff",
}


@pytest.fixture
def odd(place):
    """The current folder with what is neither a file nor a folder that can be used."""
    (place / "loop").symlink_to("loop")
    (place / "nowhere").symlink_to("gone")
    (place / "folder").mkdir()
    os.mkfifo(place / "pipe.jsonl")
    return place


def quoted(path: str) -> str:
    return json.dumps(path)  # JSON's escapes are YAML's


@pytest.mark.parametrize("key", ["output", "dpo.data", "dpo.eval_data", "model.base", "model.chat_template"])
@pytest.mark.parametrize("name", NOWHERE)
def test_a_path_of_a_recipe_that_leads_nowhere(refused, odd, key, name):
    lines = refused("dpo", "recipe.yaml", f"{key}={quoted(NOWHERE[name])}", "--overwrite")

    assert len(lines) == 1
    assert lines[0].startswith((f"command line: {key}: ", f"command line: {key} is "))


@pytest.mark.parametrize("name", NOWHERE)
def test_an_adapter_or_a_reward_that_leads_nowhere(refused, odd, name):
    for stage, key in (("dpo", "dpo.start_from"), ("ppo", "ppo.reward")):
        lines = refused(stage, "recipe.yaml", f"{key}={quoted(NOWHERE[name])}", "--overwrite")
        assert len(lines) == 1
        assert lines[0].startswith((f"command line: {key}: ", f"command line: {key} is "))


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("output=/", "root of the disk"), ("output=file", "in, a file"), ("output=' '", "characters"),
        ("output=", "is empty"), ('output="a\\0b"', "characters"), ("dpo.data=pipe.jsonl", "neither a file nor"),
        ("dpo.data=/dev/zero", "neither a file nor a folder"), ("model.chat_template=folder", "is a folder"),
        ("model.base='a b'", "no hub id"), ("model.base=/dev/zero", "neither a file"),
        ("dpo.start_from=folder", "no adapter_config.json"),
        ("model.base=package:nosuch/x", "is not installed"), ("dpo.data=pairs.json", "did you mean 'pairs.jsonl'?"),
    ],
)  # fmt: skip
def test_a_path_of_the_wrong_kind(refused, odd, word, words):
    (line,) = refused("dpo", "recipe.yaml", word, "--overwrite")

    assert words in line


@pytest.mark.parametrize("name", NOWHERE)
@pytest.mark.parametrize(
    "words",
    [
        ["dpo", "PATH"], ["fit", "PATH"], ["PATH.yaml"], ["evaluate", "PATH"], ["best_of", "PATH"],
        ["score", "PATH", "pairs.jsonl"], ["export", "PATH", "--to", "merged"], ["init", "PATH"],
        ["compare", "PATH", "base"], ["h3", "PATH"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_an_argument_that_leads_nowhere(refused, odd, words, name):
    assert len(refused(*(word.replace("PATH", NOWHERE[name]) for word in words))) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        *((["best_of", "recipe.yaml", f"n={n}"], "expected a whole number from 2 to 1024")
          for n in ("²", "1", "0", "-4", "1.5", "1e3", "1025", "9" * 5_000, "many", "")),
        *((["fit", "recipe.yaml", "--memory", size], "--memory: ")
          for size in ("9" * 400, "1e300GB", "-12GB", "0", "nan", "12 GB free")),
        *((["compare", "pairs.jsonl", "base", f"--{name}={n}"], f"--{name}: ")
          for name in ("limit", "max-tokens", "temperature") for n in ("-5", "²", "9" * 5_000, "nan")),
        *(([*words, f"--limit={n}"], "--limit: ") for n in ("0", "-5", "²", "9" * 5_000)
          for words in (["h3", "runs/x/dpo"], ["evaluate", "recipe.yaml"])),
        *((["score", "runs/x", "pairs.jsonl", f"--limit={n}"], "--limit: ") for n in ("0", "-5", "²", "9" * 5_000)),
    ],
)  # fmt: skip
def test_a_number_that_is_none(refused, words, said):
    (line,) = refused(*words)

    assert said in line


DATA = {
    "empty": (b"", "no rows"),
    "blank lines": (b"\n\n\n", "no rows"),
    "no JSON": (b"hello\n", ""),
    "half a row": (b'{"prompt": "Wh', ""),
    "numbers": (b"1\n2\n", ""),
    "a deep row": (b"[" * 100_000 + b"\n", ""),
    "a huge number": (b'{"prompt": ' + b"9" * 5_000 + b"}\n", ""),
    "NUL": (b"\0" * 1_000, ""),
    "not UTF-8": (b'{"prompt": "\xff\xfe"}\n', ""),
    "ESC in a key": (b'{"\\u001b[31m": 1}\n', ""),
    "a long key": (b'{"' + b"k" * 100_000 + b'": 1}\n', ""),
    "other columns": (b'{"a": 1, "b": 2}\n', ""),
    "equal answers": (json.dumps(PAIR | {"rejected": "Because."}).encode() + b"\n", ""),
    "empty answers": (json.dumps(PAIR | {"chosen": "", "rejected": ""}).encode() + b"\n", ""),
    "answers are numbers": (json.dumps(PAIR | {"chosen": 1, "rejected": 2}).encode() + b"\n", ""),
    "turns without roles": (json.dumps({"chosen": [{"content": "x"}], "rejected": []}).encode() + b"\n", ""),
    "unknown roles": (json.dumps(PAIR | {"prompt": [{"role": "\x1b", "content": "x"}]}).encode() + b"\n", ""),
}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "jsonl.gz"])
@pytest.mark.parametrize("name", DATA)
def test_rows_that_are_none(refused, place, suffix, name):
    content, words = DATA[name]
    (place / f"bad.{suffix}").write_bytes(content)

    lines = refused("dpo", "recipe.yaml", f"dpo.data=bad.{suffix}", "--overwrite")

    assert "bad." in " ".join(lines) or "dpo.data" in lines[0]
    assert suffix != "jsonl" or words in " ".join(lines)
    assert len(lines) <= 6  # one for the source, and the first refused rows
