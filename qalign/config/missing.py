"""Which of the files, folders and functions that a recipe names are missing or can't be used, and the likely fix.

Nothing is imported and nothing is run: names in Python files are read from their source.
"""

import os
import re
import symtable
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

from qalign.config.paths import (
    DATA_SUFFIXES,
    SCORING,
    Folders,
    Keys,
    Lookup,
    Place,
    Problem,
    adapter_folder,
    answering_adapter,
    data_set_name,
    expanded,
    function_file,
    function_of,
    is_own_run,
    locate,
    looks_local,
    named_paths,
    names_of_files,
    own_member,
    package_file,
    reward_adapter,
    reward_place,
)
from qalign.config.stages import CONSTITUTION, GOLD_PAIRS, REWARD_RUN, RL_STAGES, SFT_RUN
from qalign.errors import UserError, did_you_mean, short

LONGEST_PATH = 3_000  # of an output folder, in bytes: Linux takes 4,096, and a checkpoint's files lie below it
FILE_KEYS = ("chat_template", "principles")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def missing(raw: Keys, lookup: Lookup, sections: Collection[str]) -> Iterator[Problem]:
    """(place, message) of every path in these sections of an unchecked recipe that can't be used."""
    for place, key, path in named_paths(raw):
        if place[0] in sections:
            finders = {"gold": _gold_problem, "labeller": _labeller_problem}
            find = finders.get(key, _reward_problem if key in SCORING else partial(_path_problem, key))
            if is_own_run(key, path) and key == "data":
                problem = _own_data_problem(str(place[0]), raw)
            else:
                problem = find(path, lookup.folders(place))
            if problem:
                yield place, f"{place[0]}.{key}: {problem}"
    for name in RL_STAGES:
        if name in sections:
            yield from _judge_that_is_the_reward(name, {**raw, **dict.fromkeys({*RL_STAGES} - {name})}, lookup)
    if isinstance(raw.get("output"), str) and (problem := output_problem(raw["output"])):
        yield ("output",), f"output: {problem}"


def output_problem(text: str) -> str | None:
    """Why nothing can be written to this folder; None if something can, as far as its name and its parents tell."""
    if not text.isprintable() or not text.strip():
        return f"{short(text)} has characters that no folder should have; choose another name"
    path = expanded(text)
    if str(path).startswith("~"):
        return f"{short(text)} is in the home of a user that this computer doesn't have"
    full = Path(os.path.abspath(path))
    if full.parent == full:
        return f"{short(text)} is the root of the disk; name a folder in it"
    if len(os.fsencode(full)) > LONGEST_PATH or any(len(os.fsencode(part)) > 255 for part in full.parts):
        return f"{short(text)} is too long for the name of a folder"
    there = next(folder for folder in (full, *full.parents) if os.path.lexists(folder))
    if not there.exists():
        return f"{short(text)}: {there} is a link that leads nowhere"
    if not there.is_dir():
        return f"{short(text)} is, or lies in, a file ({there}); choose another folder"
    return None


def _path_problem(key: str, path: str, folders: Folders) -> str | None:
    if key == "base" and path.startswith("package:"):
        try:
            package_file(path)
        except UserError as error:
            return str(error)
        return None
    if key == "start_from":
        if path == SFT_RUN or adapter_folder(path, folders):
            return None
        where = _looked_in(path, folders)
        return f"{short(path)} is neither 'sft' nor a PEFT adapter folder (no adapter_config.json in it){where}"
    if found := locate(path, folders):
        return _unusable(path, Path(data_set_name(found)[0]), is_file=key in FILE_KEYS)
    if looks_local(path) or key in FILE_KEYS:
        kind = "file" if key in FILE_KEYS or path.endswith((*DATA_SUFFIXES, ".gguf")) else "file or folder"
        return f"there is no {kind} {short(path)}" + _hint(path, folders)
    name = data_set_name(path)[0] if key != "base" else path
    if len(name) > 96 or not HUB_ID.fullmatch(name):
        return f"{short(path)} is no file, no folder and no hub id such as org/name" + _hint(path, folders)
    return None


def _unusable(path: str, found: Path, *, is_file: bool) -> str | None:
    """Why something that is there can't be read."""
    if is_file and found.is_dir():
        return f"{short(path)} is a folder, and a file is needed"
    if not found.is_file() and not found.is_dir():  # reading a pipe or a device may never end
        return f"{short(path)} is neither a file nor a folder"
    return None if os.access(found, os.R_OK) else f"{short(path)} may not be read by this user"


def _looked_in(path: str, folders: Folders) -> str:
    """The folders in which a relative path was looked up, in words."""
    if expanded(path).is_absolute():
        return ""
    return f", looked up in {' and '.join(dict.fromkeys(os.path.abspath(folder) for folder in folders))}"


def _hint(path: str, folders: Folders) -> str:
    """Where a path was looked up, and the most similar name there."""
    try:
        near = did_you_mean(Path(path).name, names_of_files(*((folder / path).parent for folder in folders)))
    except (OSError, ValueError):  # no such path can be
        near = ""
    return _looked_in(path, folders) + near


def _own_data_problem(section: str, raw: Keys) -> str | None:
    if section == CONSTITUTION:
        return f"'{CONSTITUTION}' is this very run; name a file of prompts"
    if raw.get(CONSTITUTION):
        return None
    fix = f"add one, or write ./{CONSTITUTION} for a folder of that name"
    return f"'{CONSTITUTION}' is this recipe's own run, and it has no '{CONSTITUTION}:' section; {fix}"


def _labeller_problem(source: str, folders: Folders) -> str | None:
    if is_own_run("labeller", source) or answering_adapter(source, folders):
        return None
    if function_of(source) or source.endswith(".py"):
        return _reward_problem(source, folders)
    where = _looked_in(source, folders)
    expected = "neither 'base', 'sft', a run that answers, a PEFT adapter folder nor FILE.py:function"
    return f"{short(source)} is {expected}{where}"


def _reward_problem(source: str, folders: Folders) -> str | None:
    if function := function_of(source):
        where, name = function
        file = function_file(where, folders)
        if file is None or (where.endswith(".py") and not file.is_file()):
            kind = "file" if where.endswith(".py") else "module"
            looked = _looked_in(where, folders)
            return f"there is no {kind} {short(where)} to take the function {short(name)} from{looked}"
        known = _names_in(file)
        if known is None or name in known:
            return None
        return f"{where} has no function {short(name)}{did_you_mean(name, known)}"
    if source.endswith(".py"):
        return f"{short(source)} names no function; write {source}:FUNCTION"
    if is_own_run("reward", source) or reward_adapter(source, folders):
        return None
    place = locate(source, folders)
    if place and not (place / "config.json").is_file():
        return f"{short(source)} has no finished reward run (adapter_config.json) and no model (config.json) in it"
    if place is None and looks_local(source):
        return f"there is no {short(source)}" + _hint(source, folders)
    if place is None and (len(source) > 96 or not HUB_ID.fullmatch(source)):
        return f"{short(source)} is no reward run, no module:function and no hub id such as org/name"
    return None


def _gold_problem(source: str, folders: Folders) -> str | None:
    if source == GOLD_PAIRS or function_of(source):
        return _reward_problem(source, folders) if function_of(source) else None
    return f"{short(source)} is neither '{GOLD_PAIRS}' nor a function; write FILE.py:function"


def _judge_that_is_the_reward(stage: str, raw: Keys, lookup: Lookup) -> Iterator[Problem]:
    """A judge that is the reward under another name. (`PPO.conflicts` refuses one under the same name.)"""

    def identity(source: str, place: Place) -> tuple[str, str]:
        where, name = function_of(source) or (source, "")
        run = expanded(str(raw.get("output"))) / REWARD_RUN / "adapter"
        own = run / (own_member(source) or "") if is_own_run("reward", source) else None
        return os.path.abspath(own or reward_place(source, lookup.folders(place)) or where), name

    rewards = {identity(source, place): source for place, key, source in named_paths(raw) if key == "reward"}
    for place, key, source in named_paths(raw):
        if key == "judge" and (same := rewards.get(identity(source, place), source)) != source:
            yield place, f"{stage}.judge: '{source}' is what the policy trains on, as '{same}'; name another"


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
    return None if "__getattr__" in names or re.search(r"^[ \t]*from .+ import \*", text, flags=re.M) else names
