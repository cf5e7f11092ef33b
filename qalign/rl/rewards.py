"""The rewards and judges of a recipe. `open_scorers` checks all of them before the base is loaded; afterwards they are
loaded and attached to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from qalign.config.paths import (
    adapters_in,
    expanded,
    function_of,
    is_own_run,
    looks_local,
    own_member,
    reward_adapter,
)
from qalign.config.recipe import Recipe
from qalign.config.stages import PPO, REWARD_RUN, RewardSource
from qalign.data.collate import MicroBatchLimit
from qalign.errors import UserError
from qalign.model.base import Base, Role
from qalign.rl.rollout_batch import SampledAnswers
from qalign.rl.scorers import AdapterScorer, FunctionScorer, ModelScorer, Scorer, short_name
from qalign.train.run_folder import RunFolder


class RewardFailed(UserError):
    """A scorer failed on sampled answers; the state of training is unchanged since the last iteration."""


@dataclass(frozen=True)
class Scorers:
    """The scorers of a recipe."""

    reward: list[Scorer]
    """PPO trains on the weighted sum of their scores."""
    judge: list[Scorer]
    """PPO never trains on their scores; they show whether the reward is hacked."""

    @property
    def all(self) -> list[Scorer]:
        return [*self.reward, *self.judge]

    @property
    def identities(self) -> dict[str, str | None]:
        """What must be the same in all processes, by key and name."""
        return {f"{scorer.key} ({scorer.name})": scorer.identity for scorer in self.all}

    def takes(self, name: str) -> bool:
        """Whether a Python function among the scorers is given a column of the rows."""
        return any(isinstance(scorer, FunctionScorer) and scorer.takes(name) for scorer in self.all)

    def load_models(self, base: Base) -> int:
        """Loads the scorers that are models of their own. Returns their memory in bytes."""
        for scorer in self.all:
            scorer.load(base)
        return sum(scorer.bytes for scorer in self.all)

    def attach(self, base: Base, limit: MicroBatchLimit) -> None:
        """Puts the adapters on the base, in the roles `reward`, `reward_2` and so on, `judge`, `judge_2` and so on."""
        for role, scorers in ((Role.REWARD, self.reward), (Role.JUDGE, self.judge)):
            for number, scorer in enumerate(scorers, start=1):
                scorer.attach(base, role if number == 1 else f"{role}_{number}", limit)


def open_scorers(recipe: Recipe, run: RunFolder) -> Scorers:
    """The scorers under `reward` and `judge` of a run, checked as far as possible without loading a model. A
    `UserError` if one can't be found or imported, doesn't fit the base, or has no finished reward run."""
    found: dict[str, list[Scorer]] = {}
    for key in ("reward", "judge"):
        sources: Sequence[RewardSource] = getattr(run.settings, key) or ()
        scorers = found[key] = [_open(f"{run.stage}.{key}", source, recipe, run) for source in sources]
        names = [scorer.name for scorer in scorers]
        for number, scorer in enumerate(scorers, start=1):
            if names.count(scorer.name) > 1:
                scorer.name = f"{number}: {scorer.name}"
    scorers = Scorers(**found)
    settings = cast(PPO, run.settings)
    _set_apart(scorers, settings)
    _set_combination(scorers.reward, settings)
    return scorers


def _set_apart(scorers: Scorers, settings: PPO) -> None:
    """Takes the members of an ensemble that are judges out of the reward. A `UserError` if none is left in it."""
    judges = [judge for judge in scorers.judge if isinstance(judge, AdapterScorer)]
    taken = {folder.resolve() for judge in judges for folder in judge.folders}
    for scorer in scorers.reward:
        if isinstance(scorer, AdapterScorer):
            scorer.folders = [folder for folder in scorer.folders if folder.resolve() not in taken]
            if not scorer.folders:
                key = f"{settings.stage}.judge"
                raise UserError(f"{key}: scores with what the policy trains on, {scorer.name}; name another")


def _set_combination(rewards: list[Scorer], settings: PPO) -> None:
    """Tells ensembles how their members' scores become one. A `UserError` if there is none to tell."""
    ensembles = [each for each in rewards if isinstance(each, AdapterScorer) and len(each.folders) > 1]
    for scorer in ensembles:
        scorer.combine = settings.reward_combine
        scorer.uncertainty = 1.0 if settings.uncertainty is None else settings.uncertainty
    if settings.reward_combine != "mean" and not ensembles:
        fix = "train a reward run with members: 4, or remove this"
        key = f"{settings.stage}.reward_combine"
        raise UserError(f"{key}: '{settings.reward_combine}' needs a reward with several members; {fix}")


def _open(key: str, named: RewardSource, recipe: Recipe, run: RunFolder) -> Scorer:
    source, weight = named.source, named.weight
    if function_of(source):
        return FunctionScorer(key, source, weight)
    folder = reward_adapter(source)
    if is_own_run("reward", source):
        folder = run.own_adapter(key, REWARD_RUN) / (own_member(source) or "")
        if not adapters_in(folder):
            raise UserError(f"{key}: there is no {folder}; {_members_in_words(folder.parent)}")
    if folder:
        return AdapterScorer(key, folder, weight, recipe)
    place = str(expanded(source)) if looks_local(source) else source
    return ModelScorer(key, place, weight, short_name(Path(place)))


def combined(scorers: list[Scorer], rows: Sequence[SampledAnswers]) -> tuple[Tensor, dict[str, float]]:
    """(The weighted sum of all scores, float32 `(prompts, num_samples)`; the mean score of each scorer by its name.)
    Raises `RewardFailed`, which names the row, if a score is not finite or a function fails."""
    total, means = torch.zeros(len(rows), len(rows[0].texts)), {}
    for scorer in scorers:
        try:
            found = scorer.scores(rows)
        except UserError as error:
            raise RewardFailed(*error.lines) from None
        if not found.isfinite().all():
            row = rows[int((~found.isfinite()).nonzero()[0, 0])]
            raise RewardFailed(f"{scorer.key}: {scorer.name} gave a score that is not finite to {row.prompt.where}")
        scorer.lowest, scorer.highest = min(scorer.lowest, found.min().item()), max(scorer.highest, found.max().item())
        means[scorer.name] = found.mean().item()
        if (apart := spread_of([scorer])) is not None:
            means[f"{scorer.name}/spread"] = apart
        total += scorer.weight * found
    return total, means


def check_unchanged(scorers: list[Scorer], identities: list[str | None]) -> None:
    """Raises a `UserError` if an adapter among the scorers isn't the one that a run began with."""
    for scorer, was in zip(scorers, identities, strict=True):
        if was != scorer.identity:
            changed = f"was {was} when this run began and is {scorer.identity} now"
            raise UserError(f"{scorer.key}: the adapter of {scorer.name} {changed}; --overwrite starts again")


def scorers_state(scorers: list[Scorer]) -> list[list[float] | None]:
    """What a checkpoint keeps of ensembles: where their members' scores are 0."""
    found = (scorer.zeros if isinstance(scorer, AdapterScorer) else None for scorer in scorers)
    return [None if zeros is None else zeros.tolist() for zeros in found]


def restore_scorers(scorers: list[Scorer], state: list[list[float] | None]) -> None:
    """Restores what `scorers_state` returned."""
    for scorer, zeros in zip(scorers, state, strict=True):
        if isinstance(scorer, AdapterScorer):
            scorer.zeros = None if zeros is None else torch.tensor(zeros)


def spread_of(scorers: list[Scorer]) -> float | None:
    """How far the members of ensembles were apart on the answers that were scored last, in units of the reward: the
    mean standard deviation, times the weights. None without an ensemble."""
    ensembles = [scorer for scorer in scorers if isinstance(scorer, AdapterScorer) and scorer.spread is not None]
    return sum(abs(scorer.weight) * (scorer.spread or 0.0) for scorer in ensembles) if ensembles else None


def value_start(scorers: list[Scorer]) -> AdapterScorer | None:
    """The reward adapter that the value model starts as a copy of, of several members the first; None without one."""
    return next((scorer for scorer in scorers if isinstance(scorer, AdapterScorer)), None)


def _members_in_words(folder: Path) -> str:
    names = [place.name for place in adapters_in(folder)]
    return f"its members are {', '.join(names)}" if names[1:] else "the reward run was trained without members"
