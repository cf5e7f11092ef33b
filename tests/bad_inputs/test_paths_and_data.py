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


def test_a_run_of_best_of_is_exported_by_its_last_round(refused, place):
    for name in ("", "round_2/dpo", "round_10/dpo"):
        folder = place / "runs" / "x" / "best_of" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_bytes((place / "recipe.yaml").read_bytes())
        (folder / "summary.json").write_text("{}")
    (line,) = refused("export", "runs/x/best_of", "--to", "merged")

    assert "is a run of best_of" in line
    assert line.endswith("best_of/round_10/dpo")


def test_best_of_needs_the_section_and_says_so_in_its_own_name(refused, place):
    text = (place / "recipe.yaml").read_text().partition("ppo:")
    (place / "recipe.yaml").write_text(text[0] + text[1].replace("ppo", "grpo") + text[2])
    (line,) = refused("best_of", "recipe.yaml")

    assert line.endswith("the recipe has no 'ppo:' section, which `python -m qalign.best_of` needs")


@pytest.mark.parametrize("target", ["/proc/x", "/proc/x/y", "/proc/self/fd/x", "file/x", "n" * 300])
@pytest.mark.parametrize("words", [["score", "runs/x", "pairs.jsonl", "--to"], ["export", "runs/x", "--output"]])
def test_an_output_that_cannot_be_made_is_refused_before_any_work(refused, place, words, target):
    run = place / "runs" / "x" / "reward"
    run.mkdir()
    for name in ("recipe.yaml", "summary.json"):
        (run / name).write_bytes((place / "recipe.yaml").read_bytes())
    (place / "runs" / "x" / "dpo" / "summary.json").unlink()
    (line,) = refused(*words, target, *(["--to", "merged"] if words[0] == "export" else []))

    assert line.startswith(target[:10])
    assert "choose a" in line


def test_a_recipe_is_not_begun_in_a_folder_that_cannot_be_written_to(refused, monkeypatch):
    monkeypatch.chdir("/proc")
    (line,) = refused("init", "smollm2_demo")

    assert line.startswith("smollm2_demo.yaml: ")


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
