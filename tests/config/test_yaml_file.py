"""YAML in with limits: what hangs or crashes other readers is one line here, and each place has values of its own."""

import time

import pytest

from qalign.config.yaml_file import MAX_BYTES, MAX_DEPTH, MAX_VALUES, BadYaml, dump_yaml, read_yaml
from tests.config.conftest import GOOD, with_stages

BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
MERGE_BOMB = "m0: &m0 {a0: 1, b0: 1}\n" + "".join(
    f"m{n}: &m{n} {{<<: [{','.join([f'*m{n - 1}'] * 9)}], k{n}: 1}}\n" for n in range(1, 9)
)


def reason(text: str) -> tuple[int, str]:
    began = time.process_time()
    with pytest.raises(BadYaml) as caught:
        read_yaml(text)
    assert time.process_time() - began < 2  # a bound on hanging, not on speed: each takes far less
    return caught.value.line, str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (BOMB, 5, "values with its aliases"),
        (MERGE_BOMB, 6, "values with its aliases"),
        ("a: 1\nb: &x [*x]\n", 2, "an alias (*name) refers to itself"),
        ("a: &x {<<: *x}\n", 1, "an alias (*name) refers to itself"),
        ("a: &x {b: {<<: [{c: 1}, *x]}}\n", 1, "an alias (*name) refers to itself"),
        (f"a: 1\nb: {'[' * 5000}\n", 2, f"nested more than {MAX_DEPTH} deep"),
        ("- " * 5000, 1, "nested more than"),
        ("? " * 5000, 1, "nested more than"),
        ("".join(f"{' ' * n}k:\n" for n in range(5000)), 30, "nested more than"),
        (f"a: [{'1,' * (MAX_VALUES + 1)}]", 1, f"more than {MAX_VALUES:,} values"),
        ("a: 1\nseed: " + "9" * 5000, 2, "is no whole number"),
        ("seed: 0b_", 1, "'0b_' is no whole number"),
        ("seed: 0x_", 1, "'0x_' is no whole number"),
        ("seed: !!int abc", 1, "'abc' is no whole number"),
        ("seed: !!bool maybe", 1, "'maybe' is no boolean"),
        ("seed: !!float x", 1, "'x' is no number"),
        ("a: !!binary aGk=", 1, "the tag '!!binary'"),
        ("a: !!timestamp 2020-99-99", 1, "the tag '!!timestamp'"),
        ("a: !!set {x, y}", 1, "the tag '!!set'"),
        ("a: !!omap [x: 1]", 1, "the tag '!!omap'"),
        ("a: !!str [x]", 1, "the tag '!!str'"),
        ("a: 1\nb: !mine x", 2, "the tag '!mine'"),
        ("a: !!python/object/apply:os.mkdir [ran]", 1, "the tag '!!python/object/apply:os.mkdir'"),
        ("a: 1\nb: {<<: 5}", 2, "`<<` takes the keys of an alias"),
        ("a: 1\nb: {<<: [{c: 1}, 5]}", 2, "`<<` takes the keys of an alias"),
        ("a: &x [1]\nb: {<<: *x}", 2, "`<<` takes the keys of an alias"),
        ("a: *gone", 1, "found undefined alias"),
        ("a: 1\nb: x\0y", 2, "the character U+0000"),
        ("a: 1\nb: \x1b[31m", 2, "the character U+001B"),
        ('a: "\\UFFFFFFFF"', 1, ""),
        ("%YAML 1." + "9" * 5000 + "\n---\na: 1", 1, ""),
        ("%TAG ! !\n%TAG ! !\n---\na: 1", 2, ""),
        ("a: 1\n--- \nb: 1", 2, ""),
        ("a: [1\nb: 2", 2, ""),
        ("a:\tb: 1", 1, ""),
        ("? [a, b]\n: 1", 1, "a key is a word"),
        ("!!binary aGk=: 1", 1, "a key is a word"),
        ("`a: 1", 1, ""),
        ("a: @b", 1, ""),
        ("a: %b", 1, ""),
    ],
)  # fmt: skip
def test_what_can_not_be_read_is_one_line_at_its_line_in_no_time(text, line, words):
    assert reason(text)[0] == line
    assert words in reason(text)[1]


def test_a_file_that_is_no_recipe_by_its_size_is_not_read(problems, folder):
    (line,) = problems(GOOD + "#" * MAX_BYTES)

    assert line == "recipe.yaml: is larger than 256 KiB; a recipe is a few kilobytes of YAML"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2024-05-01", "2024-05-01"), ("2020-99-99", "2020-99-99"), ("2001-12-14t21:59:43.10-05:00",) * 2,
        ("=", "="), ("<<", "<<"), ("'5e-6'", "5e-6"), ("5e-6", 5e-6), ("~", None), ("", None), ("yes", True),
        ("!!str 5", "5"), ("!!float 5", 5.0), ("[1, [2]]", [1, [2]]),
        ("{on: 1, 5: x, !!int a: b}", {"on": 1, "5": "x", "a": "b"}),  # keys are words, as they are written
        ('"\\ud83d"', "\ud83d"),
    ],
)  # fmt: skip
def test_what_a_recipe_can_hold_is_read(text, value):
    assert read_yaml(text)[0] == value


@pytest.mark.parametrize(
    "value", ["2024-05-01", "=", "<<", "1e5", "0b_", "on", "~", "5:30", "", None, 1e-6, {"a": ["x"]}]
)
def test_what_is_dumped_reads_back(value):
    assert read_yaml(dump_yaml({"key": value}))[0] == {"key": value}


def test_each_place_has_a_copy_of_its_own():
    raw, _ = read_yaml("a: &x {k: [1]}\nb: *x\nc: {<<: *x}\nd: [*x, *x]\n")

    raw["a"]["k"].append(2)
    raw["b"]["k"].append(3)
    raw["d"][0]["k"].append(4)
    assert raw == {"a": {"k": [1, 2]}, "b": {"k": [1, 3]}, "c": {"k": [1]}, "d": [{"k": [1, 4]}, {"k": [1]}]}


def test_merged_keys_keep_yamls_order_and_their_own_lines():
    text = """\
one: &one
  a: 1
  b: 1
two: &two
  b: 2
  c: 2
three: &three
  <<: *two
  c: 3
first: {<<: [*one, *two], d: 0}
second:
  b: 0
  <<: *three
"""
    raw, lines = read_yaml(text)

    assert raw["first"] == {"d": 0, "a": 1, "b": 1, "c": 2}  # the first of the list holds
    assert raw["second"] == {"b": 0, "c": 3}  # its own keys hold, then those of what is merged, then what that merges
    assert {place[1]: at for place, at in lines.items() if place[0] == "second" and len(place) == 2} == {
        "b": [12],
        "c": [9],
    }
    assert lines["first", "c"] == [6]


# --- in a recipe -----------------------------------------------------------------------------------------------------

COMMON = """\
model: {base: org/model}
output: x
reward: &common
  data: pairs.jsonl
  max_steps: 9
  trainer: {weight_decay: 0.1}
dpo: *common
sft:
  <<: *common
  epochs: 2
"""


def test_an_override_of_a_shared_section_changes_one_stage(read):
    recipe = read(COMMON, "dpo.max_steps=5", "sft.trainer.weight_decay=0.2", "dpo.trainer.optim=adafactor")

    assert [getattr(recipe, stage).max_steps for stage in ("sft", "reward", "dpo")] == [9, 9, 5]
    assert recipe.reward.trainer == {"weight_decay": 0.1}
    assert recipe.sft.trainer == {"weight_decay": 0.2}
    assert recipe.dpo.trainer == {"weight_decay": 0.1, "optim": "adafactor"}


def test_an_override_of_a_shared_section_blames_no_other_stage(only_problem):
    only_problem("command line", "unknown key 'packing' in dpo", COMMON, "dpo.packing=true")
    only_problem("command line", "dpo.max_steps is 0", COMMON, "dpo.max_steps=0")


def test_a_mistake_in_a_shared_section_is_found_where_it_is_written(problems):
    found = problems(COMMON.replace("max_steps: 9", "max_steps: 0"))

    assert found == [
        f"recipe.yaml:5: {stage}.max_steps is 0; expected at least 1" for stage in ("dpo", "reward", "sft")
    ]


def test_an_override_is_bounded_as_a_file_is(problems):
    bomb = "{a: &a [1,1,1,1,1,1,1,1,1,1], b: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a], c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]"
    bomb += ", d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c], e: [*d,*d]}"
    for word, words in (
        (f"dpo.trainer={bomb}", "values with its aliases"),
        (f"seed={'9' * 5000}", "is no whole number"),
        (f"dpo.trainer={'[' * 500}", "nested more than"),
        (f"{'a.' * 500}b=1", "is a value, not a section"),
        ("dpo={beta: 1, beta: 2, data: pairs.jsonl}", "'beta' is set more than once"),
        ("dpo.beta=!!int x", "is no whole number"),
        ("dpo.split=\x1b[31m", "U+001B"),
    ):
        (line,) = problems(with_stages(), word)
        assert line.startswith("command line: '")
        assert words in line
        assert len(line) <= 300
        assert line.isprintable()


def test_many_problems_are_listed_up_to_a_bound(problems):
    found = problems(GOOD + "".join(f"  key{number}: 1\n" for number in range(3000)))

    assert len(found) == 31
    assert found[-1] == "recipe.yaml: has more problems than the 30 above"


def test_a_key_can_not_write_to_the_terminal(problems):
    found = problems(GOOD + '"\\e]0;pwned\\a\\e[31mx": 1\n')

    assert found[0].startswith(r"recipe.yaml:6: unknown key '\x1b]0;pwned\x07\x1b[31mx'; known: model")
    assert found[0].isprintable()


def test_a_long_value_is_cut(problems):
    found = problems(GOOD + f"  beta: {'x' * 200_000}\n")

    assert found[0].startswith("recipe.yaml:6: dpo.beta is 'xxx")
    assert found[0].endswith("; expected a number")
    assert len(found[0]) < 150
