"""A recipe file in, a checked recipe out: every problem at once, each as `file:line` with the likely fix.

Nothing here imports torch, so a bad recipe answers in well under a second.
"""

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from qalign.errors import UserError, did_you_mean
from qalign.recipe import DPO, Lora, Model, Recipe, Source, Stage

DATA_SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".parquet", ".csv")


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `5e-6` is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load(path: str, overrides: list[str] = (), stage: str | None = None) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: the YAML file.
        overrides: `key=value` words, keys dotted (`dpo.max_steps=20`), values read as YAML.
        stage: a section that must be there.

    Raises:
        UserError: one line a problem, all problems at once, each with `file:line`.
    """
    file = Path(path)
    if not file.is_file():
        near = did_you_mean(file.name, [f.name for f in file.parent.glob("*.yaml")] if file.parent.is_dir() else [])
        raise UserError(f"{path}: there is no such recipe{near}")
    text = file.read_text(encoding="utf-8")
    try:
        raw, root = yaml.load(text, _Loader) or {}, yaml.compose(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(
            f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {getattr(error, 'problem', error)}"
        ) from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}:1: a recipe is a set of keys (model:, output:, dpo: …), not {type(raw).__name__}")
    lines = dict(_lines(root))
    overridden = _apply(raw, overrides)

    def where(loc: tuple) -> str:
        for cut in range(len(loc), -1, -1):
            if loc[:cut] in overridden:
                return "command line"
            if loc[:cut] in lines:
                return f"{path}:{lines[loc[:cut]]}"
        return f"{path}:1"

    problems: dict[tuple, str] = {}
    recipe = None
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        for item in error.errors():
            loc = tuple(part for part in item["loc"] if _in_recipe(raw, item["loc"], part))
            problems.setdefault(loc, _explain(item, loc))
    for loc, message in [*_missing_files(raw, file.parent), *_unknown_trainer_keys(raw)]:
        problems.setdefault(loc, message)
    if stage and stage not in raw:
        problems.setdefault((stage,), f"the recipe has no '{stage}:' section, which `python -m qalign.{stage}` needs")
    if problems:
        found = [(where(loc), message) for loc, message in problems.items()]
        raise UserError(*(f"{place}: {message}" for place, message in sorted(found, key=_by_line)))
    return _resolve_paths(recipe, file.parent)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out; reads back as the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _by_line(found: tuple[str, str]) -> tuple[str, int]:
    place, _, line = found[0].rpartition(":")
    return (place, int(line)) if line.isdigit() else (found[0], 0)


def _lines(node: yaml.Node | None, loc: tuple = ()):
    """Every place in the file as (keys that lead there, line number of its key)."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*loc, key.value), key.start_mark.line + 1
            yield from _lines(value, (*loc, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*loc, index), value.start_mark.line + 1
            yield from _lines(value, (*loc, index))


def _apply(raw: dict, overrides: list[str]) -> set[tuple]:
    """Writes `key=value` words into the raw recipe; returns the places written."""
    places = set()
    for word in overrides:
        name, equals, value = word.partition("=")
        keys = tuple(name.split("."))
        if not equals or not all(keys):
            raise UserError(f"command line: '{word}' is not KEY=VALUE; write for example dpo.max_steps=20")
        section = raw
        for key in keys[:-1]:
            if not isinstance(section.setdefault(key, {}), dict):
                raise UserError(f"command line: '{word}': {key} is a value, not a section")
            section = section[key]
        try:
            section[keys[-1]] = yaml.load(value, _Loader)
        except yaml.YAMLError:
            raise UserError(f"command line: '{word}': the value is not valid YAML; quote it") from None
        places.add(keys)
    return places


def _in_recipe(raw: dict, loc: tuple, part: Any) -> bool:
    """Pydantic adds the tried type to a union's place ('int', 'constrained-str'): keep only what the file knows."""
    names = {name for section in (Recipe, Model, Lora, DPO, Source) for name in section.model_fields}
    return isinstance(part, int) or part in names or (part == loc[-1] and _holds_key(raw, part))


def _holds_key(value: Any, key: str) -> bool:
    if isinstance(value, dict):
        return key in value or any(_holds_key(v, key) for v in value.values())
    return isinstance(value, list) and any(_holds_key(v, key) for v in value)


def _explain(item: dict, loc: tuple) -> str:
    """One pydantic error in a user's words."""
    name = ".".join(str(part) for part in loc)
    kind, found = item["type"], item.get("input")
    if kind == "extra_forbidden":
        known = _section(loc[:-1]).model_fields
        within = f" in {'.'.join(map(str, loc[:-1]))}" if loc[:-1] else ""
        return f"unknown key '{loc[-1]}'{within}" + (
            did_you_mean(str(loc[-1]), known) or f"; known: {', '.join(known)}"
        )
    if kind == "missing":
        return f"'{name}' is missing"
    if kind == "value_error":
        key, _, rest = str(item["ctx"]["error"]).partition(":")
        return f"{'.'.join(map(str, (*loc, key)))}:{rest}"
    if kind == "literal_error":
        if loc and loc[-1] == "micro_batch_size":
            return f"{name} is {found!r}; expected 'auto' or a whole number of at least 1"
        expected = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        return f"{name} is {found!r}; expected one of {', '.join(expected)}" + did_you_mean(str(found), expected)
    expected = item["msg"].removeprefix("Input should be ").replace("valid integer", "whole number")
    return f"{name} is {found!r}; expected {expected.replace('a valid ', 'a ')}"


def _section(loc: tuple) -> type[BaseModel]:
    """The class of the section at this place of the recipe."""
    section: Any = Recipe
    for key in loc:
        if isinstance(key, int):
            continue
        hint = section.model_fields[key].annotation
        inside = [hint, *get_args(hint)]
        section = next((t for t in inside if isinstance(t, type) and issubclass(t, BaseModel)), Source)
    return section


# --- what the recipe points at ---------------------------------------------------------------------------------------


def looks_local(path: str) -> bool:
    """Whether a `data` or `base` value names something on disk rather than a hub id such as `org/name`."""
    return path.endswith((*DATA_SUFFIXES, ".gguf")) or path.startswith((".", "/", "~")) or Path(path).exists()


def locate(path: str, beside: Path) -> Path | None:
    """The file or folder meant: from the current directory, else from the recipe's own folder."""
    here = Path(path).expanduser()
    return next((p for p in (here, beside / here) if p.exists()), None)


def package_file(path: str) -> Path:
    """The file of `package:NAME/FILE`, found without importing the package.

    Raises:
        UserError: the package is not installed, or has no such file.
    """
    name, _, inside = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package '{name}' is not installed; `make setup` installs the demo's, or pip install it")
    file = Path(spec.submodule_search_locations[0]) / inside
    if not file.is_file():
        near = did_you_mean(file.name, [f.name for f in file.parent.glob("*")] if file.parent.is_dir() else [])
        raise UserError(f"the package '{name}' holds no file '{inside}'{near}")
    return file


def _missing_files(raw: dict, beside: Path):
    """(place, message) of every path in the recipe that isn't there."""
    base = (raw.get("model") or {}).get("base") if isinstance(raw.get("model"), dict) else None
    if isinstance(base, str):
        if base.startswith("package:"):
            try:
                package_file(base)
            except UserError as error:
                yield ("model", "base"), f"base: {error}"
        elif looks_local(base) and not locate(base, beside):
            yield ("model", "base"), f"base: there is no '{base}'"
    for name, stage in raw.items():
        if not isinstance(stage, dict):
            continue
        for key in ("data", "eval_data"):
            value = stage.get(key)
            for index, item in enumerate(value if isinstance(value, list) else [value]):
                path = item.get("path") if isinstance(item, dict) else item
                if isinstance(path, str) and looks_local(path) and not locate(path, beside):
                    folder = (beside / path).parent
                    siblings = [f.name for f in folder.glob("*")] if folder.is_dir() else []
                    loc = (name, key, index) if isinstance(value, list) else (name, key)
                    yield loc, f"{key}: there is no file '{path}'" + did_you_mean(Path(path).name, siblings)
        start = stage.get("start_from")
        if isinstance(start, str) and not locate(str(Path(start) / "adapter_config.json"), beside):
            yield (
                (name, "start_from"),
                f"start_from: '{start}' is not a PEFT adapter folder (no adapter_config.json in it)",
            )


# What qalign sets itself, and where to say it instead. (The last two are old names, silently ignored beside the new.)
_OWNED = {
    "output_dir": "output", "max_length": "model.max_length", "seed": "seed", "num_train_epochs": "epochs",
    "per_device_train_batch_size": "micro_batch_size", "per_device_eval_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size", "lr_scheduler_type": "scheduler", "warmup_steps": "warmup_ratio",
    "eval_steps": "eval_every", "save_steps": "save_every", "loss_type": "loss", "bf16": "model.compute_dtype",
    "fp16": "model.compute_dtype", "gradient_checkpointing": "trainer.activation_checkpointing",
    "gradient_checkpointing_kwargs": "trainer.activation_checkpointing_kwargs",
}  # fmt: skip
# What TRL's DPOTrainer does inside its own loss or data preparation, where qalign has its own or nothing.
_WITHOUT_EFFECT = {
    "model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "disable_dropout", "dataset_num_proc",
    "truncation_mode", "padding_free", "pad_to_multiple_of", "precompute_ref_log_probs", "precompute_ref_batch_size",
    "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "use_weighting", "discopop_tau",
    "activation_offloading", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "pad_token",
}  # fmt: skip


def trainer_keys() -> set[str]:
    """The fields of TRL's DPOConfig, read from the installed source: importing it would take seconds."""
    fields = set()
    for package, inside in (
        ("transformers", "training_args.py"),
        ("trl", "trainer/base_config.py"),
        ("trl", "trainer/dpo_config.py"),
    ):
        source = Path(importlib.util.find_spec(package).submodule_search_locations[0]) / inside
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                fields |= {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
    return {field for field in fields if not field.startswith("_")}


def _unknown_trainer_keys(raw: dict):
    """(place, message) of every key under `trainer:` that TRL doesn't have, or that wouldn't do anything."""
    known = None
    for name, stage in raw.items():
        trainer = stage.get("trainer") if isinstance(stage, dict) else None
        for key in trainer if isinstance(trainer, dict) else ():
            known = known or trainer_keys()
            loc = (name, "trainer", key)
            owner = key if key in DPO.model_fields else _OWNED.get(key)
            if owner:
                inside = "" if "." in owner or owner in Recipe.model_fields else f"{name}."
                yield loc, f"trainer.{key}: set it as {inside}{owner}"
            elif key in _WITHOUT_EFFECT:
                yield loc, f"trainer.{key}: has no effect, qalign does this part of TRL's DPOTrainer itself; remove it"
            elif key not in known:
                yield loc, f"unknown key '{key}' in {name}.trainer" + did_you_mean(key, known)


def _resolve_paths(recipe: Recipe, beside: Path) -> Recipe:
    """The recipe with every local path as it is reached from the current directory."""

    def found(path: str) -> str:
        place = locate(path, beside) if looks_local(path) or (beside / path).exists() else None
        return str(place) if place else path

    def sources(data):
        return data and tuple(source.model_copy(update={"path": found(source.path)}) for source in data)

    updates: dict[str, Any] = {"model": recipe.model.model_copy(update={"base": found(recipe.model.base)})}
    for name in recipe.model_fields_set:
        stage = getattr(recipe, name)
        if isinstance(stage, Stage):
            start = stage.start_from and str(locate(stage.start_from, beside))
            paths = {"data": sources(stage.data), "eval_data": sources(stage.eval_data), "start_from": start}
            updates[name] = stage.model_copy(update=paths)
    return recipe.model_copy(update=updates)
