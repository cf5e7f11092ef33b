"""Scorers of sampled answers: reward adapters on the base, separate sequence classifiers, Python functions."""

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalign.config.paths import (
    MEMBER,
    adapters_in,
)
from qalign.config.recipe import Recipe
from qalign.config.stages import REWARD_RUN
from qalign.data.collate import MicroBatchLimit
from qalign.data.formats import Prompt
from qalign.data.readers import BadRow
from qalign.data.rows import check_prompt
from qalign.data.store.sequences import TokenAnswers
from qalign.data.templates import ChatTemplate
from qalign.data.tokenize import pad_for_scores
from qalign.errors import UserError, short
from qalign.losses.ensemble import Combine, aligned, combined_scores, spread
from qalign.model import lineage
from qalign.model.adapters.files import SCORE_HEAD, read_files
from qalign.model.adapters.members import answer_scores, load_rewards
from qalign.model.base import Base
from qalign.model.generation import stop_ids_of, with_end_of_turn
from qalign.model.loading import load_config, load_scorer
from qalign.rl.rollout_batch import SampledAnswers
from qalign.rl.user_code import Failed, import_function, is_number, listed, user_code
from qalign.train.processes.world import World, current

CLASSIFIER_BATCH_SIZE = 8


def together(work: Callable[[World], Tensor]) -> Tensor:
    """Scores of which each process computes some with `work`, which leaves the others 0."""
    world = current()
    first, *others = world.gathered(world.agreed(lambda: work(world)))
    return sum(others, first)


class Scorer(ABC):
    """Gives every sampled answer a score.

    Args:
        key: `ppo.reward`, `grpo.judge` and so on, for error messages.
        name: short name for metrics.
    """

    bytes: int = 0  # memory of a model of its own
    lowest, highest = math.inf, -math.inf  # of all its scores so far; equal if it tells no answers apart

    def __init__(self, key: str, source: str, weight: float, name: str):
        self.key, self.source, self.weight, self.name = key, source, weight, name

    @property
    def identity(self) -> str | None:
        """Hash of an adapter's weights, which a resumed run must find unchanged; None without one."""
        return None

    def load(self, base: Base) -> None:  # noqa: B027
        """Loads a model of its own next to the base, if it has one."""

    def attach(self, base: Base, role: str, limit: MicroBatchLimit) -> None:  # noqa: B027
        """Puts its adapter, if it has one, on the base as `role`; `limit` bounds one forward pass, no score changes."""

    @abstractmethod
    def scores(self, rows: Sequence[SampledAnswers]) -> Tensor:
        """Scores float32 `(prompts, num_samples)` on the CPU, the same in all processes, which call it together; a
        `UserError` names the row that failed."""


class AdapterScorer(Scorer):
    """A reward adapter with its scalar head, on the base that is in memory; or the members of an ensemble, whose scores
    become one as `combine` and `uncertainty` say (`qalign.losses.ensemble`).

    The score is read at the end-of-turn token, where the reward model was trained. An answer that was cut, or that
    ended with EOS, gets an end of turn here: at other tokens the head's output means nothing (in the demo it was 4
    points, 7 standard deviations, higher).
    """

    combine: Combine = "mean"
    uncertainty = 1.0
    zeros: Tensor | None = None  # the members' mean scores of the first answers that they scored
    spread: float | None = None  # of the members on the answers that were scored last, the mean

    def __init__(self, key: str, folder: Path, weight: float, recipe: Recipe):
        super().__init__(key, str(folder), weight, short_name(folder))
        self.folders = adapters_in(folder)
        for each in self.folders:
            _check_adapter(key, each, recipe)

    @property
    def identity(self) -> str | None:
        hashes = [lineage.adapter_hash(folder) for folder in self.folders]
        return hashes[0] if len(hashes) == 1 else lineage.digest(" ".join(map(str, hashes)))

    def attach(self, base: Base, role: str, limit: MicroBatchLimit) -> None:
        self.base, self.limit = base, limit
        self.model = load_rewards(base, self.key, role, self.folders)
        self.stop_ids = stop_ids_of(base.template)

    @torch.no_grad()
    def scores(self, rows: Sequence[SampledAnswers]) -> Tensor:
        complete = [
            TokenAnswers(row.tokens.prompt_ids, tuple(with_end_of_turn(a, self.stop_ids) for a in row.tokens.answers))
            for row in rows
        ]
        limit = self.limit.among(current().size, [self.base.tokens_taken(row) for row in complete])
        found = together(lambda world: answer_scores(self.base, self.model, complete, limit, mine=world.mine))
        if isinstance(self.model, str):
            return found
        if self.zeros is None:
            self.zeros = found.mean(dim=(0, 1))
        scores = aligned(found, self.zeros)
        self.spread = spread(scores).mean().item()
        return combined_scores(scores, self.combine, self.uncertainty)


def _check_adapter(key: str, folder: Path, recipe: Recipe) -> None:
    """Raises a `UserError` if the files of a reward adapter don't fit the base of a recipe."""
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
        return together(lambda world: self._scores(rows, world)).view(len(rows), -1)

    def _scores(self, rows: Sequence[SampledAnswers], world: World) -> Tensor:
        texts = [self._dialogue(row.prompt, text) for row in rows for text in row.texts]
        found = torch.zeros(len(texts))
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))  # similar lengths: less padding
        batches = [order[n : n + CLASSIFIER_BATCH_SIZE] for n in range(0, len(order), CLASSIFIER_BATCH_SIZE)]
        for _, numbers in world.mine(batches, [sum(len(texts[n]) for n in numbers) for numbers in batches]):
            batch = self.tokenizer(
                [texts[n] for n in numbers], add_special_tokens=False, padding=True, return_tensors="pt"
            ).to(self.model.device)
            found[numbers] = self.model(**batch).logits[:, 0].float().cpu()
        return found

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
    list with one entry per answer. Of several processes the first one calls it, with the answers of all.
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
        return current().first(lambda: self._scores(rows))

    def _scores(self, rows: Sequence[SampledAnswers]) -> Tensor:
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


def short_name(folder: Path) -> str:
    """The folder's name; for `runs/demo/reward/adapter` the run's name, `demo`, with the member's: `demo/member_4`."""
    if MEMBER.fullmatch(folder.name):
        return f"{short_name(folder.parent)}/{folder.name}"
    parts = [part for part in folder.parts if part not in ("adapter", REWARD_RUN)]
    return parts[-1] if parts else folder.name
