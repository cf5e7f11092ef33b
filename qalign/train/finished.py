"""A finished run by its folder: what it was trained with, for the commands that take a run instead of a recipe."""

from pathlib import Path

import yaml
from pydantic import ValidationError

from qalign.config.recipe import STAGES, Recipe
from qalign.errors import UserError, did_you_mean
from qalign.train.run_folder import RunFolder


def open_run(folder: str, stages: tuple[str, ...] = STAGES) -> RunFolder:
    """The run in a folder such as `runs/demo/reward`; `runs/demo` and `runs/demo/reward/adapter` mean it too.

    Args:
        stages: which kinds of run will do, the first one found in `runs/demo`.

    Raises:
        UserError: there is no finished run of such a stage, or its recipe can't be read any more.
    """
    given = Path(folder).expanduser()
    given = given if given.name else given.resolve()  # "." has no name, and a run goes by its own
    given = given.parent if given.name == "adapter" else given
    found = [given / stage for stage in stages if (given / stage / "summary.json").is_file()]
    place = found[0] if found else given
    if not (place / "summary.json").is_file():
        beside = [file.name for file in given.parent.glob("*")] if given.parent.is_dir() else []
        near = "" if given.is_dir() else did_you_mean(given.name, beside)
        hint = near or f"; train one with python -m qalign.{stages[0]} RECIPE"
        raise UserError(f"{folder}: there is no finished {' or '.join(stages)} run{hint}")
    recipe = _recipe(place / "recipe.yaml")
    stage = next((stage for stage in STAGES if place.name == stage), None)
    if stage not in stages:
        raise UserError(f"{folder}: is a run of {stage or place.name}, expected one of {', '.join(stages)}")
    return RunFolder(recipe.model_copy(update={"output": str(place.parent)}), stage)


def _recipe(file: Path) -> Recipe:
    """Not `recipe_file.load`: the data that the run was trained on may be gone."""
    try:
        return Recipe.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'recipe'}: {first['msg']}"
    except OSError as error:
        reason = error.strerror or str(error)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
    raise UserError(f"{file}: the recipe that this run was trained with can't be read any more: {reason}")
