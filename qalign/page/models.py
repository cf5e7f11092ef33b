"""The models that the page can compare: the bare base, and adapters of finished runs.

Only folders that the user named or that lie under `runs/` are loaded, after resolving symlinks, and only weights in
safetensors. The page chooses a model by its name in this list, never by a path. Imports no torch.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

from qalign.config.paths import adapters_in, expanded
from qalign.config.recipe import Model, Recipe
from qalign.config.stages import ANSWERING_STAGES
from qalign.errors import UserError
from qalign.model.lineage import WEIGHTS, adapter_hash, check_base
from qalign.train.run_folder import RunFolder, open_run

BASE = "base"
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class ModelEntry:
    """A model that can answer. The bare base has neither an adapter nor a recipe."""

    name: str  # the page's name for it, such as `base` or `demo/dpo`
    adapter: Path | None = None  # its adapter folder with symlinks resolved
    recipe: Recipe | None = None  # of its run; None for an adapter made elsewhere
    reward: Path | None = None  # the adapter folder of the finished reward run with the same output, or its ensemble's
    within: Path = Path()  # no file of the two adapters may lie outside this folder

    @property
    def weights_hash(self) -> str | None:
        """Hash of the adapter weights; None for the base."""
        return self.adapter and adapter_hash(self.adapter)


def safe_adapter(adapter: Path, within: Path) -> Path:
    """An adapter folder with symlinks resolved; a `UserError` if a symlink leads out of `within`, or if there are no
    safetensors."""
    real, allowed = adapter.resolve(), within.resolve()
    for file in (real, real / CONFIG, real / WEIGHTS):
        if file != real and not file.is_file():
            hint = "; weights in other formats can run code and are not loaded" if file.name == WEIGHTS else ""
            raise UserError(f"{adapter}: has no {file.name}{hint}")
        if not file.resolve().is_relative_to(allowed):
            raise UserError(f"{adapter}: {file.name} leads out of {within} through a symlink")
    return real


def safe_reward(adapter: Path, within: Path) -> Path | None:
    """The folder of a reward run's adapter, or of its ensemble, with symlinks resolved; None if there is none in it. A
    `UserError` as `safe_adapter` raises it."""
    folders = [safe_adapter(folder, within) for folder in adapters_in(adapter)]
    return adapter.resolve() if folders else None


def held_out_quantiles(reward: Path) -> list[float]:
    """Quantiles of the scores that a reward model gave to held-out answers, from the least to the greatest, by its
    adapter folder; empty if its run measured none."""
    try:
        found = json.loads((reward.parent / "summary.json").read_text(encoding="utf-8"))["trust"]["score_quantiles"]
        numbers = [float(number) for number in found]
    except (OSError, ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return []
    return numbers if len(numbers) > 1 and all(map(isfinite, numbers)) and numbers == sorted(numbers) else []


def named_entry(word: str) -> ModelEntry:
    """The model that a word on the command line names: `base`, a run, one adapter of a run
    (`runs/demo/ppo/adapter_best`), or an adapter folder made elsewhere. A `UserError` if it is none of these or unsafe
    to load. Naming a run allows its whole output folder."""
    if word == BASE:
        return ModelEntry(BASE)
    folder = expanded(word)
    if not (folder / CONFIG).is_file():
        run = open_run(word, ANSWERING_STAGES)
        is_output = folder.resolve() == run.path.parent.resolve()
        return _run_entry(run, run.adapter, run.path.parent if is_output else run.path.resolve().parent)
    if not (folder.parent / "summary.json").is_file():
        return ModelEntry(word, safe_adapter(folder, folder), within=folder)
    run = open_run(str(folder.parent), ANSWERING_STAGES)
    return _run_entry(run, folder, run.path.resolve().parent)


def run_entries(runs: Path) -> list[ModelEntry]:
    """The finished runs under a folder whose adapters are safe to load, newest first; other folders are skipped."""
    found = []
    for summary in [*runs.glob("*/*/summary.json"), *runs.glob("*/best_of/round_*/dpo/summary.json")]:
        if summary.parent.name not in ANSWERING_STAGES:
            continue
        try:
            run = open_run(str(summary.parent), ANSWERING_STAGES)
            found.append((summary.stat().st_mtime, _run_entry(run, run.adapter, runs)))
        except (UserError, OSError):
            continue
    return [entry for _, entry in sorted(found, key=lambda pair: -pair[0])]


def _run_entry(run: RunFolder, adapter: Path, within: Path) -> ModelEntry:
    suffix = "" if adapter.name == run.adapter.name else f"/{adapter.name}"
    output = run.path.parent.resolve()
    above = output.parts[-3:] if output.parent.name == "best_of" else output.parts[-1:]  # a round of best_of
    name = f"{'/'.join(above)}/{run.stage}{suffix}"
    safe, reward_run = safe_adapter(adapter, within), run.path.parent / "reward"
    try:
        reward = safe_reward(reward_run / "adapter", within) if (reward_run / "summary.json").is_file() else None
    except UserError:
        reward = None
    return ModelEntry(name, safe, run.recipe, reward, within)


def available_models(
    words: list[str], runs: Path, recipe: Recipe | None = None
) -> tuple[list[ModelEntry], Model] | None:
    """The models to choose from, and their base; None if there is neither a run nor a recipe.

    The models that `words` name (see `named_entry`) come first. The base is that of the first named run, else of the
    recipe, else of the newest run. Runs under `runs` on another base are left out.

    Raises:
        UserError: a word names no usable model, the same model as another, or one on another base.
    """
    named, found = [named_entry(word) for word in words], run_entries(runs)
    if len({entry.adapter for entry in named}) < len(named):
        raise UserError(f"{' '.join(words)}: name models that differ; the page can put one of them on both sides")
    recipes = [*(entry.recipe for entry in named), recipe, *(entry.recipe for entry in found)]
    model = next((known.model for known in recipes if known), None)
    if model is None:
        if any(entry.adapter for entry in named):
            raise UserError("an adapter made elsewhere doesn't say how to load its base; give --recipe RECIPE too")
        return None
    for entry in named:
        if entry.recipe and not _same_base(entry, model):
            own = entry.recipe.model
            raise UserError(
                f"{entry.name}: is on the base '{own.base}' ({own.quantization}), "
                f"the first is on '{model.base}' ({model.quantization}); one page holds one base"
            )
        if entry.adapter:
            check_base(entry.name, entry.adapter, model.base, model.revision)
    same_base = [entry for entry in found if _same_base(entry, model)]
    return list(_distinct([*named, ModelEntry(BASE), *same_base])), model


def _same_base(entry: ModelEntry, model: Model) -> bool:
    """Whether a run loaded the same base in the same way; the length of its rows doesn't matter."""
    return entry.recipe is not None and entry.recipe.model.model_copy(update={"max_length": model.max_length}) == model


def _distinct(entries: list[ModelEntry]) -> Iterator[ModelEntry]:
    """Each adapter once, under a unique name."""
    folders, names = set(), set()
    for entry in entries:
        if entry.adapter in folders:
            continue
        folders.add(entry.adapter)
        name, number = entry.name, 2
        while name in names:
            name, number = f"{entry.name} ({number})", number + 1
        names.add(name)
        yield replace(entry, name=name)


def default_pair(entries: list[ModelEntry], words: list[str]) -> tuple[str, str]:
    """Names of the two models that the page starts with: the two named ones, else the base and the one that is named or
    newest."""
    names = [entry.name for entry in entries]
    if len(words) >= 2:
        return names[0], names[1]
    return BASE, next((name for name in names if name != BASE), BASE)
