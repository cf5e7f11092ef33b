"""Reads and checks a recipe file: reports every problem at once, each as `file:line` with the likely fix.

Nothing here imports torch, so a bad recipe is refused in well under a second.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from qalign.config.paths import Keys, Place, Problem, as_keys, missing, resolved
from qalign.config.recipe import Recipe
from qalign.config.trainer_keys import unknown_trainer_keys
from qalign.errors import UserError, did_you_mean


class _Loader(yaml.SafeLoader):
    """Reads `5e-6` as a number, as YAML 1.2 does; everything else as YAML 1.1."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: a text such as '1e5' is quoted."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]: PyYAML has no types
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def load(path: str, overrides: Sequence[str] = (), stage: str | None = None) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: the YAML file.
        overrides: `key=value` words, keys dotted (`dpo.max_steps=20`), values read as YAML.
        stage: a section that the recipe must have.

    Raises:
        UserError: one line a problem, all problems at once, each with `file:line`.
    """
    file = Path(path)
    if not file.is_file():
        near = did_you_mean(file.name, [f.name for f in file.parent.glob("*.yaml")])
        raise UserError(f"{path}: there is no such recipe{near}")
    raw, lines = parse(file)
    overridden = _apply(raw, overrides)
    found: list[Problem] = [  # of a key that is set twice, YAML would silently use the last value
        (place, f"'{place[-1]}' is set more than once, in lines {', '.join(map(str, at))}; keep one")
        for place, at in lines.items()
        if len(at) > 1
    ]
    try:
        Recipe.model_validate(raw)
    except ValidationError as error:
        found += _explained(error, raw)
    found += [*missing(raw, file.parent), *unknown_trainer_keys(raw)]
    problems = dict(reversed(found))  # the first message about a place counts
    misspelt = any("unknown key" in text for place, text in problems.items() if len(place) == 1)
    if stage and raw.get(stage) is None and not misspelt:
        problems[(stage,)] = f"the recipe has no '{stage}:' section, which `python -m qalign.{stage}` needs"

    def where(place: Place) -> tuple[str, int]:
        """The file and the line of the innermost key that is written there; line 0: the command line."""
        known = [place[:length] for length in range(len(place), 0, -1)]
        inside = {other[: len(place)] for other in overridden - {*lines}}  # below it only the command line set keys
        if not overridden.isdisjoint(known) or (place and place in inside):
            return "command line", 0
        return path, next((lines[part][-1] for part in known if part in lines), 1)

    if problems:
        located = sorted((*where(place), message) for place, message in problems.items())
        raise UserError(*(f"{name}:{line or ''}".rstrip(":") + f": {text}" for name, line, text in located))
    return Recipe.model_validate(resolved(raw, file.parent))


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out; reads back as the same recipe."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def flow(value: Any) -> str:
    """One value as YAML on one line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=9999)
    return text.removesuffix("...\n").strip()


def parse(file: Path) -> tuple[Keys, dict[Place, list[int]]]:
    """(the keys of a YAML file, the line numbers of every place in it; several if a key is set twice)."""
    try:
        text = file.read_text(encoding="utf-8")
        raw: Any = yaml.load(text, _Loader) or {}
        root = cast(yaml.Node, yaml.compose(text, _Loader))  # pyright: ignore[reportUnknownMemberType]: untyped
        lines: dict[Place, list[int]] = {}
        for place, line in _lines(root):
            lines.setdefault(place, []).append(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", error)
        raise UserError(f"{file}:{mark.line + 1 if mark else 1}: not valid YAML: {reason}") from None
    except RecursionError:
        raise UserError(f"{file}: an alias (*name) refers to itself") from None
    if not isinstance(raw, dict):
        raise UserError(f"{file}:1: a recipe is a set of keys (model:, output:, dpo: …), not {type(raw).__name__}")
    return as_keys(raw), lines


def _lines(node: yaml.Node | None, place: Place = ()) -> Iterator[tuple[Place, int]]:
    """(place, line number) of every key and list item below a YAML node."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*place, key.value), key.start_mark.line + 1
            yield from _lines(value, (*place, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*place, index), value.start_mark.line + 1
            yield from _lines(value, (*place, index))


def _apply(raw: Keys, overrides: Sequence[str]) -> set[Place]:
    """Writes `key=value` words into the raw recipe; returns the places that were written."""
    places: set[Place] = set()
    for word in overrides:
        name, equals, value = word.partition("=")
        keys = name.split(".")
        if not equals or not all(keys):
            raise UserError(f"command line: '{word}' is not KEY=VALUE; write for example dpo.max_steps=20")
        section: Any = raw
        for key in keys[:-1]:
            if not isinstance(section.get(key, {}) or {}, dict):
                raise UserError(f"command line: '{word}': {key} is a value, not a section")
            section[key] = section = dict(section.get(key) or {})  # a copy: an alias (*name) elsewhere keeps its value
        try:
            section[keys[-1]] = yaml.load(value, _Loader)
        except yaml.YAMLError:
            raise UserError(f"command line: '{word}': the value is not valid YAML; quote it") from None
        places.add(tuple(keys))
    return places


_SEVERAL_TYPES = {
    "micro_batch_size": "'auto' or a whole number of at least 1",
    "targets": "'all-linear' or a list of module names",
    "data": "a path, or a list of them",
    "eval_data": "a path, or a list of them",
    "reward": "'reward', a folder, a model, module:function, or a list of them",
    "judge": "a folder, a model, module:function, or a list of them",
}


def _explained(error: ValidationError, raw: Keys) -> list[Problem]:
    """Pydantic's errors as (place, message), one for each mistake."""
    found: list[Problem] = []
    for item in error.errors():
        place = _place(item, raw)
        if item["type"] == "value_error":  # a section's conflicts: a line each, beginning with the key
            for conflict in str(item.get("ctx", {})["error"]).splitlines():
                key, _, text = conflict.partition(": ")
                found.append(((*place, *key.split(".")), f"{'.'.join(map(str, (*place, key)))}: {text}"))
        else:
            found.append((place, _message(item, place)))
    # A union complains once for each type it tried, a list about its length too: the innermost place is the mistake.
    inner = [place for place, _ in found]
    return [(place, text) for place, text in found if not any(p != place and p[: len(place)] == place for p in inner)]


def _place(item: ErrorDetails, raw: Any) -> Place:
    """Where in the file a pydantic error is. Its own `loc` also has the types tried in a union, and list positions
    that the file doesn't have."""
    place: Place = ()
    for part in item["loc"]:
        inside: dict[Any, Any] = dict(enumerate(cast(list[Any], raw))) if isinstance(raw, list) else as_keys(raw)
        if part in inside:
            place, raw = (*place, part), inside[part]
    return (*place, item["loc"][-1]) if item["type"] == "missing" else place


def _message(item: ErrorDetails, place: Place) -> str:
    """One pydantic error in the user's terms: what was found and what was expected."""
    name, kind, found = ".".join(map(str, place)), item["type"], item["input"]
    if kind == "extra_forbidden":
        known = _section(place[:-1]).model_fields
        within = f" in {'.'.join(map(str, place[:-1]))}" if place[:-1] else ""
        return f"unknown key '{place[-1]}'{within}" + (did_you_mean(place[-1], known) or f"; known: {', '.join(known)}")
    if kind == "missing":
        return f"'{name}' is missing"
    if found is None or kind in ("string_too_short", "too_short"):
        return f"{name} is empty"
    if kind == "invalid_key":
        return f"{name}: keys are words, not {found!r}"
    near, expected = "", item["msg"].removeprefix("Input should be ").replace("valid integer", "whole number")
    if len(place) > 1 and place[-1] in _SEVERAL_TYPES:  # at the top, 'reward' is a stage
        expected = _SEVERAL_TYPES[str(place[-1])]
    elif kind in ("model_type", "dict_type"):
        expected = "keys below it"
    elif kind == "literal_error":
        choices = re.findall(r"'([^']*)'", item.get("ctx", {})["expected"])
        expected, near = f"one of {', '.join(choices)}", did_you_mean(found, choices)
    return f"{name} is {found!r}; expected {expected.replace('a valid ', 'a ')}{near}"


def _section(place: Place) -> type[BaseModel]:
    """The class of the section at this place of the recipe."""
    section: type[BaseModel] = Recipe
    for key in place:
        if isinstance(key, str):
            section = next(sections_in(section.model_fields[key].annotation))
    return section


def sections_in(hint: Any) -> Iterator[type[BaseModel]]:
    """The section classes that a type hint names at any depth: `tuple[Source, ...] | None` names `Source`."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        yield hint
    for inside in get_args(hint):
        yield from sections_in(inside)
