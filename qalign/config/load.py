"""Reads and checks a recipe file: reports every problem at once, each as `file:line` with the likely fix.

Nothing here imports torch, so a bad recipe is refused in well under a second.
"""

import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qalign.config.known_keys import meant_by, section_at, unknown_trainer_keys
from qalign.config.missing import missing
from qalign.config.paths import Keys, Lookup, Place, Problem, as_keys, expanded, resolved
from qalign.config.recipe import Recipe
from qalign.config.stages import CONSTITUTION, MAX_BATCH, MAX_LAYERS, OWN_DATA, SECTIONS
from qalign.config.yaml_file import MAX_DEPTH, BadYaml, Lines, dump_yaml, parse, read_yaml
from qalign.errors import UserError, did_you_mean, program, short

MOST = 30  # problems that are listed
ROWS_HELD_OUT = {("eval_data",), ("holdout",)}
HELD_OUT = ("eval_every", "judge", "sample_prompts", "sample_every")  # keys that have no meaning without held-out rows
_SEVERAL_TYPES = {
    "micro_batch_size": f"'auto' or a whole number from 1 to {MAX_BATCH}",
    "checkpointed_layers": f"'auto' or a whole number from 0 to {MAX_LAYERS}",
    "sample_prompts": "'auto' or a whole number from 0 to 1000",
    "targets": "'all-linear' or a list of modules' names such as [q_proj, v_proj], and no regular expression",
    "engine": "'transformers', 'vllm', or the address of a vLLM server such as http://localhost:8000",
    "data": "a path, or a list of them",
    "eval_data": "a path, or a list of them",
    "agree_with": "a path, or a list of them",
    "reward": "'reward', a folder, a model, module:function, or a list of them",
    "judge": "a folder, a model, module:function, or a list of them",
}
_WORDS = {
    "valid integer": "whole number",
    "valid ": "",
    "Input should be ": "",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
}


def load(
    path: str,
    overrides: Sequence[str] = (),
    stage: str | None = None,
    files_of: Collection[str] = ("model", *SECTIONS),
    command: str | None = None,
) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: the YAML file.
        overrides: `key=value` words, keys dotted (`dpo.max_steps=20`), values read as YAML.
        stage: a section that the recipe must have. Files that other stages need may then be missing.
        files_of: the sections whose files must be there, if no stage is given.
        command: that needs the section; by default the stage's own.

    Raises a `UserError` with all problems at once, one line each, with `file:line`.
    """
    file = recipe_file(path)
    raw, lines = parse(file)
    typed = _apply(raw, overrides)
    lookup = Lookup(file.parent, typed)
    found = [*_set_twice(lines)]
    try:
        Recipe.model_validate(raw)
    except ValidationError as error:
        found += _explained(error, raw, MOST + 1)
    found += islice(missing(raw, lookup, ("model", stage) if stage else files_of), MOST + 1)
    found += islice(unknown_trainer_keys(raw), MOST + 1)
    problems = dict(reversed(found))  # the first message about a place counts
    misspelt = any("unknown key" in text for place, text in problems.items() if len(place) == 1)
    if stage and raw.get(stage) is None and not misspelt:
        problems[(stage,)] = f"the recipe has no '{stage}:' section, which `{program(command or stage)}` needs"
    if problems:
        located = sorted((*_where(place, path, lines, typed), message) for place, message in problems.items())
        said = [f"{name}:{line or ''}".rstrip(":") + f": {text}" for name, line, text in located[:MOST]]
        more = [f"{path}: has more problems than the {MOST} above"] if len(located) > MOST else []
        raise UserError(*said, *more)
    recipe = Recipe.model_validate(resolved(raw, lookup))
    if stage in OWN_DATA:
        _check_own_data(recipe, stage, shlex.join([path, *overrides]))
    return recipe


def _check_own_data(recipe: Recipe, stage: str, command_line: str) -> None:
    """Raises a `UserError` if a stage reads what the recipe's constitution run has not written."""
    run = expanded(recipe.output) / CONSTITUTION
    file = run / OWN_DATA[stage]
    if file.is_file() or all(source.path != str(file) for source in getattr(recipe, stage).data):
        return
    if (summary := run / "summary.json").is_file():
        why = "its labeller can't judge, or its section makes none"
        raise UserError(f"{stage}.data: the constitution run wrote no {file.name}: {why}; see {summary}")
    fix = f"run {program(CONSTITUTION)} {command_line} first"
    raise UserError(f"{stage}.data: there is no finished constitution run in {run}; {fix}")


def recipe_file(path: str) -> Path:
    """The file of a recipe, or a `UserError` with the most similar one."""
    file = expanded(path)
    try:
        if file.is_file():
            return file
        near = did_you_mean(file.name, [f.name for f in file.parent.glob("*.yaml")])
        what = "is a folder; name the recipe in it" if file.is_dir() else f"there is no such recipe{near}"
    except (OSError, ValueError) as error:  # too long for a path, or with a null character
        what = f"can't be a recipe's path: {getattr(error, 'strerror', None) or error}"
    raise UserError(f"{path}: {what}")


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out; reads back as the same recipe."""
    return dump_yaml(recipe.model_dump(mode="json"))


def _set_twice(lines: Lines) -> Iterator[Problem]:
    """(place, message) of every key that is set twice: YAML would silently use the last value."""
    for place, at in islice(((place, at) for place, at in lines.items() if len(at) > 1), MOST):
        yield place, f"'{place[-1]}' is set more than once, in lines {', '.join(map(str, at))}; keep one"


def _where(place: Place, path: str, lines: Lines, typed: Collection[Place]) -> tuple[str, int]:
    """The file and the line of the innermost key that is written there; line 0: the command line."""
    known = [place[:length] for length in range(len(place), 0, -1)]
    inside = {other[: len(place)] for other in typed if other not in lines}  # below it only the command line set keys
    if any(part in typed for part in known) or (place and place in inside):
        return "command line", 0
    return path, next((lines[part][-1] for part in known if part in lines), 1)


def _apply(raw: Keys, overrides: Sequence[str]) -> frozenset[Place]:
    """Writes `key=value` words into the raw recipe; returns the places that were written. Who takes the held-out rows
    away takes with them what the recipe would do with them."""
    values: dict[Place, Any] = {}
    for word in overrides:
        name, equals, text = word.partition("=")
        keys = name.split(".")
        if not equals or not all(keys):
            raise UserError(f"command line: '{word}' is not KEY=VALUE; write for example dpo.max_steps=20")
        section: Any = raw
        for key in keys[:-1]:
            if not isinstance(section.get(key, {}) or {}, dict) or len(keys) > MAX_DEPTH:
                raise UserError(f"command line: '{word}': {key} is a value, not a section")
            section[key] = section = section.get(key) or {}
        try:
            section[keys[-1]], lines = read_yaml(text)
        except BadYaml as error:
            raise UserError(f"command line: '{word}': the value is not valid YAML ({error}); quote it") from None
        if twice := next(_set_twice(lines), None):
            raise UserError(f"command line: '{word}': '{twice[0][-1]}' is set more than once; keep one")
        values[tuple(keys)] = section[keys[-1]]
    for name in {name for (name, *inside), value in values.items() if value is None and (*inside,) in ROWS_HELD_OUT}:
        section = as_keys(raw.get(str(name)))
        for key in () if any(section.get(rows) for (rows,) in ROWS_HELD_OUT) else HELD_OUT:
            if (name, key) not in values:
                section.pop(key, None)
    return frozenset(values)


def _explained(error: ValidationError, raw: Keys, most: int) -> list[Problem]:
    """Pydantic's errors as (place, message), one for each mistake, and no more than `most`."""
    found: list[Problem] = []
    for item in error.errors()[:most]:
        place = _place(item, raw)
        if item["type"] == "value_error":  # a section's conflicts: a line each, beginning with the key
            for conflict in str(item.get("ctx", {})["error"]).splitlines():
                key, _, text = conflict.partition(": ")
                found.append(((*place, *key.split(".")), f"{'.'.join(map(str, (*place, key)))}: {text}"))
        else:
            found.append((place, _message(item, place, raw)))
    # A union complains once for each type it tried, a list about its length too: the innermost place is the mistake.
    outer = {place[:length] for place, _ in found for length in range(len(place))}
    return [(place, text) for place, text in found if place not in outer]


def _place(item: ErrorDetails, raw: Any) -> Place:
    """Where in the file a pydantic error is. Its own `loc` also has the types tried in a union, and list positions
    that the file doesn't have."""
    place: Place = ()
    for part in item["loc"]:
        inside: dict[Any, Any] = dict(enumerate(cast(list[Any], raw))) if isinstance(raw, list) else as_keys(raw)
        if part in inside:
            place, raw = (*place, part), inside[part]
    return (*place, item["loc"][-1]) if item["type"] == "missing" else place


def _message(item: ErrorDetails, place: Place, raw: Keys) -> str:
    """One pydantic error in the user's terms: what was found and what was expected."""
    name, kind, found = ".".join(map(str, place)), item["type"], item["input"]
    if kind == "extra_forbidden":
        near = meant_by(str(place[-1]), place[:-1], raw)
        within = f" in {'.'.join(map(str, place[:-1]))}" if place[:-1] else ""
        known = f"; known: {', '.join(section_at(place[:-1]).model_fields)}"
        return f"unknown key {short(place[-1])}{within}" + (near or known)
    if kind == "missing":
        return f"'{name}' is missing"
    if found is None or kind in ("string_too_short", "too_short"):
        return f"{name} is empty"
    near, expected = "", item["msg"]
    for theirs, ours in _WORDS.items():
        expected = expected.replace(theirs, ours)
    if len(place) > 1 and place[-1] in _SEVERAL_TYPES:  # at the top, 'reward' is a stage
        expected = _SEVERAL_TYPES[str(place[-1])]
    elif kind == "string_pattern_mismatch":
        expected = "a module's name such as q_proj, and no regular expression"
    elif kind in ("model_type", "dict_type"):
        expected = "keys below it"
    elif kind == "literal_error":
        choices = re.findall(r"'([^']*)'", item.get("ctx", {})["expected"])
        expected, near = f"one of {', '.join(choices)}", did_you_mean(found, choices)
    return f"{name} is {short(found)}; expected {expected}{near}"
