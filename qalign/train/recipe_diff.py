"""The recipe that is kept in a run folder, read again and compared with another. Imports no torch."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from qalign.config.load import dump, parse
from qalign.config.recipe import Recipe
from qalign.config.stages import SFT_RUN, STAGES
from qalign.errors import UserError


def read_recipe(file: Path) -> Recipe:
    """The recipe of a finished run, or a `UserError`. (`load` would check that its data is still there.)"""
    try:
        return Recipe.model_validate(parse(file)[0])
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'recipe'}: {first['msg']}"
    except (OSError, UserError) as error:
        reason = str(error)
    raise UserError(f"{file}: the recipe that this run was trained with can't be read: {reason}")


def differences(file: Path, recipe: Recipe, stage: str) -> dict[str, tuple[object, object]]:
    """The dotted keys of a recipe that differ from the kept one, each with (value then, value now), or a `UserError`.
    `output` and the sections of other stages don't count."""
    kept = {}
    with suppress(UserError):
        kept, _ = parse(file)
    if not kept:
        raise UserError(f"{file}: the recipe that this run began with can't be read; --overwrite starts again")
    with suppress(ValidationError):  # if it has a key that no longer exists, which is reported below
        kept = yaml.safe_load(dump(Recipe.model_validate(kept)))  # with defaults for keys that are newer than it
    given = yaml.safe_load(dump(recipe))
    others = {*STAGES, "output"} - {stage}
    old, new = (dict(flat({key: r[key] for key in r if key not in others})) for r in (kept, given))
    outputs = str(kept.get("output", "")) or ".", str(Path(recipe.output).expanduser())
    return {
        key: (old.get(key, "not there"), new.get(key, "gone"))
        for key in {**old, **new}
        if not _same(old.get(key), new.get(key), outputs)
    }


def flat(section: dict[Any, Any], above: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys of a recipe, or of a summary, with their values."""
    for key, value in section.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = dict(enumerate(value))
        if isinstance(value, dict) and value:
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _same(old: object, new: object, outputs: tuple[str, str]) -> bool:
    """Whether two values of a recipe are equal. Two paths are equal if they lead to the same file, or, where a project
    was moved together with its runs, if they are the same relative to the recipe's output then and now."""
    if old == new or SFT_RUN in (old, new) or not (isinstance(old, str) and isinstance(new, str)):
        return old == new
    if os.path.realpath(old) == os.path.realpath(new):
        return True
    try:
        return os.path.relpath(old, outputs[0]) == os.path.relpath(new, outputs[1])
    except ValueError:  # two drives of Windows
        return False
