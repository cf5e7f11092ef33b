"""The files, folders and packages that a recipe points at: which are missing, and where they are."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any

from qalign.errors import UserError, did_you_mean
from qalign.recipe import SFT_RUN, Recipe, Stage

DATA_SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".parquet", ".csv")


def looks_local(path: str) -> bool:
    """Whether a `data` or `base` value names something on disk rather than a hub id such as `org/name`."""
    marked = path.startswith((".", "/", "~")) or "\\" in path or bool(PureWindowsPath(path).drive)
    return marked or path.endswith((*DATA_SUFFIXES, ".gguf")) or _exists(Path(path))


def locate(path: str, beside: Path) -> Path | None:
    """The file or folder meant: from the current directory, else from the recipe's own folder."""
    here = Path(path).expanduser()
    return next((p for p in (here, beside / here) if _exists(p)), None)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a null in it: no path at all
        return False


def _adapter(path: str, beside: Path) -> Path | None:
    config = locate(str(Path(path) / "adapter_config.json"), beside)
    return config and config.parent


def package_file(path: str) -> Path:
    """The file of `package:NAME/FILE`, found without importing the package.

    Raises:
        UserError: the package is not installed, or has no such file.
    """
    name, _, inside = path.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a dotted name whose parent is missing
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package '{name}' is not installed; `make setup` installs the demo's, or pip install it")
    file = Path(spec.submodule_search_locations[0]) / inside
    if not file.is_file():
        near = did_you_mean(file.name, [f.name for f in file.parent.glob("*")] if file.parent.is_dir() else [])
        raise UserError(f"the package '{name}' holds no file '{inside}'{near}")
    return file


def missing(raw: dict, beside: Path):
    """(place, message) of every path in the recipe that isn't there."""
    model = raw["model"] if isinstance(raw.get("model"), dict) else {}
    base, template = model.get("base"), model.get("chat_template")
    if isinstance(base, str):
        if base.startswith("package:"):
            try:
                package_file(base)
            except UserError as error:
                yield ("model", "base"), f"base: {error}"
        elif looks_local(base) and not locate(base, beside):
            yield ("model", "base"), f"base: there is no '{base}'"
    if isinstance(template, str) and not locate(template, beside):
        yield ("model", "chat_template"), f"chat_template: there is no file '{template}'"
    for name, stage in raw.items():
        if not isinstance(stage, dict):
            continue
        for key in ("data", "eval_data"):
            value = stage.get(key)
            for index, item in enumerate(value if isinstance(value, list) else [value]):
                path = item.get("path") if isinstance(item, dict) else item
                if isinstance(path, str) and looks_local(path) and not locate(path, beside):
                    folders = [folder for folder in (Path(path).parent, (beside / path).parent) if folder.is_dir()]
                    siblings = [file.name for folder in folders for file in folder.glob("*")]
                    loc = (name, key, index) if isinstance(value, list) else (name, key)
                    yield loc, f"{key}: there is no file '{path}'" + did_you_mean(Path(path).name, siblings)
        start = stage.get("start_from")
        if isinstance(start, str) and start != SFT_RUN and not _adapter(start, beside):
            yield (
                (name, "start_from"),
                f"start_from: '{start}' is neither 'sft' nor a PEFT adapter folder (no adapter_config.json in it)",
            )


def resolved(recipe: Recipe, beside: Path) -> Recipe:
    """The recipe with every local path as it is reached from the current directory."""

    def found(path: str) -> str:
        place = locate(path, beside) if looks_local(path) or _exists(beside / path) else None
        return str(place) if place else path

    def adapter(path: str) -> str:
        start = str(_adapter(path, beside))
        return f"./{start}" if start == SFT_RUN else start  # a folder of that name stays one

    return _placed(recipe, found, adapter)


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with every local path from the root, so that it means the same in any directory."""
    output = os.path.abspath(Path(recipe.output).expanduser())
    return _placed(recipe, absolute_path, absolute_path).model_copy(update={"output": output})


def absolute_path(path: str) -> str:
    """A local path from the root; a hub id or a `package:` as it is."""
    here = Path(path).expanduser()
    return os.path.abspath(here) if _exists(here) else path


def _placed(recipe: Recipe, found: Callable[[str], str], adapter: Callable[[str], str]) -> Recipe:
    """The recipe with other words for its paths: those of adapters by `adapter`, the rest by `found`."""

    def sources(data):
        return data and tuple(source.model_copy(update={"path": found(source.path)}) for source in data)

    template = recipe.model.chat_template and found(recipe.model.chat_template)
    model = recipe.model.model_copy(update={"base": found(recipe.model.base), "chat_template": template})
    updates: dict[str, Any] = {"model": model}
    for name in recipe.model_fields_set:
        stage = getattr(recipe, name)
        if isinstance(stage, Stage):
            start = stage.start_from
            start = adapter(start) if start and start != SFT_RUN else start
            paths = {"data": sources(stage.data), "eval_data": sources(stage.eval_data), "start_from": start}
            updates[name] = stage.model_copy(update=paths)
    return recipe.model_copy(update=updates)
