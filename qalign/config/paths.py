"""The files, folders and packages that a recipe points at: which are missing, and where they are."""

import ast
import importlib.machinery
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any

from qalign.config.recipe import Recipe
from qalign.config.stages import PPO, REWARD_RUN, SFT_RUN, Stage
from qalign.errors import UserError, did_you_mean

DATA_SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".parquet", ".csv")


def looks_local(path: str) -> bool:
    """Whether a `data` or `base` value names something on disk rather than a hub id such as `org/name`."""
    marked = path.startswith((".", "/", "~")) or "\\" in path or bool(PureWindowsPath(path).drive)
    marked = marked or path.count("/") > 1  # a hub id has one at most
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


def is_own_model(source: str) -> bool:
    """Whether a reward is a model of its own: not the recipe's reward run, no function, no adapter."""
    return source != REWARD_RUN and not function_of(source) and not reward_adapter(source)


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
            yield from _judged_by_itself(stage, str(raw.get("output")), beside)
        start = stage.get("start_from")
        if isinstance(start, str) and start != SFT_RUN and not _adapter(start, beside):
            yield (
                (name, "start_from"),
                f"start_from: '{start}' is neither 'sft' nor a PEFT adapter folder (no adapter_config.json in it)",
            )


def _named_rewards(key: str, value: Any):
    """(place, source) of what is named under `ppo.reward` or `ppo.judge`, in any of the forms that they have."""
    for index, item in enumerate(value if isinstance(value, list) else [value]):
        source = item.get("source") if isinstance(item, dict) else item
        if isinstance(source, str):
            yield ("ppo", key, index) if isinstance(value, list) else ("ppo", key), source


def _missing_rewards(key: str, value: Any, beside: Path):
    for loc, source in _named_rewards(key, value):
        if source == REWARD_RUN:
            continue
        if function := function_of(source):
            where, name = function
            file = _function_file(where, beside)
            if file is None:
                kind = "file" if where.endswith(".py") else "module"
                yield loc, f"{key}: there is no {kind} '{where}' to take the function '{name}' from"
            elif (known := _names_in(file)) is not None and name not in known:
                yield loc, f"{key}: {where} has no function '{name}'" + did_you_mean(name, known)
        elif source.endswith(".py"):
            yield loc, f"{key}: '{source}' names no function; write {source}:FUNCTION"
        elif (looks_local(source) or _exists(beside / source)) and not reward_adapter(source, beside):
            place = locate(source, beside)
            if not place:
                yield loc, f"{key}: there is no '{source}'"
            elif not (place / "config.json").is_file():
                yield (
                    loc,
                    f"{key}: '{source}' holds no finished reward run (adapter_config.json) and no model (config.json)",
                )


def _judged_by_itself(stage: dict, output: str, beside: Path):
    """A judge that is the reward under another name. (Under the same one the recipe itself refuses it.)"""

    def place(source: str) -> tuple[str, str]:
        if function := function_of(source):
            where, name = function
            return os.path.abspath(_function_file(where, beside) or where), name
        own = Path(output).expanduser() / REWARD_RUN / "adapter" if source == REWARD_RUN else None
        return os.path.abspath(own or reward_adapter(source, beside) or locate(source, beside) or source), ""

    paid = {place(source): source for _, source in _named_rewards("reward", stage.get("reward"))}
    for loc, source in _named_rewards("judge", stage.get("judge")):
        if paid.get(place(source), source) != source:
            yield loc, f"judge: '{source}' is what the policy trains on, as '{paid[place(source)]}'; name another"


def _function_file(where: str, beside: Path) -> Path | None:
    """The source of a module, or a `.py` file; looked for from the current directory, then beside the recipe."""
    if where.endswith(".py"):
        return locate(where, beside)
    return _module_file(where) or locate(f"{where.replace('.', '/')}.py", beside)


def _module_file(name: str) -> Path | None:
    """Where a module comes from that Python can import; found without importing it or the packages it is in."""
    if name.endswith(".py"):
        return None
    top, *inside = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if not inside or spec is None:
        return Path(spec.origin) if spec and spec.origin else None
    for folder in spec.submodule_search_locations or ():
        place = str(Path(folder, *inside))
        endings = ("/__init__.py", *importlib.machinery.all_suffixes())
        if file := next(filter(_exists, (Path(place + ending) for ending in endings)), None):
            return file
    return None


def _names_in(file: Path) -> set[str] | None:
    """What a Python file binds at its top; read, not run. None where only running it would tell."""
    if file.suffix != ".py":
        return None
    try:
        waiting: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    except (OSError, SyntaxError, ValueError):  # what is wrong with it shows when it is imported
        return None
    found = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
        waiting += ast.iter_child_nodes(node)
    return None if found & {"*", "__getattr__"} else found


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
            file = None if _module_file(function[0]) else _function_file(function[0], beside)
            return f"{file}:{function[1]}" if file else source
        place = str(reward_adapter(source, beside) or found(source))
        return f"./{place}" if place == REWARD_RUN else place  # a folder of that name stays one

    return _placed(recipe, found, adapter, reward)


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with every local path from the root, so that it means the same in any directory."""
    output = os.path.abspath(Path(recipe.output).expanduser())

    def reward(source: str) -> str:
        if function := function_of(source):  # a module keeps its name, even beside a folder that has it too
            where, name = function
            return f"{absolute_path(where)}:{name}" if where.endswith(".py") else source
        return absolute_path(source)

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
