"""A recipe file in, a checked recipe out: every problem at once, each as `file:line` with the likely fix.

Nothing here imports torch, so a bad recipe answers in well under a second.
"""

import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from qalign.config.paths import missing, resolved
from qalign.config.recipe import Recipe
from qalign.config.trainer_keys import unknown_trainer_keys
from qalign.errors import UserError, did_you_mean


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `5e-6` is a number, as in YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: a text such as '1e5' is quoted."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def load(path: str, overrides: list[str] = (), stage: str | None = None) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: the YAML file.
        overrides: `key=value` words, keys dotted (`dpo.max_steps=20`), values read as YAML.
        stage: a section that must be there.

    Raises:
        UserError: one line a problem, all problems at once, each with `file:line`.
    """
    file = Path(path)
    if not file.is_file():
        near = did_you_mean(file.name, [f.name for f in file.parent.glob("*.yaml")] if file.parent.is_dir() else [])
        raise UserError(f"{path}: there is no such recipe{near}")
    raw, places = _parse(file)
    lines, overridden = dict(places), _apply(raw, overrides)

    def where(loc: tuple) -> str:
        known = [loc[:cut] for cut in range(len(loc), 0, -1)]
        if any(part in overridden for part in known) or (
            loc and any(o[: len(loc)] == loc for o in overridden - {*lines})
        ):
            return "command line"
        return next((f"{path}:{lines[part]}" for part in known if part in lines), f"{path}:1")

    problems = _set_twice(places)
    recipe = None
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        for loc, message in _explained(error, raw):
            problems.setdefault(loc, message)
    for loc, message in [*missing(raw, file.parent), *unknown_trainer_keys(raw)]:
        problems.setdefault(loc, message)
    if (
        stage
        and raw.get(stage) is None
        and not any("unknown key" in text for (_, *below), text in problems.items() if not below)
    ):
        problems[(stage,)] = f"the recipe has no '{stage}:' section, which `python -m qalign.{stage}` needs"
    if problems:
        found = [(where(loc), message) for loc, message in problems.items()]
        raise UserError(*(f"{place}: {message}" for place, message in sorted(found, key=_by_line)))
    return resolved(recipe, file.parent)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out; reads back as the same recipe."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _parse(file: Path) -> tuple[dict, list[tuple[tuple, int]]]:
    """(the keys of a YAML file, every place in it with its line)."""
    try:
        text = file.read_text(encoding="utf-8")
        raw, places = yaml.load(text, _Loader), list(_lines(yaml.compose(text, _Loader)))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        line = error.problem_mark.line + 1 if getattr(error, "problem_mark", None) else 1
        raise UserError(f"{file}:{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    except RecursionError:
        raise UserError(f"{file}: an alias (*name) refers to itself") from None
    if not isinstance(raw or {}, dict):
        raise UserError(f"{file}:1: a recipe is a set of keys (model:, output:, dpo: …), not {type(raw).__name__}")
    return raw or {}, places


def _set_twice(places: list[tuple[tuple, int]]) -> dict[tuple, str]:
    """YAML lets the last of two equal keys win, silently."""
    lines: dict[tuple, list[int]] = {}
    for loc, line in places:
        lines.setdefault(loc, []).append(line)
    return {
        loc: f"'{loc[-1]}' is set more than once, in lines {', '.join(map(str, found))}"
        for loc, found in lines.items()
        if len(found) > 1
    }


def _by_line(found: tuple[str, str]) -> tuple[str, int]:
    place, _, line = found[0].rpartition(":")
    return (place, int(line)) if line.isdigit() else (found[0], 0)


def _lines(node: yaml.Node | None, loc: tuple = ()):
    """Every place in the file as (keys that lead there, line number of its key)."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*loc, key.value), key.start_mark.line + 1
            yield from _lines(value, (*loc, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*loc, index), value.start_mark.line + 1
            yield from _lines(value, (*loc, index))


def _apply(raw: dict, overrides: list[str]) -> set[tuple]:
    """Writes `key=value` words into the raw recipe; returns the places written."""
    places = set()
    for word in overrides:
        name, equals, value = word.partition("=")
        keys = tuple(name.split("."))
        if not equals or not all(keys):
            raise UserError(f"command line: '{word}' is not KEY=VALUE; write for example dpo.max_steps=20")
        section = raw
        for key in keys[:-1]:
            if section.get(key) is None:
                section[key] = {}
            if not isinstance(section[key], dict):
                raise UserError(f"command line: '{word}': {key} is a value, not a section")
            section = section[key]
        try:
            section[keys[-1]] = yaml.load(value, _Loader)
        except yaml.YAMLError:
            raise UserError(f"command line: '{word}': the value is not valid YAML; quote it") from None
        places.add(keys)
    return places


_SEVERAL_TYPES = {
    "micro_batch_size": "'auto' or a whole number of at least 1",
    "targets": "'all-linear' or a list of module names",
    "data": "a path, or a list of them",
    "eval_data": "a path, or a list of them",
    "reward": "'reward', a folder, a model, module:function, or a list of them",
    "judge": "a folder, a model, module:function, or a list of them",
}


def _explained(error: ValidationError, raw: dict) -> list[tuple[tuple, str]]:
    """Pydantic's errors as (place, a user's words), one a mistake."""
    found = []
    for item in error.errors():
        place = _place(item, raw)
        if item["type"] == "value_error":  # our own conflicts, a line each, beginning with the key they are about
            for clash in str(item["ctx"]["error"]).splitlines():
                key, _, text = clash.partition(": ")
                found.append(((*place, *key.split(".")), f"{'.'.join(map(str, (*place, key)))}: {text}"))
        else:
            found.append((place, _explain(item, place)))
    # A union complains once for each type it tried, a list about its length too: the innermost place is the mistake.
    inner = [place for place, _ in found]
    return [(loc, text) for loc, text in found if not any(p != loc and p[: len(loc)] == loc for p in inner)]


def _place(item: dict, raw: Any) -> tuple:
    """Where in the file a pydantic error is: its own place also names the types tried in a union, and list positions
    that the file doesn't have."""
    place: tuple = ()
    for part in item["loc"]:
        if (isinstance(raw, dict) and part in raw) or (isinstance(raw, list) and part in range(len(raw))):
            place, raw = (*place, part), raw[part]
    return (*place, item["loc"][-1]) if item["type"] == "missing" else place


def _explain(item: dict, loc: tuple) -> str:
    """One pydantic error in a user's words."""
    name = ".".join(str(part) for part in loc)
    kind, found = item["type"], item.get("input")
    if kind == "extra_forbidden":
        known = _section(loc[:-1]).model_fields
        within = f" in {'.'.join(map(str, loc[:-1]))}" if loc[:-1] else ""
        return f"unknown key '{loc[-1]}'{within}" + (did_you_mean(loc[-1], known) or f"; known: {', '.join(known)}")
    if kind == "missing":
        return f"'{name}' is missing"
    if found is None:
        return f"{name} is empty"
    if len(loc) > 1 and loc[-1] in _SEVERAL_TYPES and kind != "too_short":  # alone, 'reward' is a stage
        return f"{name} is {found!r}; expected {_SEVERAL_TYPES[loc[-1]]}"
    if kind in ("model_type", "dict_type"):
        return f"{name} is {found!r}; expected keys below it"
    if kind in ("string_too_short", "too_short"):
        return f"{name} is empty"
    if kind == "invalid_key":
        return f"{name}: keys are words, not {item['input']!r}"
    if kind == "literal_error":
        expected = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        return f"{name} is {found!r}; expected one of {', '.join(expected)}" + did_you_mean(found, expected)
    expected = item["msg"].removeprefix("Input should be ").replace("valid integer", "whole number")
    return f"{name} is {found!r}; expected {expected.replace('a valid ', 'a ')}"


def _section(loc: tuple) -> type[BaseModel]:
    """The class of the section at this place of the recipe."""
    section: Any = Recipe
    for key in loc:
        if isinstance(key, int):
            continue
        section = next(_sections_in(section.model_fields[key].annotation))
    return section


def _sections_in(hint: Any):
    """The classes of sections that a type hint names, however deep: `tuple[Source, ...] | None` names `Source`."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        yield hint
    for inside in get_args(hint):
        yield from _sections_in(inside)
