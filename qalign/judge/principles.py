"""A constitution: principles in words, each with how to criticise an answer, how to revise it, and how to choose.

Constitutional AI (Bai et al. 2022, arXiv:2212.08073) takes its feedback from such a list instead of from people. Ours,
`principles.yaml` beside this file, has 14 in our own words; a recipe may name another. Imports no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qalign.config.yaml_file import Lines, parse
from qalign.errors import UserError, did_you_mean, short

OURS = Path(__file__).with_name("principles.yaml")
MOST = 100  # principles; each is a branch of every judgement
LONGEST = 1_000  # characters of a field


@dataclass(frozen=True)
class Principle:
    """One principle; every field is a text."""

    name: str  # for the files that are written
    critique: str  # what to say about the last answer
    revise: str  # how to rewrite it
    choose: str  # the rule by which the better of two answers is chosen


FIELDS = tuple(field.name for field in fields(Principle))


def read_principles(file: Path = OURS) -> tuple[Principle, ...]:
    """The principles of a YAML file; a `UserError` with a line for each thing that is wrong with it."""
    raw, lines = parse(file)
    given: Any = raw.get("principles")
    if problems := list(_problems(given, lines, [key for key in raw if key != "principles"])):
        raise UserError(*(f"{file}:{line}: {text}" for line, text in problems[:MOST]))
    return tuple(Principle(**{name: one[name].strip() for name in FIELDS}) for one in given)


def _problems(given: Any, lines: Lines, others: list[str]) -> Iterator[tuple[int, str]]:
    """(line, what is wrong and how to mend it)."""
    for key in others:
        yield lines[(key,)][-1], f"unknown key {short(key)}; the file has one key, principles"
    if not isinstance(given, list) or not given:
        yield lines.get(("principles",), [1])[-1], f"principles is {short(given)}; expected a list of principles"
        return
    if len(given) > MOST:
        yield lines["principles",][-1], f"has {len(given)} principles; at most {MOST} are taken"
        return
    names: dict[Any, int] = {}
    for number, one in enumerate(given):
        at = lines.get(("principles", number), lines["principles",])[-1]
        if not isinstance(one, dict):
            yield at, f"principle {number + 1} is {short(one)}; expected the keys {', '.join(FIELDS)}"
            continue
        yield from _of_one(one, number, at, lines)
        name = one.get("name")
        if isinstance(name, str) and names.setdefault(name, number) != number:
            yield at, f"principle {number + 1}: the name {short(name)} is that of principle {names[name] + 1} too"


def _of_one(one: dict[Any, Any], number: int, at: int, lines: Lines) -> Iterator[tuple[int, str]]:
    called = f"principle {number + 1}" + (f" ({short(one['name'])})" if one.get("name") else "")
    for key in one:
        if key not in FIELDS:
            near = did_you_mean(key, FIELDS) or f"; known: {', '.join(FIELDS)}"
            yield lines["principles", number, key][-1], f"{called} has the unknown key {short(key)}{near}"
    for key in FIELDS:
        line = lines.get(("principles", number, key), [at])
        if len(line) > 1:
            yield line[-1], f"{called} has {key} more than once; keep one"
        if key not in one:
            yield at, f"{called} has no '{key}'; each principle needs {', '.join(FIELDS)}"
        elif not isinstance(text := one[key], str) or not text.strip():
            yield line[-1], f"{called}: {key} is {short(text)}; expected a text"
        elif len(text) > LONGEST:
            yield line[-1], f"{called}: {key} has {len(text):,} characters; at most {LONGEST:,} are taken"
