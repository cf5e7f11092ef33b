"""The files, folders and packages that a recipe points at: which are missing, and where they are."""

import ast
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any

from qalign.errors import UserError, did_you_mean
from qalign.recipe import PPO, REWARD_RUN, SFT_RUN, Recipe, Stage

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


def function_of(source: str) -> tuple[str, str] | None:
    """(module or `.py` file, name) if a reward is a Python function, `module:function` or `FILE.py:function`."""
    where, colon, name = source.rpartition(":")
    is_drive = len(where) == 1
    return (where, name) if colon and where and not is_drive and name.isidentifier() else None


def reward_adapter(source: str, beside: Path = Path()) -> Path | None:
    """The adapter folder that a reward names, itself or by its run; None if it is no adapter on this disk."""
    found = (_adapter(str(Path(source) / inside), beside) for inside in ("", "adapter", "reward/adapter"))
    return next(filter(None, found), None)


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
        if name == "ppo":
            for key in ("reward", "judge"):
                yield from _missing_rewards(key, stage.get(key), beside)
        start = stage.get("start_from")
        if isinstance(start, str) and start != SFT_RUN and not _adapter(start, beside):
            yield (
                (name, "start_from"),
                f"start_from: '{start}' is neither 'sft' nor a PEFT adapter folder (no adapter_config.json in it)",
            )


def _missing_rewards(key: str, value: Any, beside: Path):
    for index, item in enumerate(value if isinstance(value, list) else [value]):
        source = item.get("source") if isinstance(item, dict) else item
        if not isinstance(source, str) or source == REWARD_RUN:
            continue
        loc = ("ppo", key, index) if isinstance(value, list) else ("ppo", key)
        if function := function_of(source):
            where, name = function
            file = _function_file(where, beside)
            if file is None:
                yield loc, f"{key}: there is no module '{where}' to take the function '{name}' from"
            elif file.suffix == ".py" and name not in (known := _functions(file)):
                yield loc, f"{key}: {where} has no function '{name}'" + did_you_mean(name, known)
        elif looks_local(source) and not reward_adapter(source, beside):
            place = locate(source, beside)
            if not place:
                yield loc, f"{key}: there is no '{source}'"
            elif not (place / "config.json").is_file():
                yield (
                    loc,
                    f"{key}: '{source}' holds no finished reward run (adapter_config.json) and no model (config.json)",
                )


def _function_file(where: str, beside: Path) -> Path | None:
    """The source of a module, or a `.py` file; looked for from the current directory, then beside the recipe."""
    if where.endswith(".py"):
        return locate(where, beside)
    try:
        spec = importlib.util.find_spec(where)
    except (ImportError, ValueError):
        spec = None
    return Path(spec.origin) if spec and spec.origin else locate(f"{where.replace('.', '/')}.py", beside)


def _functions(file: Path) -> list[str]:
    """What a Python file defines or imports at its top, by name; read, not run."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    found = [node.name for node in tree.body if hasattr(node, "name")]
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found += [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.Assign):
            found += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return found


def resolved(recipe: Recipe, beside: Path) -> Recipe:
    """The recipe with every local path as it is reached from the current directory."""

    def found(path: str) -> str:
        place = locate(path, beside) if looks_local(path) or _exists(beside / path) else None
        return str(place) if place else path

    def adapter(path: str) -> str:
        start = str(_adapter(path, beside))
        return f"./{start}" if start == SFT_RUN else start  # a folder of that name stays one

    def reward(source: str) -> str:
        if function := function_of(source):
            file = _function_file(function[0], beside) if function[0].endswith(".py") else None
            return f"{file}:{function[1]}" if file else source
        place = reward_adapter(source, beside)
        return str(place) if place else found(source)

    return _placed(recipe, found, adapter, reward)


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with every local path from the root, so that it means the same in any directory."""
    output = os.path.abspath(Path(recipe.output).expanduser())

    def reward(source: str) -> str:
        where, name = function_of(source) or (source, "")
        return f"{absolute_path(where)}:{name}" if name else absolute_path(where)

    return _placed(recipe, absolute_path, absolute_path, reward).model_copy(update={"output": output})


def absolute_path(path: str) -> str:
    """A local path from the root; a hub id or a `package:` as it is."""
    here = Path(path).expanduser()
    return os.path.abspath(here) if _exists(here) else path


def _placed(
    recipe: Recipe, found: Callable[[str], str], adapter: Callable[[str], str], reward: Callable[[str], str]
) -> Recipe:
    """The recipe with other words for its paths: those of adapters by `adapter`, of PPO's rewards by `reward`, the rest
    by `found`."""

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
            if isinstance(stage, PPO):
                paths |= {key: _rewards(getattr(stage, key), reward) for key in ("reward", "judge")}
            updates[name] = stage.model_copy(update=paths)
    return recipe.model_copy(update=updates)


def _rewards(sources, reward: Callable[[str], str]):
    return sources and tuple(
        s if s.source == REWARD_RUN else s.model_copy(update={"source": reward(s.source)}) for s in sources
    )
