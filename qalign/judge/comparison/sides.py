"""The two sides of a comparison: what a word on the command line names, what it was trained on, and its answers.

Imports no torch until a model answers.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qalign.config.paths import (
    DATA_SUFFIXES,
    adapters_in,
    expanded,
    function_of,
    is_own_run,
    last_round,
    looks_local,
    own_member,
    reward_adapter,
)
from qalign.config.recipe import Model, Recipe
from qalign.config.stages import ANSWERING_STAGES, PPO, REWARD_RUN, RL_STAGES, SFT_RUN
from qalign.data.formats import Prompt, prompts
from qalign.errors import UserError
from qalign.model import lineage
from qalign.train.dataset import rendered_at, rows_under
from qalign.train.run_folder import RunFolder, open_run

if TYPE_CHECKING:
    from qalign.model.base import Base
    from qalign.model.decoding.mixture import Mixture

BASE, ROUNDS = "base", "best_of"
Answers = dict[str, tuple[str, bool]]  # by prompt: the text, and whether it ended by itself
Trained = set[str | None]  # what rewards are known by: the hashes of their weights, or `FILE:function`


@dataclass(frozen=True)
class Side:
    """What answers: the bare base, an adapter on it, or a file of answers."""

    name: str
    adapter: Path | None = None
    run: RunFolder | None = None  # of the adapter; None for one that was made elsewhere
    file: str | None = None

    @property
    def is_model(self) -> bool:
        return self.file is None

    @property
    def weights(self) -> str | None:
        """Hash of the adapter's weights; None for the bare base."""
        return self.adapter and lineage.adapter_hash(self.adapter)


def side_of(word: str) -> Side:
    """`base`, a run or its output folder, an adapter folder, or a file of answers; a `UserError` if it is none."""
    if word == BASE:
        return Side(BASE)
    folder = expanded(word)
    whole = folder.parent if folder.name == "adapter" else folder
    if whole.name == ROUNDS and (last := last_round(whole)):
        return replace(side_of(str(last)), name=f"{whole.resolve().parent.name}/{ROUNDS}")
    if folder.is_file() or word.endswith(DATA_SUFFIXES):
        suffix = next((suffix for suffix in sorted(DATA_SUFFIXES, key=len)[::-1] if word.endswith(suffix)), "")
        return Side(folder.name.removesuffix(suffix), file=word)
    if (folder / "adapter_config.json").is_file():
        made_here = (folder.parent / "summary.json").is_file() and folder.parent.name in ANSWERING_STAGES
        if not made_here:
            return Side(word, folder)
        run = open_run(str(folder.parent), ANSWERING_STAGES)
        suffix = "" if folder.name == run.adapter.name else f"/{folder.name}"
        return Side(f"{run.path.parent.name}/{run.stage}{suffix}", folder, run)
    run = open_run(word, ANSWERING_STAGES)
    return Side(f"{run.path.parent.name}/{run.stage}", run.adapter, run)


def told_apart(sides: tuple[Side, Side], words: tuple[str, str]) -> tuple[Side, Side]:
    """Both sides under names that differ: where two runs or files have one name, under the words that name them."""
    if sides[0].name != sides[1].name:
        return sides
    return replace(sides[0], name=words[0]), replace(sides[1], name=words[1])


def same_base(one: Model, other: Model) -> bool:
    """Whether two runs load the same base in the same way; the length of their rows doesn't matter."""
    return one.model_copy(update={"max_length": other.max_length}) == other


def held_out(side: Side, limit: int) -> list[Prompt] | None:
    """The held-out prompts of a side's run, spread evenly; None if it has none."""
    if side.run is None or not side.run.settings.has_held_out:
        return None
    recipe = side.run.recipe
    rows, _ = rows_under("eval_data", side.run.settings, recipe.seed, prompts)
    return [*rows[:: max(1, len(rows) // limit)][:limit]]


def check_judge(word: str, judge: RunFolder, sides: tuple[Side, Side], asked: list[Prompt]) -> None:
    """Raises a `UserError` if one of the sides was trained on the scores of a reward run, or the run was trained on
    answers to the prompts that are asked now."""
    own: Trained = {lineage.adapter_hash(folder) for folder in adapters_in(judge.adapter)}
    for side in sides:
        if own & set(_rewards_of(side)):
            raise UserError(f"--judge: {side.name} was trained on the scores of {word}; name another reward run")
    if all(looks_local(source.path) for source in judge.settings.data):
        known, _ = rows_under("data", judge.settings, judge.recipe.seed, prompts)
        seen = {_question(row) for row in known}
        if both := sum(_question(row) in seen for row in asked):
            fix = "give prompts that it hasn't seen with --prompts, or name another judge"
            raise UserError(f"--judge: {word} was trained on answers to {both} of the {len(asked)} prompts; {fix}")


def check_function(word: str, sides: tuple[Side, Side]) -> None:
    """Raises a `UserError` if one of the sides was trained on the scores of this function."""
    for side in sides:
        if _function(word) in set(_rewards_of(side)):
            raise UserError(f"--judge: {side.name} was trained on the scores of {word}; name another function")


def _rewards_of(side: Side) -> Iterator[str | None]:
    """Those of its run, or of the run whose adapter a bare one was made from."""
    if side.run:
        yield from rewards_behind(side.run)
    elif side.adapter and (kept := lineage.read(side.adapter)):
        yield from _of_start(kept.parent, side.adapter.parent, 20)


def rewards_behind(run: RunFolder, depth: int = 20) -> Iterator[str | None]:
    """What the rewards are known by that an adapter was trained on: its run's, those of the runs that it started from,
    and those of the `best_of` run, or of its round, that chose its data."""
    if not depth:
        return
    if run.stage in RL_STAGES:
        yield from _of_section(run, getattr(run.recipe, run.stage))
    for source in run.settings.data:
        place = Path(source.path).parent
        output = {ROUNDS: place.parent, "sampling": place.parent.parent.parent}.get(place.name)
        if looks_local(source.path) and output and (place / "recipe.yaml").is_file():
            chosen = _recipe_in(place)
            if chosen and (settings := chosen.ppo):
                chosen = chosen.model_copy(update={"output": str(output)})
                yield from _of_section(RunFolder(chosen, "ppo", name=ROUNDS), settings)
                yield from _of_start(settings.start_from, output, depth)
    yield from _of_start(run.settings.start_from, run.path.parent, depth)


def _of_start(start: str | None, output: Path, depth: int) -> Iterator[str | None]:
    folder = output / SFT_RUN / "adapter" if start == SFT_RUN else Path(start) if start else None
    if folder and folder.parent.name in ANSWERING_STAGES and (folder.parent / "summary.json").is_file():
        yield from rewards_behind(open_run(str(folder.parent), ANSWERING_STAGES), depth - 1)


def _of_section(run: RunFolder, settings: PPO) -> Iterator[str | None]:
    for source in settings.reward:
        folder = reward_adapter(source.source)
        if is_own_run("reward", source.source):
            folder = RunFolder(run.recipe, REWARD_RUN).adapter / (own_member(source.source) or "")
        if folder:
            yield from filter(None, (lineage.adapter_hash(each) for each in adapters_in(folder)))
        elif function_of(source.source):
            yield _function(source.source)


def _function(source: str) -> str:
    where, name = function_of(source) or (source, "")
    return f"{Path(where).resolve() if where.endswith('.py') else where}:{name}"


def _recipe_in(folder: Path) -> Recipe | None:
    from qalign.config.yaml_file import parse

    try:
        return Recipe.model_validate(parse(folder / "recipe.yaml")[0])
    except (UserError, ValueError, OSError):
        return None


def _question(row: Prompt) -> str:
    return next((turn["content"].strip() for turn in row.turns[::-1] if turn["role"] == "user"), "")


def prompt_key(row: Prompt) -> str:
    return json.dumps([[turn["role"], turn["content"].strip()] for turn in row.turns])


class Bases:
    """The base in memory: one at a time."""

    def __init__(self) -> None:
        self._model: Model | None = None
        self._base: Base | None = None

    def get(self, model: Model, run: RunFolder | None = None) -> "Base":
        from qalign.model.base import load

        if self._base is None or self._model is None or not same_base(self._model, model):
            self._base = None  # freed before the next one is loaded
            self._base, self._model = load(model, now=rendered_at(run) if run else None), model
        return self._base


def role_of(base: "Base", key: str, side: Side) -> str:
    """The role of a side on its base; puts its adapter there at the first call."""
    from qalign.model.base import Role

    role = f"side_{key}"
    if side.adapter is None:
        return Role.BASE
    if role not in base.adapters:
        lineage.check(side.name, side.adapter, base.lineage("compare"))
        base.load_adapter(role, str(side.adapter), trainable=False)
    return role


def sample(
    base: "Base", sides: dict[str, Side], asked: list[Prompt], *, max_new_tokens: int, temperature: float, seed: int,
    mixture: "Mixture | None" = None,
) -> dict[str, Answers]:  # fmt: skip
    """The answers of models on one base by side and prompt: rows of one batch, each token with a draw of its own. A
    `mixture` is that of all of them."""
    from qalign.data.tokenize import encode_questions
    from qalign.model.generation import Sampling, TransformersEngine, stop_ids_of, text_of

    roles = {key: role_of(base, key, side) for key, side in sides.items()}
    new = min(max_new_tokens, base.max_length // 2)
    sampling = Sampling(new, temperature, stop_ids_of(base.template))
    encoded, _ = encode_questions(base.template, asked, base.max_length - new)
    rows = [(prompt, ids, key) for prompt, ids in encoded for key in sides]
    found: dict[str, Answers] = {key: {} for key in sides}
    if rows:
        of_rows, ids = [roles[key] for *_, key in rows], [ids for _, ids, _ in rows]
        sampled = TransformersEngine().generate(base, of_rows, ids, sampling, num_samples=1, seed=seed, mixture=mixture)
        for (prompt, _, key), (tokens,) in zip(rows, sampled, strict=True):
            found[key][prompt_key(prompt)] = text_of(base.tokenizer, tokens), tokens[-1] in sampling.stop_ids
    return found
