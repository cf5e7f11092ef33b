"""The keys that may stand in a recipe, those under `trainer:` included, and what an unknown one probably means.

Under `trainer:` stand keys of TRL's config that qalign neither sets itself nor replaces: `trainer_keys.yaml` has those
that are refused by name. `aliases.yaml` has other kits' names of the recipe's keys.
"""

import ast
import math
from collections.abc import Iterator
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import BaseModel

from qalign.config.paths import Keys, Place, Problem, as_keys
from qalign.config.recipe import Recipe
from qalign.config.stages import RL_STAGES, SECTIONS, STAGES
from qalign.errors import did_you_mean, short


def _table(name: str) -> Any:
    return yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def _by_key(table: dict[str, list[str]]) -> dict[str, str]:
    return {key: said for said, keys in table.items() for key in keys}


_TABLES = _table("trainer_keys.yaml")
OWNED: dict[str, dict[str, str]] = {stage: _by_key(table) for stage, table in _TABLES["owned"].items()}
WITHOUT_EFFECT: dict[str, list[str]] = _TABLES["without_effect"]
REFUSED: dict[str, dict[str, str]] = {stage: _by_key(table) for stage, table in _TABLES["refused"].items()}
AT_MOST: dict[str, float] = _TABLES["at_most"]
_ALIASES: dict[str, list[str]] = {}  # another kit's name of a key: the keys that it may mean
for _key, _names in _table("aliases.yaml").items():
    for _name in _names:
        _ALIASES.setdefault(_name, []).append(_key)


@cache
def trainer_keys(stage: str) -> frozenset[str]:
    """The fields of TRL's config for a stage, parsed from the installed source because importing it takes seconds. For
    PPO and GRPO, whose loop is qalign's own, the settings of the optimiser."""
    if stage in RL_STAGES:
        return frozenset(_TABLES["optimiser"])
    fields: set[str] = set()
    for package, file in (
        ("transformers", "training_args.py"),
        ("trl", "trainer/base_config.py"),
        ("trl", f"trainer/{stage}_config.py"),
    ):
        source = Path(str(distribution(package).locate_file(f"{package}/{file}"))).read_text(encoding="utf-8")
        classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
        targets = (item.target for node in classes for item in node.body if isinstance(item, ast.AnnAssign))
        fields |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(field for field in fields if not field.startswith("_"))


def unknown_trainer_keys(raw: Keys) -> Iterator[Problem]:
    """(place, message) of every key under `trainer:` that TRL doesn't have, or that would have no effect."""
    for stage in STAGES:
        trainer = as_keys(as_keys(raw.get(stage)).get("trainer"))
        known = trainer_keys(stage) if trainer else set[str]()
        for key, value in trainer.items():
            place, most = (stage, "trainer", key), AT_MOST.get(key, AT_MOST["*"])
            owner = key if key in section_at((stage,)).model_fields else OWNED[stage].get(key) or OWNED["*"].get(key)
            if owner:
                inside = "" if "." in owner or owner in Recipe.model_fields else f"{stage}."
                yield place, f"trainer.{key}: set it as {inside}{owner}"
            elif key in [*WITHOUT_EFFECT["*"], *WITHOUT_EFFECT.get(stage, ())]:
                yield place, f"trainer.{key}: has no effect, because qalign replaces this part of TRL; remove it"
            elif reason := REFUSED["*"].get(key) or REFUSED.get(stage, {}).get(key):
                yield place, f"trainer.{key}: can't be used here; {reason}"
            elif key not in known:
                few = f"; it takes the optimiser's settings: {', '.join(sorted(known))}" if stage in RL_STAGES else ""
                near = did_you_mean(key, known) or meant_by(key, (stage,), raw) or few
                yield place, f"unknown key {short(key)} in {stage}.trainer{near}"
            elif isinstance(value, (int, float)) and not 0 <= value <= most:
                yield place, f"{stage}.trainer.{key} is {short(value)}; expected a number from 0 to {most:g}"
            elif not _is_finite(value):
                yield place, f"{stage}.trainer.{key} is {short(value)}; expected finite numbers"


def _is_finite(value: Any) -> bool:
    """Whether every number inside a value is finite."""
    if isinstance(value, dict):
        return all(map(_is_finite, cast(Keys, value).values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_finite, cast(list[Any], value)))
    return not isinstance(value, float) or math.isfinite(value)


def meant_by(key: str, place: Place, raw: Keys) -> str:
    """`"; did you mean 'learning_rate'?"`: what an unknown key in the section at this place probably means; empty if
    nothing is likely. It may stand in the wrong section, be another kit's name, be TRL's, or be misspelt."""
    word = key.lower().replace("-", "_")
    here = section_at(place).model_fields
    names = [word, *_ALIASES.get(word, ())]
    for name in sorted(names, key=lambda name: name not in here):  # a key of this very section first
        if meant := _as_written(name, place, raw):
            return f"; did you mean '{meant}'?"
    if len(place) == 1 and (stage := str(place[0])) in STAGES and word in trainer_keys(stage):
        return f"; did you mean '{stage}.trainer.{word}'?"
    return did_you_mean(word, here)


def _as_written(name: str, place: Place, raw: Keys) -> str | None:
    """A key of the recipe, such as `lora.r` or `epochs`, as it is written in or from the section at this place."""
    here, at = section_at(place).model_fields, str(place[0]) if place else ""
    if len(place) > 1:  # an item of `data` or `reward`
        return name if name in here else None
    section, _, inside = name.rpartition(".")
    stages = sorted(SECTIONS, key=lambda stage: stage not in raw)  # the recipe's own stages first
    if section == "trainer":
        return f"{at if at in STAGES else next(stage for stage in stages if stage in STAGES)}.{name}"
    if section:
        return inside if section == at or {section, at} <= {*RL_STAGES} else name
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
