"""The files, folders and packages that a recipe names: which of them are missing, and where the others are."""

import copy
import importlib.util
import os
import re
import symtable
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path, PureWindowsPath
from typing import Any, cast

from qalign.config.recipe import Recipe
from qalign.config.stages import REWARD_RUN, SFT_RUN
from qalign.errors import UserError, did_you_mean

_TEXT_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv")
DATA_SUFFIXES = (*_TEXT_SUFFIXES, ".parquet", *(f"{suffix}.gz" for suffix in _TEXT_SUFFIXES))
INSIDE = {"data": "path", "eval_data": "path", "reward": "source", "judge": "source"}  # one or a list of sections
RUNS = {"start_from": SFT_RUN, "reward": REWARD_RUN, "judge": REWARD_RUN}  # names of the recipe's own runs

Keys = dict[str, Any]  # a recipe, or a section of one, before it is checked
Place = tuple[str | int, ...]  # the keys and list positions that lead to a value
Problem = tuple[Place, str]


def looks_local(path: str) -> bool:
    """Whether a `data` or `base` value names something on disk rather than a hub id such as `org/name`."""
    marked = path.startswith((".", "/", "~")) or "\\" in path or bool(PureWindowsPath(path).drive)
    marked = marked or path.count("/") > 1  # a hub id has at most one
    return marked or path.endswith((*DATA_SUFFIXES, ".gguf")) or _exists(Path(path))


def locate(path: str, beside: Path) -> Path | None:
    """The file or folder, looked up in the current directory, then in the recipe's folder."""
    here = Path(path).expanduser()
    return next((p for p in (here, beside / here) if _exists(p)), None)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a null character: not a path
        return False


def _adapter(path: str, beside: Path) -> Path | None:
    """The PEFT adapter folder at a path."""
    config = locate(str(Path(path) / "adapter_config.json"), beside)
    return config and config.parent


def function_of(source: str) -> tuple[str, str] | None:
    """(module or `.py` file, name) if a reward is a Python function, `module:function` or `FILE.py:function`."""
    where, colon, name = source.rpartition(":")
    is_drive = len(where) == 1
    return (where, name) if colon and where and not is_drive and name.isidentifier() else None


def reward_adapter(source: str, beside: Path = Path()) -> Path | None:
    """The adapter folder of a reward source (itself or its run's); None if it is no adapter on this disk."""
    found = (_adapter(str(Path(source) / inside), beside) for inside in ("", "adapter", "reward/adapter"))
    return next(filter(None, found), None)


def is_own_model(source: str) -> bool:
    """Whether a reward is a model of its own: not the recipe's reward run, no function, no adapter."""
    return source != REWARD_RUN and not function_of(source) and not reward_adapter(source)


def package_file(path: str) -> Path:
    """The file of `package:NAME/FILE`, found without importing the package.

    Raises:
        UserError: the package is not installed, or has no such file.
    """
    name, _, inside = path.removeprefix("package:").partition("/")
    spec = _module(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package '{name}' is not installed; `make setup` installs the demo's, or pip install it")
    file = Path(spec.submodule_search_locations[0]) / inside
    if not file.is_file():
        near = did_you_mean(file.name, _names_of_files(file.parent))
        raise UserError(f"the package '{name}' has no file '{inside}'{near}")
    return file


def _names_of_files(*folders: Path) -> list[str]:
    return [file.name for folder in folders if folder.is_dir() for file in folder.glob("*")]


def as_keys(value: Any) -> Keys:
    """A section of an unchecked recipe; empty if something else is in its place."""
    return cast(Keys, value) if isinstance(value, dict) else {}


def named_paths(raw: Keys) -> Iterator[tuple[Place, str, str]]:
    """(place, key, text) of every setting in an unchecked recipe that may name a file, in any of its forms."""
    for name in raw:
        settings = as_keys(raw[name])
        keys = ("base", "chat_template") if name == "model" else ("data", "eval_data", "start_from")
        for key in (*keys, "reward", "judge") if name == "ppo" else keys:
            value: Any = settings.get(key)
            is_list = isinstance(value, (list, tuple)) and key in INSIDE
            items: list[Any] = [*value] if is_list else [value]
            for index, item in enumerate(items):
                place = (name, key, index) if is_list else (name, key)
                if key in INSIDE and isinstance(item, dict):
                    place, item = (*place, INSIDE[key]), as_keys(item).get(INSIDE[key])
                if isinstance(item, str):
                    yield place, key, item


def missing(raw: Keys, beside: Path) -> Iterator[Problem]:
    """(place, message) of every path in an unchecked recipe that doesn't exist; `beside` is the recipe's folder."""
    for place, key, path in named_paths(raw):
        problem = _reward_problem(path, beside) if key in ("reward", "judge") else _path_problem(key, path, beside)
        if problem:
            yield place, f"{key}: {problem}"
    yield from _judge_that_is_the_reward(raw, beside)


def _path_problem(key: str, path: str, beside: Path) -> str | None:
    if key == "base" and path.startswith("package:"):
        try:
            package_file(path)
        except UserError as error:
            return str(error)
        return None
    if key == "start_from":
        if path == SFT_RUN or _adapter(path, beside):
            return None
        return f"'{path}' is neither 'sft' nor a PEFT adapter folder (no adapter_config.json in it)"
    if locate(path, beside) or not (looks_local(path) or key == "chat_template"):
        return None
    near = did_you_mean(Path(path).name, _names_of_files(Path(path).parent, (beside / path).parent))
    return f"there is no '{path}'" if key == "base" else f"there is no file '{path}'{near}"


def _reward_problem(source: str, beside: Path) -> str | None:
    if function := function_of(source):
        where, name = function
        file = _function_file(where, beside)
        if file is None:
            kind = "file" if where.endswith(".py") else "module"
            return f"there is no {kind} '{where}' to take the function '{name}' from"
        known = _names_in(file)
        if known is None or name in known:
            return None
        return f"{where} has no function '{name}'{did_you_mean(name, known)}"
    if source.endswith(".py"):
        return f"'{source}' names no function; write {source}:FUNCTION"
    if source == REWARD_RUN or reward_adapter(source, beside) or not (looks_local(source) or _exists(beside / source)):
        return None
    place = locate(source, beside)
    if place and not (place / "config.json").is_file():
        return f"'{source}' has no finished reward run (adapter_config.json) and no model (config.json) in it"
    return None if place else f"there is no '{source}'"


def _judge_that_is_the_reward(raw: Keys, beside: Path) -> Iterator[Problem]:
    """A judge that is the reward under another name. (`PPO.conflicts` refuses one under the same name.)"""

    def identity(source: str) -> tuple[str, str]:
        if function := function_of(source):
            where, name = function
            return os.path.abspath(_function_file(where, beside) or where), name
        own = Path(str(raw.get("output"))).expanduser() / REWARD_RUN / "adapter" if source == REWARD_RUN else None
        return os.path.abspath(own or reward_adapter(source, beside) or locate(source, beside) or source), ""

    rewards = {identity(source): source for _, key, source in named_paths(raw) if key == "reward"}
    for place, key, source in named_paths(raw):
        if key == "judge" and (same := rewards.get(identity(source), source)) != source:
            yield place, f"judge: '{source}' is what the policy trains on, as '{same}'; name another"


def _function_file(where: str, beside: Path) -> Path | None:
    """The source of a module or the `.py` file, looked up in the current directory, then in the recipe's folder."""
    if where.endswith(".py"):
        return locate(where, beside)
    return _module_file(where) or locate(f"{where.replace('.', '/')}.py", beside)


def _module(name: str) -> ModuleSpec | None:
    """What Python would import under this name; found without importing it or its parent packages."""
    top, *inside = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    for part in inside:
        spec = spec and PathFinder.find_spec(part, list(spec.submodule_search_locations or ()))
    return spec


def _module_file(name: str) -> Path | None:
    spec = _module(name)
    return Path(spec.origin) if spec and spec.origin else None


def _names_in(file: Path) -> set[str] | None:
    """The names that a Python file defines or imports, without running it. None if only running it would tell."""
    if file.suffix != ".py":
        return None
    try:
        text = file.read_text(encoding="utf-8")
        symbols = symtable.symtable(text, str(file), "exec").get_symbols()
    except (OSError, SyntaxError, ValueError):  # reported when it is imported
        return None
    names = {s.get_name() for s in symbols if s.is_assigned() or s.is_imported() or s.is_namespace()}
    return None if "__getattr__" in names or re.search(r"^\s*from .+ import \*", text, flags=re.M) else names


def resolved(raw: Keys, beside: Path) -> Keys:
    """The recipe's keys with every local path as it is reached from the current directory; `beside` is its folder."""

    def reached(key: str, path: str) -> str:
        found = locate(path, beside)
        if key == "start_from":
            found = _adapter(path, beside)
        elif key in ("reward", "judge"):
            if function := function_of(path):
                file = None if _module_file(function[0]) else _function_file(function[0], beside)
                return f"{file}:{function[1]}" if file else path
            found = reward_adapter(path, beside) or found
        return f"./{found}" if str(found) == RUNS.get(key) else str(found or path)  # "./": a folder with a run's name

    return _replaced(raw, reached)


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with every local path made absolute, so that it means the same in any directory."""

    def from_root(key: str, path: str) -> str:
        function = function_of(path) if key in ("reward", "judge") else None
        if function is None:
            return absolute_path(path)
        where, name = function  # a module keeps its name, even beside a folder with that name
        return f"{absolute_path(where)}:{name}" if where.endswith(".py") else path

    output = os.path.abspath(Path(recipe.output).expanduser())
    return Recipe.model_validate({**_replaced(recipe.model_dump(), from_root), "output": output})


def absolute_path(path: str) -> str:
    """A local path made absolute; a hub id or a `package:` file unchanged."""
    here = Path(path).expanduser()
    return os.path.abspath(here) if _exists(here) else path


def _replaced(raw: Keys, replace: Callable[[str, str], str]) -> Keys:
    """A copy in which every path is `replace(key, path)`; the names of the recipe's own runs stay."""
    raw = copy.deepcopy(raw)
    for place, key, path in list(named_paths(raw)):
        if path != RUNS.get(key):
            inside: Any = raw
            for part in place[:-1]:
                inside = inside[part]
            inside[place[-1]] = replace(key, path)
    return raw
