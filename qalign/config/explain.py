"""Mistakes in a recipe in the user's terms: what was found, what was expected, and the key that was probably meant."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from qalign.config.paths import Keys, Place, Problem, as_keys
from qalign.config.recipe import Recipe
from qalign.config.stages import MAX_BATCH, MAX_LAYERS, STAGES
from qalign.config.trainer_keys import OWN_KEYS, OWNED, REFUSED, WITHOUT_EFFECT, trainer_keys
from qalign.errors import did_you_mean, short

_ALIASES: dict[str, list[str]] = {}  # another kit's name of a key: the keys that it may mean
for _key, _names in yaml.safe_load(Path(__file__).with_name("aliases.yaml").read_text(encoding="utf-8")).items():
    for _name in _names:
        _ALIASES.setdefault(_name, []).append(_key)
_SEVERAL_TYPES = {
    "micro_batch_size": f"'auto' or a whole number from 1 to {MAX_BATCH}",
    "checkpointed_layers": f"'auto' or a whole number from 0 to {MAX_LAYERS}",
    "targets": "'all-linear' or a list of modules' names such as [q_proj, v_proj], and no regular expression",
    "data": "a path, or a list of them",
    "eval_data": "a path, or a list of them",
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


def explained(error: ValidationError, raw: Keys, most: int) -> list[Problem]:
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


def unknown_trainer_keys(raw: Keys) -> Iterator[Problem]:
    """(place, message) of every key under `trainer:` that TRL doesn't have, or that would have no effect."""
    for stage in STAGES:
        trainer = as_keys(as_keys(raw.get(stage)).get("trainer"))
        known = trainer_keys(stage) if trainer else set[str]()
        for key in trainer:
            place = (stage, "trainer", key)
            owner = key if key in OWN_KEYS[stage] else OWNED[stage].get(key) or OWNED["*"].get(key)
            if owner:
                inside = "" if "." in owner or owner in Recipe.model_fields else f"{stage}."
                yield place, f"trainer.{key}: set it as {inside}{owner}"
            elif key in [*WITHOUT_EFFECT["*"], *WITHOUT_EFFECT.get(stage, ())]:
                yield place, f"trainer.{key}: has no effect, because qalign replaces this part of TRL; remove it"
            elif reason := REFUSED["*"].get(key) or REFUSED.get(stage, {}).get(key):
                yield place, f"trainer.{key}: can't be used here; {reason}"
            elif key not in known:
                few = f"; it takes the optimiser's settings: {', '.join(sorted(known))}" if stage == "ppo" else ""
                near = did_you_mean(key, known) or meant_by(key, (stage,), raw) or few
                yield place, f"unknown key {short(key)} in {stage}.trainer{near}"


def meant_by(key: str, place: Place, raw: Keys) -> str:
    """`"; did you mean 'learning_rate'?"`: what an unknown key in the section at this place probably means; empty if
    nothing is likely. It may stand in the wrong section, be another kit's name, be TRL's, or be misspelt."""
    word = key.lower().replace("-", "_")
    for name in (word, *_ALIASES.get(word, ())):
        if meant := _as_written(name, place, raw):
            return f"; did you mean '{meant}'?"
    if len(place) == 1 and (stage := str(place[0])) in STAGES and word in trainer_keys(stage):
        return f"; did you mean '{stage}.trainer.{word}'?"
    return did_you_mean(word, section_at(place).model_fields)


def _as_written(name: str, place: Place, raw: Keys) -> str | None:
    """A key of the recipe, such as `lora.r` or `epochs`, as it is written in or from the section at this place."""
    here, at = section_at(place).model_fields, str(place[0]) if place else ""
    if len(place) > 1:  # an item of `data` or `reward`
        return name if name in here else None
    section, _, inside = name.rpartition(".")
    stages = sorted(STAGES, key=lambda stage: stage not in raw)  # those that the recipe has come first
    if section == "trainer":
        return f"{at if at in STAGES else stages[0]}.{name}"
    if section:
        return inside if section == at else name
    if name in here or name in Recipe.model_fields:
        return name
    owners = (other for other in ("model", "lora", *stages) if name in section_at((other,)).model_fields)
    owner = next(owners, None)
    return owner and f"{owner}.{name}"


def section_at(place: Place) -> type[BaseModel]:
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
