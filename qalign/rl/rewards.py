"""Scorers of sampled answers: reward adapters on the base, separate sequence classifiers, Python functions.

`open_scorers` checks all of them before the base is loaded; afterwards they are loaded and attached to it.
"""

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalign.config.paths import expanded, function_of, looks_local, reward_adapter
from qalign.config.recipe import Recipe
from qalign.config.stages import REWARD_RUN, RewardSource
from qalign.data.collate import MicroBatchLimit
from qalign.data.formats import Prompt
from qalign.data.readers import BadRow
from qalign.data.template_checks import check_prompt
from qalign.data.templates import ChatTemplate
from qalign.data.tokenize import TokenAnswers, pad_for_scores
from qalign.errors import UserError, short
from qalign.model import lineage
from qalign.model.adapters.files import SCORE_HEAD, read_files
from qalign.model.base import Base, Role
from qalign.model.generation import stop_ids_of, with_end_of_turn
from qalign.model.loading import load_config, load_scorer
from qalign.rl.rollout_batch import SampledAnswers
from qalign.rl.user_code import Failed, import_function, is_number, listed, user_code
from qalign.train.run_folder import RunFolder

CLASSIFIER_BATCH_SIZE = 8


class RewardFailed(UserError):
    """A scorer failed on sampled answers; the state of training is unchanged since the last iteration."""


class Scorer(ABC):
    """Gives every sampled answer a score.

    Args:
        key: `ppo.reward`, `grpo.judge` and so on, for error messages.
        name: short name for metrics.
    """

    identity: str | None = None  # hash of an adapter's weights, which a resumed run must find unchanged
    bytes: int = 0  # memory of a model of its own
    lowest, highest = math.inf, -math.inf  # of all its scores so far; equal if it tells no answers apart

    def __init__(self, key: str, source: str, weight: float, name: str):
        self.key, self.source, self.weight, self.name = key, source, weight, name

    def load(self, base: Base) -> None:  # noqa: B027
        """Loads a model of its own next to the base, if it has one."""

    def attach(self, base: Base, role: str, limit: MicroBatchLimit) -> None:  # noqa: B027
        """Puts its adapter, if it has one, on the base as `role`; `limit` bounds one forward pass, no score changes."""

    @abstractmethod
    def scores(self, rows: Sequence[SampledAnswers]) -> Tensor:
        """Scores float32 `(prompts, num_samples)` on the CPU; a `UserError` names the row that failed."""


class AdapterScorer(Scorer):
    """A reward adapter with its scalar head, on the base that is in memory.

    The score is read at the end-of-turn token, where the reward model was trained. An answer that was cut, or that
    ended with EOS, gets an end of turn here: at other tokens the head's output means nothing (in the demo it was 4
    points, 7 standard deviations, higher).
    """

    def __init__(self, key: str, folder: Path, weight: float, recipe: Recipe):
        super().__init__(key, str(folder), weight, _short_name(folder))
        self.folder = folder
        lineage.check_base(key, folder, recipe.model.base, recipe.model.revision)
        try:
            files = read_files(folder)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        head = files.shapes.get(SCORE_HEAD)
        if head is None:
            raise UserError(f"{key}: {folder} gives no scores; expected a reward adapter (SEQ_CLS)")
        if head[1] != (hidden := load_config(recipe.model).get_text_config().hidden_size):
            found = f"was trained on a base of hidden size {head[1]}, '{recipe.model.base}' has {hidden}"
            raise UserError(f"{key}: {folder} {found}")
        self.identity = lineage.adapter_hash(folder)

    def attach(self, base: Base, role: str, limit: MicroBatchLimit) -> None:
        self.base, self.role, self.limit = base, role, limit
        lineage.check(self.key, self.folder, base.lineage("reward"))
        base.load_adapter(role, str(self.folder), trainable=False)
        self.stop_ids = stop_ids_of(base.template)

    @torch.no_grad()
    def scores(self, rows: Sequence[SampledAnswers]) -> Tensor:
        complete = [
            TokenAnswers(row.tokens.prompt_ids, tuple(with_end_of_turn(a, self.stop_ids) for a in row.tokens.answers))
            for row in rows
        ]
        return self.base.answer_scores(self.role, complete, self.limit)


class ModelScorer(Scorer):
    """A separate sequence-classification model in 4 bits, with its own tokenizer and chat template."""

    def load(self, base: Base) -> None:
        self.model, self.tokenizer = load_scorer(self.source, self.key, base.dtype, base.lm.device)
        if (labels := self.model.config.num_labels) != 1:
            raise UserError(f"{self.key}: '{self.source}' has {labels} labels; expected a reward model, which has one")
        if not self.tokenizer.chat_template:
            raise UserError(f"{self.key}: '{self.source}' has no chat template, which scoring needs; add one to it")
        settings, words = base.template, f"that of '{self.source}'"
        self.template = ChatTemplate(self.tokenizer, {}, settings.system_turn, settings.now, words)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = pad_for_scores(self.template)
        if (text_config := self.model.config.get_text_config()).pad_token_id is None:
            text_config.pad_token_id = self.tokenizer.pad_token_id
        self.bytes = self.model.get_memory_footprint()

    @torch.no_grad()
    def scores(self, rows: Sequence[SampledAnswers]) -> Tensor:
        texts = [self._dialogue(row.prompt, text) for row in rows for text in row.texts]
        found = torch.zeros(len(texts))
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))  # similar lengths: less padding
        for start in range(0, len(order), CLASSIFIER_BATCH_SIZE):
            numbers = order[start : start + CLASSIFIER_BATCH_SIZE]
            batch = self.tokenizer(
                [texts[n] for n in numbers], add_special_tokens=False, padding=True, return_tensors="pt"
            ).to(self.model.device)
            found[numbers] = self.model(**batch).logits[:, 0].float().cpu()
        return found.view(len(rows), -1)

    def _dialogue(self, prompt: Prompt, answer: str) -> str:
        turns, template = [*prompt.turns, {"role": "assistant", "content": answer}], self.template
        try:
            text = template.with_tools(prompt.tools).render(turns, add_generation_prompt=False)
            check_prompt(template, prompt.turns, text)  # but for the tools, which few such models have learned to read
        except BadRow as error:  # for example: no system turn allowed
            raise UserError(f"{self.key}: {prompt.where}: {error}") from None
        return text


class FunctionScorer(Scorer):
    """A Python function `function(prompts, completions, **row) -> list[float]` with one score per answer.

    Its parameters choose what it is given: `prompts` (lists of `{"role", "content"}`), `completions` (texts),
    `completion_ids`, `ended` (False for an answer that was cut), and columns of the rows by name. Every argument is a
    list with one entry per answer.
    """

    def __init__(self, key: str, source: str, weight: float):
        module, _, name = source.rpartition(":")
        super().__init__(key, source, weight, name)
        self.function = import_function(key, module, name)
        if any(map(inspect.iscoroutinefunction, (self.function, getattr(self.function, "__call__", None)))):  # noqa: B004
            raise UserError(f"{key}: '{source}' is async; write a function that returns the scores, with asyncio.run")
        try:
            self._parameters = inspect.signature(self.function).parameters
        except ValueError:  # of some functions written in C
            fix = "write a function that calls it"
            raise UserError(f"{key}: '{source}' doesn't say which parameters it takes; {fix}") from None

    def takes(self, name: str) -> bool:
        """Whether the function is given a column of the rows."""
        parameters = self._parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        return str(name).isidentifier() and (takes_all or name in parameters)

    def scores(self, rows: Sequence[SampledAnswers]) -> Tensor:
        given = self._call(rows)
        owners = [row for row in rows for _ in row.texts]
        if len(given) != len(owners):
            many = len(given) if len(given) < len(owners) else f"more than {len(owners)}"
            where = owners[0].prompt.where
            raise self._error(f"gave {many} scores for {len(owners)} answers, the first to {where}")
        for score, row in zip(given, owners, strict=True):
            if not is_number(score):
                raise self._error(f"gave {short(score)} for an answer to {row.prompt.where}; expected a finite number")
        return torch.tensor([float(score) for score in given], dtype=torch.float32).view(len(rows), -1)

    def _error(self, problem: str) -> UserError:
        return UserError(f"{self.key}: {self.source} {problem}")

    def _call(self, rows: Sequence[SampledAnswers]) -> list[Any]:
        found = None
        try:
            with user_code():
                found = self.function(**self._arguments(rows))
                if inspect.iscoroutine(found):
                    found.close()  # or Python warns that it was never awaited
                given = listed(found, sum(len(row.texts) for row in rows))  # a generator runs only here
        except Failed as failed:
            for row in rows if len(rows) > 1 else ():
                self._call([row])  # finds the row that fails
            name, _, reason = str(failed).partition(": ")
            hint = "; completions are texts here" if reason.startswith("string indices must be") else ""
            raise self._error(f"raised {name} on an answer to {rows[0].prompt.where}: {reason}{hint}") from None
        if given is None:
            raise self._error(f"gave {short(found)}; expected a list with one number per answer")
        return given

    def _arguments(self, rows: Sequence[SampledAnswers]) -> dict[str, list[Any]]:
        """What the function asks for: copies, so that it can change no row."""
        repeated = [row for row in rows for _ in row.texts]
        names = dict.fromkeys(name for row in rows for name in row.prompt.columns)
        known: dict[str, list[Any]] = {name: [row.prompt.columns.get(name) for row in repeated] for name in names}
        known |= {
            "prompts": [list(row.prompt.turns) for row in repeated],
            "completions": [text for row in rows for text in row.texts],
            "completion_ids": [list(ids) for row in rows for ids in row.tokens.answers],
            "ended": [ended for row in rows for ended in row.ended],
        }
        return {name: [copy.deepcopy(v) for v in values] for name, values in known.items() if self.takes(name)}


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
                scorer.name = f"{number}: {sources[number - 1].source}"
    return Scorers(**found)


def _open(key: str, named: RewardSource, recipe: Recipe, run: RunFolder) -> Scorer:
    source, weight = named.source, named.weight
    if function_of(source):
        return FunctionScorer(key, source, weight)
    if folder := run.own_adapter(key, REWARD_RUN) if source == REWARD_RUN else reward_adapter(source):
        return AdapterScorer(key, folder, weight, recipe)
    place = str(expanded(source)) if looks_local(source) else source
    return ModelScorer(key, place, weight, _short_name(Path(place)))


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
        total += scorer.weight * found
    return total, means


def check_unchanged(scorers: list[Scorer], identities: list[str | None]) -> None:
    """Raises a `UserError` if an adapter among the scorers isn't the one that a run began with."""
    for scorer, was in zip(scorers, identities, strict=True):
        if was != scorer.identity:
            changed = f"was {was} when this run began and is {scorer.identity} now"
            raise UserError(f"{scorer.key}: the adapter of {scorer.name} {changed}; --overwrite starts again")


def value_start(scorers: list[Scorer]) -> AdapterScorer | None:
    """The reward adapter that the value model starts as a copy of; None without one."""
    return next((scorer for scorer in scorers if isinstance(scorer, AdapterScorer)), None)


def _short_name(folder: Path) -> str:
    """The folder's name; for `runs/demo/reward/adapter` the run's name, `demo`."""
    parts = [part for part in folder.parts if part not in ("adapter", REWARD_RUN)]
    return parts[-1] if parts else folder.name
