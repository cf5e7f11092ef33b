"""What changed between the recipe that a run began with and the one that is given now."""

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, cast

from pydantic import ValidationError

from qalign.config.paths import Keys
from qalign.config.recipe import Recipe
from qalign.config.stages import SFT_RUN, STAGES


def differences(kept: Keys, recipe: Recipe, stage: str, output: str) -> dict[str, tuple[object, object]]:
    """The dotted keys that differ, each with (value then, value now). `output` and other stages' sections don't count.

    Args:
        kept: the recipe that the run of `stage` began with, as it was written into the run folder.
        output: where that run lies now.
    """
    was = str(kept.get("output", "")) or "."
    with suppress(ValidationError):  # if it has a key that no longer exists, which is reported below
        kept = Recipe.model_validate(kept).model_dump(mode="json")  # with defaults for keys that are newer than it
    given = recipe.model_dump(mode="json")
    others = {*STAGES, "output"} - {stage}
    old, new = (dict(flat({key: r[key] for key in r if key not in others})) for r in (kept, given))
    return {
        key: (old.get(key, "not there"), new.get(key, "gone"))
        for key in {**old, **new}
        if not _same(old.get(key), new.get(key), (was, output))
    }


def flat(section: Keys, above: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys of a recipe, or of a summary, with their values."""
    for key, value in section.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in cast(list[Any], value)):
            value = dict(enumerate(cast(list[Any], value)))
        if isinstance(value, dict) and value:
            yield from flat(cast(Keys, value), f"{above}{key}.")
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
