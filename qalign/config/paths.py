"""The files, folders and packages that a recipe names, and where they are. (`missing` says which can't be used.)"""

import copy
import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple, cast

from qalign.config.recipe import Recipe
from qalign.config.stages import CONSTITUTION, GOLD_PAIRS, OWN_DATA, REWARD_RUN, RL_STAGES, SFT_RUN
from qalign.errors import UserError, did_you_mean

_TEXT_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv")
DATA_SUFFIXES = (*_TEXT_SUFFIXES, ".parquet", *(f"{suffix}.gz" for suffix in _TEXT_SUFFIXES))
# One or a list of sections, and their key for the path.
INSIDE = {**dict.fromkeys(("data", "eval_data", "agree_with"), "path"), **dict.fromkeys(("reward", "judge"), "source")}
# Names of the recipe's own runs; `base`, of a labeller, is the base itself.
RUNS = {
    "start_from": (SFT_RUN,),
    "reward": (REWARD_RUN,),
    "judge": (REWARD_RUN,),
    "gold": (GOLD_PAIRS,),
    "data": (CONSTITUTION,),
    "labeller": ("base", SFT_RUN),
}
SCORING = ("reward", "judge", "gold")  # keys that name what gives scores
FUNCTIONS = (*SCORING, "labeller")  # keys that may name a Python function

MEMBER = re.compile(r"member_[1-9][0-9]{0,2}")  # of an ensemble: its folder in `adapter/`

Keys = dict[str, Any]  # a recipe, or a section of one, before it is checked
Place = tuple[str | int, ...]  # the keys and list positions that lead to a value
Problem = tuple[Place, str]
Folders = Sequence[Path]  # where a relative path is looked up, in this order
HERE: Folders = (Path(),)


def looks_local(path: str) -> bool:
    """Whether a `data` or `base` value names something on disk rather than a hub id such as `org/name`."""
    marked = path.startswith((".", "/", "~")) or "\\" in path or bool(PureWindowsPath(path).drive)
    marked = marked or path.count("/") > 1  # a hub id has at most one
    return marked or path.endswith((*DATA_SUFFIXES, ".gguf")) or _is_there(path)


def data_set_name(path: str | Path) -> tuple[str, str | None]:
    """(hub id or folder, configuration) of a data set; `NAME:CONFIG` names one of several configurations."""
    name, _, config = str(path).rpartition(":")
    is_drive = len(name) == 1
    return (name, config) if name and config and not is_drive and not os.path.exists(path) else (str(path), None)


def _is_there(path: str | Path) -> bool:
    folder, config = data_set_name(path)
    return os.path.isdir(folder) if config else os.path.exists(path)


def expanded(path: str | Path) -> Path:
    """A path with `~` and `~user` written out, unless there is no such user: then nothing is there either."""
    with suppress(RuntimeError):
        return Path(path).expanduser()
    return Path(path)


def locate(path: str, folders: Folders = HERE) -> Path | None:
    """The file or folder, looked up in these folders, in this order."""
    return next((found for folder in folders if _is_there(found := folder / expanded(path))), None)


def adapter_folder(path: str, folders: Folders) -> Path | None:
    """The PEFT adapter folder at a path."""
    config = locate(str(Path(path) / "adapter_config.json"), folders)
    return config and config.parent


def function_of(source: str) -> tuple[str, str] | None:
    """(module or `.py` file, name) if a reward is a Python function, `module:function` or `FILE.py:function`."""
    where, colon, name = source.rpartition(":")
    is_drive = len(where) == 1
    return (where, name) if colon and where and not is_drive and name.isidentifier() else None


def reward_adapter(source: str, folders: Folders = HERE) -> Path | None:
    """The adapter folder of a reward source (itself, its run's, or that of a member, `RUN/member_4`), or the folder
    with an ensemble's; None if it is no adapter on this disk."""
    path = Path(source)
    places = [path / inside for inside in ("", "adapter", "reward/adapter")]
    if MEMBER.fullmatch(path.name):
        places += [run / "adapter" / path.name for run in (path.parent, path.parent / "reward")]
    for place in places:
        if found := adapter_folder(str(place), folders):
            return found
        if found := adapter_folder(str(place / "member_1"), folders):
            return found.parent
    return None


def adapters_in(folder: Path) -> list[Path]:
    """An adapter folder, or those of an ensemble's members, in their order."""
    if (folder / "adapter_config.json").is_file():
        return [folder]
    members = [place for place in folder.glob("member_*") if MEMBER.fullmatch(place.name)]
    return sorted(members, key=lambda place: int(place.name.rpartition("_")[2]))


def without_member(folder: Path) -> tuple[Path, str]:
    """(The folder of a run or its adapters, the member that was asked for: of `runs/demo/reward/member_4`, `member_4`;
    empty without one). A run may have such a name itself."""
    is_member = MEMBER.fullmatch(folder.name) and (folder.parent.name == "adapter" or not folder.is_dir())
    return (folder.parent, folder.name) if is_member else (folder, "")


def last_round(folder: Path) -> Path | None:
    """The DPO run of the last finished round of a best_of run, which has its policy; None without rounds."""
    rounds = {int(file.parts[-3][6:]): file.parent for file in folder.glob("round_[0-9]*/dpo/summary.json")}
    return rounds[max(rounds)] if rounds else None


def is_own_run(key: str, path: str) -> bool:
    """Whether a value of this key names a run of the recipe itself, or one member of it (`reward/member_4`)."""
    runs = RUNS.get(key, ())
    return path in runs or (REWARD_RUN in runs and own_member(path) is not None)


def own_member(source: str) -> str | None:
    """The folder of a member of the recipe's own reward run, from its name, `reward/member_4`."""
    run, _, member = source.partition("/")
    return member if run == REWARD_RUN and MEMBER.fullmatch(member) else None


def answering_adapter(source: str, folders: Folders = HERE) -> Path | None:
    """The adapter folder of a model that answers: itself, or its run's."""
    places = (adapter_folder(str(Path(source) / inside), folders) for inside in ("", "adapter"))
    return next(filter(None, places), None)


def reward_place(source: str, folders: Folders) -> Path | None:
    """What a reward source names: the file of its function, the folder of its adapter, or another folder or file."""
    if function := function_of(source):
        return function_file(function[0], folders)
    return reward_adapter(source, folders) or locate(source, folders)


def is_own_model(source: str) -> bool:
    """Whether a reward is a model of its own: not the recipe's reward run, no function, no adapter."""
    return not (is_own_run("reward", source) or function_of(source) or reward_adapter(source))


def package_file(path: str) -> Path:
    """The file of `package:NAME/FILE`, found without importing the package; a `UserError` if it isn't there."""
    name, _, inside = path.removeprefix("package:").partition("/")
    spec = _module(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package '{name}' is not installed; `make setup` installs the demo's, or pip install it")
    file = Path(spec.submodule_search_locations[0]) / inside
    if not file.is_file():
        near = did_you_mean(file.name, names_of_files(file.parent))
        raise UserError(f"the package '{name}' has no file '{inside}'{near}")
    return file


def check_fetched(files: Iterable[Path], key: str = "") -> None:
    """Raises a `UserError`, after the recipe's `key: `, if git left one of these files as a pointer to the real one."""
    for file in filter(Path.is_file, files):
        with suppress(OSError), file.open("rb") as opened:  # whoever reads it reports that
            if opened.read(40).startswith(b"version https://git-lfs"):
                fix = "run `git lfs pull` in the folder that was cloned"
                raise UserError(f"{key}{file}: is a pointer of Git LFS, not the file itself; {fix}")


def names_of_files(*folders: Path) -> list[str]:
    return [file.name for folder in folders if folder.is_dir() for file in folder.glob("*")]


def as_keys(value: Any) -> Keys:
    """A section of an unchecked recipe; empty if something else is in its place."""
    return cast(Keys, value) if isinstance(value, dict) else {}


def named_paths(raw: Keys) -> Iterator[tuple[Place, str, str]]:
    """(place, key, text) of every setting in an unchecked recipe that may name a file, in any of its forms."""
    for name in raw:
        settings = as_keys(raw[name])
        for key in _keys_of_paths(name):
            value: Any = settings.get(key)
            is_list = isinstance(value, (list, tuple)) and key in INSIDE
            items: list[Any] = [*value] if is_list else [value]
            for index, item in enumerate(items):
                place = (name, key, index) if is_list else (name, key)
                if key in INSIDE and isinstance(item, dict):
                    place, item = (*place, INSIDE[key]), as_keys(item).get(INSIDE[key])
                if isinstance(item, str):
                    yield place, key, item


def _keys_of_paths(section: str) -> tuple[str, ...]:
    if section == "model":
        return "base", "chat_template"
    keys = ("data", "eval_data", "start_from")
    if section == CONSTITUTION:
        return "data", "start_from", "principles", "labeller", "agree_with"
    return keys + (SCORING[:2] if section in RL_STAGES else SCORING[2:] if section == "goodhart" else ())


class Lookup(NamedTuple):
    """Where the relative paths of a recipe are looked up: those of its file in the file's folder, then in the current
    one; those typed on the command line the other way round."""

    beside: Path
    """The recipe's folder."""
    typed: frozenset[Place] = frozenset()
    """The places that the command line set."""

    def folders(self, place: Place) -> Folders:
        """Where to look for the path at this place."""
        is_typed = any(place[:length] in self.typed for length in range(1, len(place) + 1))
        return (Path(), self.beside) if is_typed else (self.beside, Path())


def function_file(where: str, folders: Folders) -> Path | None:
    """The source of a module or the `.py` file. A module of this name in one of the folders comes before one that
    Python would import."""
    if where.endswith(".py"):
        return locate(where, folders)
    own = locate(f"{where.replace('.', '/')}.py", folders) if all(where.split(".")) else None
    return own or _module_file(where)


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
    return Path(spec.origin) if spec and spec.origin and spec.has_location else None  # built-in modules have no file


def resolved(raw: Keys, lookup: Lookup) -> Keys:
    """The recipe's keys with every local path as it is reached from the current directory."""

    def reached(place: Place, key: str, path: str) -> str:
        folders = lookup.folders(place)
        function = function_of(path) if key in FUNCTIONS else None
        find = {"start_from": adapter_folder, "labeller": answering_adapter}.get(key, locate)
        found = (reward_place if function or key in SCORING else find)(path, folders)
        if function:
            module = _module_file(function[0])
            is_module = found is None or (module is not None and module.exists() and found.samefile(module))
            return path if is_module else f"{found}:{function[1]}"
        return f"./{found}" if is_own_run(key, str(found)) else str(found or path)  # "./": a folder with a run's name

    return _replaced(_with_own_data(raw), reached)


def _with_own_data(raw: Keys) -> Keys:
    """The recipe's keys with the file of its own constitution run in place of `data: constitution`."""
    raw, output = copy.deepcopy(raw), expanded(str(raw.get("output")))
    for place, key, path in list(named_paths(raw)):
        if key == "data" and is_own_run(key, path) and place[0] in OWN_DATA:
            _inside(raw, place)[place[-1]] = str(output / CONSTITUTION / OWN_DATA[str(place[0])])
    return raw


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with every local path made absolute, so that it means the same in any directory."""

    def from_root(place: Place, key: str, path: str) -> str:
        function = function_of(path) if key in FUNCTIONS else None
        if function is None:
            return absolute_path(path)
        where, name = function  # a module keeps its name, even beside a folder with that name
        return f"{absolute_path(where)}:{name}" if where.endswith(".py") else path

    output = os.path.abspath(expanded(recipe.output))
    return Recipe.model_validate({**_replaced(recipe.model_dump(), from_root), "output": output})


def absolute_path(path: str) -> str:
    """A local path made absolute; a hub id or a `package:` file unchanged."""
    here = expanded(path)
    return os.path.abspath(here) if _is_there(here) else path


def _replaced(raw: Keys, replace: Callable[[Place, str, str], str]) -> Keys:
    """A copy in which every path is `replace(place, key, path)`; the names of the recipe's own runs stay."""
    raw = copy.deepcopy(raw)
    for place, key, path in list(named_paths(raw)):
        if not is_own_run(key, path):
            _inside(raw, place)[place[-1]] = replace(place, key, path)
    return raw


def _inside(raw: Keys, place: Place) -> Any:
    """The section or list that holds the value at a place."""
    inside: Any = raw
    for part in place[:-1]:
        inside = inside[part]
    return inside
