"""Who may play a side of the page: the bare base, and adapters of finished runs.

Only folders that the user named or that lie under `runs/` count, with symlinks followed first; only weights in
safetensors. The page chooses from this list by name, never by path. Imports no torch.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from qalign.config.recipe import Model, Recipe
from qalign.errors import UserError
from qalign.model.lineage import WEIGHTS, adapter_hash, check_base
from qalign.train.run_folder import open_run

BASE = "base"
ANSWERING = ("ppo", "dpo", "sft")  # stages whose adapters give answers, the furthest aligned first
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class ModelEntry:
    """A model that can answer.

    Attributes:
        name: what the page calls it, such as `base` or `demo/dpo`.
        adapter: its folder, with symlinks followed; None for the bare base.
        recipe: what it was trained with; None for the base, and for an adapter made elsewhere.
        reward: the adapter folder of the finished reward run beside it, if there is one.
        within: the folder that nothing of these may lead out of, as it was named.
    """

    name: str
    adapter: Path | None = None
    recipe: Recipe | None = None
    reward: Path | None = None
    within: Path | None = None

    @property
    def weights(self) -> str | None:
        """The hash of its weights; None for the base."""
        return self.adapter and adapter_hash(self.adapter)


def held_within(adapter: Path, allowed: Path) -> Path:
    """An adapter folder as it really lies, once it is safe to load from.

    Args:
        allowed: the folder that the user named.

    Raises:
        UserError: it, or a file of it, leads out of `allowed`, or it has no safetensors.
    """
    real, within = adapter.resolve(), allowed.resolve()
    for file in (real, real / CONFIG, real / WEIGHTS):
        if file != real and not file.is_file():
            hint = "; weights in other formats can run code and are not loaded" if file.name == WEIGHTS else ""
            raise UserError(f"{adapter}: has no {file.name}{hint}")
        if not file.resolve().is_relative_to(within):
            raise UserError(f"{adapter}: {file.name} leads out of {allowed} through a symlink")
    return real


def named(word: str) -> ModelEntry:
    """What a word on the command line means: `base`, a run, an adapter in it (`runs/demo/ppo/adapter_best`), or an
    adapter folder made elsewhere. Of a run, all of its output (`runs/demo`) counts as named.

    Raises:
        UserError: it is none of these, or not safe to load.
    """
    if word == BASE:
        return ModelEntry(BASE)
    folder = Path(word).expanduser()
    if not (folder / CONFIG).is_file():
        run = open_run(word, ANSWERING)
        is_output = folder.resolve() == run.path.parent.resolve()
        return _of_run(run, run.adapter, run.path.parent if is_output else run.path.resolve().parent)
    if not (folder.parent / "summary.json").is_file():
        return ModelEntry(word, held_within(folder, folder), within=folder)
    run = open_run(str(folder.parent), ANSWERING)
    return _of_run(run, folder, run.path.resolve().parent)


def found_under(runs: Path) -> list[ModelEntry]:
    """The adapters of every finished run under a folder that may be loaded, newest first; others are passed over."""
    found = []
    for summary in runs.glob("*/*/summary.json") if runs.is_dir() else ():
        if summary.parent.name not in ANSWERING:
            continue
        try:
            run = open_run(str(summary.parent), ANSWERING)
            found.append((summary.stat().st_mtime, _of_run(run, run.adapter, runs)))
        except (UserError, OSError):
            continue
    return [contender for _, contender in sorted(found, key=lambda pair: -pair[0])]


def _of_run(run, adapter: Path, within: Path) -> ModelEntry:
    which = "" if adapter.name == run.adapter.name else f"/{adapter.name}"
    name = f"{run.path.parent.resolve().name}/{run.stage}{which}"
    return ModelEntry(name, held_within(adapter, within), run.recipe, _reward(run, within), within)


def _reward(run, within: Path) -> Path | None:
    """The reward adapter of the same output, if its run is finished and safe to load."""
    beside = run.path.parent / "reward"
    if not (beside / "summary.json").is_file():
        return None
    try:
        return held_within(beside / "adapter", within)
    except UserError:
        return None


def lineup(words: list[str], runs: Path, recipe: Recipe | None = None) -> tuple[list[ModelEntry], Model] | None:
    """Who may play, those named first, on which base; None if there is no run yet and no recipe.

    The base is that of the first run named, else of the recipe, else of the newest run. Runs under `runs` on another
    base are left out.

    Args:
        words: the command line's, as in `named`.

    Raises:
        UserError: a word can't be used, names what another names, or is on another base than the rest.
    """
    wanted, others = [named(word) for word in words], found_under(runs)
    if len({contender.adapter for contender in wanted}) < len(wanted):
        raise UserError(f"{' '.join(words)}: name models that differ; the page can put one of them on both sides")
    recipes = [c.recipe for c in wanted if c.recipe] + [r for r in (recipe,) if r] + [c.recipe for c in others]
    if not recipes:
        if any(c.adapter for c in wanted):
            raise UserError("an adapter made elsewhere doesn't say how to hold its base; give --recipe RECIPE too")
        return None
    model = recipes[0].model
    for contender in wanted:
        own = contender.recipe and contender.recipe.model
        if own and not _same_base(own, model):
            raise UserError(
                f"{contender.name}: is on the base '{own.base}' ({own.quantization}), "
                f"the first is on '{model.base}' ({model.quantization}); one page holds one base"
            )
        if contender.adapter:
            check_base(contender.name, contender.adapter, model.base, model.revision)
    fitting = [c for c in others if _same_base(c.recipe.model, model)]
    return list(_distinct([*wanted, ModelEntry(BASE), *fitting])), model


def _same_base(one: Model, other: Model) -> bool:
    """Whether two recipes hold the same base in the same way, however long their rows are."""
    return one.model_copy(update={"max_length": 0}) == other.model_copy(update={"max_length": 0})


def _distinct(contenders: list[ModelEntry]):
    """Each adapter once, under a name of its own."""
    folders, names = set(), set()
    for contender in contenders:
        if contender.adapter in folders:
            continue
        folders.add(contender.adapter)
        name, number = contender.name, 2
        while name in names:
            name, number = f"{contender.name} ({number})", number + 1
        names.add(name)
        yield replace(contender, name=name)


def opponents(contenders: list[ModelEntry], words: list[str]) -> tuple[str, str]:
    """The two names that the page begins with: the two named, or the base beside the one named or newest."""
    names = [contender.name for contender in contenders]
    if len(words) >= 2:
        return names[0], names[min(1, len(names) - 1)]
    others = [name for name in names if name != BASE]
    return BASE, others[0] if others else BASE
