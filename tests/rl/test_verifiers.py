"""Verifiable rewards: numbers on hard inputs, exact answers, patterns, JSON, lengths; and that no torch is imported."""

import subprocess
import sys
from fractions import Fraction

import pytest

from qalign.rl import verifiers
from qalign.rl.rewards import FunctionScorer, RewardFailed, combined
from tests.rl.conftest import answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 42.", 42), ("18", 18), ("-3", -3), ("−3", -3), ("x = -3", -3), ("+7", 7), (".5", "1/2"),
        ("It costs $1,234.50 in all.", "1234.5"), ("1,234,567", 1234567), ("12,34", None), ("3,5", None),
        ("about 50% of them", 50), (r"50\%", 50), ("€20", 20), ("90°", 90), (r"90^\circ", 90), ("18 apples", 18),
        ("3/4", "3/4"), ("1 1/2 cups", "3/2"), ("-1 1/2", "-3/2"), ("6/8", "3/4"), ("1/0", None),
        ("6.02e23", 602 * 10**21), ("1E-3", "1/1000"), (r"6.02 \times 10^{23}", 602 * 10**21), ("2 × 10^3", 2000),
        # marked answers
        (r"First 3, then \boxed{18}. 19 is wrong.", 18), (r"\boxed{3} or rather \boxed{4}", 4),
        (r"\boxed{\frac{3}{4}}", "3/4"), (r"\boxed{\dfrac34}", "3/4"), (r"\boxed{-\frac{1}{2}}", "-1/2"),
        (r"\boxed{x = 5}", 5), (r"\boxed{1{,}000}", 1000), (r"\boxed{1\,000}", 1000), (r"\boxed{\$18.00}", 18),
        (r"\boxed{18\text{ dollars}}", 18), (r"\boxed{\text{18}}", 18), (r"$\boxed{12^\circ}$", 12),
        (r"\boxed{3 \text{ or } 4}", None), (r"\boxed{(1, 2)}", None), (r"\boxed{no idea}", None), (r"\boxed{1", None),
        ("She has 3 + 4 = 7 eggs.\n#### 7", 7), ("16 - 3 - 4 = 9 eggs, 9 * 2 = <<9*2=18>>18.\n#### 1,018\n", 1018),
        ("The final answer is 5 because 2 + 3 is 5, unlike 6", 5), ("**Answer:** 12 (not 13)", 12),
        # not the sign of a difference, not a part of a word or a date
        ("10-3", 3), ("it is 2-3", 3), ("version v2", None), ("B12", None), ("3/4/2020", None), ("192.168.0.1", None),
        ("1.2.3", None), ("between 5 and 10", 10), ("7.", 7), ("7.5.", "7.5"), ("(8)", 8), ("**9**", 9), ("`9`", 9),
        # thoughts
        ("<think>41?</think>42", 42), ("<think>41", None), ("</think> 6", 6),
        # nothing, and what would take a long time or much memory
        ("", None), ("none", None), ("1e999999999", None), ("2 × 10^999999999999", None), ("9" * 10_000, None),
        (18, 18), (0.5, "1/2"), (float("nan"), None), (True, None),
    ],
)  # fmt: skip
def test_the_number_of_a_text(text, expected):
    assert verifiers.number_in(text) == (None if expected is None else Fraction(expected))


def test_numbers_are_compared_as_fractions_with_a_tolerance_if_wanted():
    texts = ["0.5", "1/2", "0.501", "two"]
    assert verifiers.number(texts, answer=[r"\boxed{\frac12}"] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert verifiers.number(texts, answer=["0.5"] * 4, tolerance=0.01) == [1.0, 1.0, 1.0, 0.0]
    assert verifiers.number(["-100"], answer=["-101"], tolerance=0.01) == [1.0]
    assert verifiers.number(["0"], answer=[0], tolerance=0.5) == [1.0]
    with pytest.raises(ValueError, match="has no number: 'many'"):
        verifiers.number(["3"], answer=["many"])


def test_the_column_of_the_right_answer():
    assert verifiers.exact(["Paris", "Rome"], solution=["Paris", "Paris"], question=["?", "?"]) == [1.0, 0.0]
    assert verifiers.exact(["Paris"], answer=["Rome"], solution=["Paris"]) == [0.0], "`answer` comes first"
    with pytest.raises(ValueError, match="no right answer: none of the columns answer, solution"):
        verifiers.exact(["Paris"], capital=["Paris"])
    with pytest.raises(ValueError, match="no right answer"):
        verifiers.number(["1", "2"], answer=[1, None])


@pytest.mark.parametrize(
    ("text", "key", "score"),
    [
        ("Paris", "paris", 1.0), ("  PARIS. ", "Paris", 1.0), ("New\nYork", "New York", 1.0),
        ("Paris, France", "Paris", 0.0), ("It's clear.\n#### C", "C", 1.0),
        (r"So it is \boxed{B}.", "B", 1.0), (r"\boxed{\frac{a}{b}}", r"\frac{a}{b}", 1.0),
        ("The answer is: B.", "B", 1.0), ("Answer: B\nas asked", "b", 1.0), ("", "B", 0.0), ("<think>B", "B", 0.0),
        ("<think>A?</think>\nB", "B", 1.0), (r"\boxed{a_{1}} then \boxed{a_{2}}", "a_{2}", 1.0),
        (r"\boxed{\{1\}}", r"\{1\}", 1.0),
    ],
)  # fmt: skip
def test_exact_answers(text, key, score):
    assert verifiers.exact([text], answer=[key]) == [score]


def test_patterns():
    assert verifiers.regex(["a 1", "a b"], [r"\d", r"\d"]) == [1.0, 0.0]
    assert verifiers.regex(["one\ntwo", "one"], r"^two$") == [1.0, 0.0]
    assert verifiers.regex(["<think>7</think>none"], r"\d") == [0.0]


def test_json_that_fits_a_schema():
    schema = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}
    texts = ['{"age": 3}', '```json\n{"age": 3}\n```', '{"age": "3"}', "{}", "age: 3", "", '{"age": NaN}', "[" * 10_000,
             'Here: {"age": 3}', "null", '{"age": 3} {"age": 4}']  # fmt: skip
    assert verifiers.json_schema(texts, schema) == [1.0, 1.0] + [0.0] * 9
    assert verifiers.json_schema(["3"], '{"type": "number"}') == [1.0], "of a row, as text"
    with pytest.raises(Exception, match="is not valid under any of the given schemas"):
        verifiers.json_schema(["3"], {"type": "nothing"})


def test_lengths():
    found = verifiers.length(["one", "one two", "one two three four", ""], min_words=2, max_words=[3, 3, 3, 3])
    assert found == [0.5, 1.0, 0.75, 0.0]
    assert verifiers.length(["one two", ""], max_words=1) == [0.5, 1.0]
    assert verifiers.length(["one"], max_words=0) == [0.0]
    with pytest.raises(ValueError, match="min_words or max_words"):
        verifiers.length(["one"])


def test_they_are_rewards_with_the_columns_of_the_rows(tiny_base, tmp_path):
    texts = [("2 + 2?", ("4", "It is 5.")), ("3 * 3?", (r"\boxed{9}", "none"))]
    scorer = FunctionScorer("grpo.reward", "qalign.rl.verifiers:number", 1.0)
    found, _ = combined([scorer], answers(tiny_base.tokenizer, texts, answer=["#### 4", "9"], level=["a", "b"]))
    assert found.tolist() == [[1.0, 0.0], [1.0, 0.0]]
    with pytest.raises(RewardFailed, match=r"number raised ValueError on an answer to rows.jsonl:2: .* no number"):
        combined([scorer], answers(tiny_base.tokenizer, texts, answer=["4", "nine"]))
    file = tmp_path / "my_rewards.py"
    file.write_text(
        "from functools import partial\nfrom qalign.rl.verifiers import length\nbrief = partial(length, max_words=1)\n"
    )
    scorer = FunctionScorer("grpo.reward", f"{file}:brief", 1.0)
    assert combined([scorer], answers(tiny_base.tokenizer, texts))[0].tolist() == [
        [1.0, pytest.approx(1 / 3)],
        [1.0, 1.0],
    ]


def test_no_torch_is_imported():
    code = "import sys, qalign.rl.verifiers; print({'torch', 'jsonschema'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
