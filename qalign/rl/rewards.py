"""What scores sampled answers: reward adapters on the base, a separate sequence classifier, Python functions.

Every scorer is checked before the base is loaded (`open_scorers`) and put on it afterwards (`attach`).
"""

import importlib
import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from qalign.config.paths import function_of, looks_local, reward_adapter
from qalign.config.recipe import REWARD_RUN, Recipe, RewardSource
from qalign.data.collate import MicroBatchLimit
from qalign.data.prompts import Prompt
from qalign.data.tokenize import TokenAnswers, pad_for_scores
from qalign.errors import UserError
from qalign.model import lineage
from qalign.model.base import HEAD, Base, Role
from qalign.model.generation import Sampling, end_ids, text_of, with_end_of_turn
from qalign.model.loading import guard_4bit, load_config
from qalign.train.run_folder import RunFolder

ROWS_AT_ONCE = 8  # of a separate classifier


class RewardFailed(UserError):
    """A reward could not be had; the state of the run is what it was before."""


@dataclass(frozen=True)
class SampledAnswers:
    """A prompt with the answers that were sampled to it.

    Attributes:
        prompt: the row.
        tokens: its ids and theirs, each up to and including the token that ended it.
        texts: the answers without special tokens.
        ended: whether each ended by itself, rather than being cut.
    """

    prompt: Prompt
    tokens: TokenAnswers
    texts: tuple[str, ...]
    ended: tuple[bool, ...]


def sampled_answers(
    tokenizer, prompt: Prompt, ids: list[int], answers: list[list[int]], sampling: Sampling
) -> SampledAnswers:
    """What an engine sampled to a prompt."""
    texts = tuple(text_of(tokenizer, answer) for answer in answers)
    return SampledAnswers(
        prompt, TokenAnswers(ids, tuple(answers)), texts, tuple(a[-1] in sampling.ends for a in answers)
    )


class AdapterScorer:
    """A reward adapter with its head, on the base that is in memory.

    It reads the score at the end of the answer's turn, as it was trained to. A cut answer has none, some end with EOS
    instead, and what the head says elsewhere means nothing (on the demo it was 4 points, 7 standard deviations, more):
    so they are given one.
    """

    def __init__(self, key: str, folder: Path, weight: float, recipe: Recipe):
        self.key, self.folder, self.weight, self.name = key, folder, weight, _short(folder)
        lineage.check_base(key, folder, recipe.model.base, recipe.model.revision)
        _check_fits(key, folder, recipe)
        self.identity = lineage.adapter_hash(folder)

    def attach(self, base: Base, role: str, micro: MicroBatchLimit) -> None:
        self.base, self.role, self.micro = base, role, micro
        lineage.check(self.key, self.folder, base.lineage("reward"))
        base.load_adapter(role, str(self.folder), trainable=False)
        self.ends = end_ids(base.tokenizer, base.spec.chat_template_kwargs)

    @torch.no_grad()
    def scores(self, rows: Sequence[SampledAnswers]) -> Tensor:
        whole = [
            TokenAnswers(row.tokens.prompt_ids, tuple(with_end_of_turn(a, self.ends) for a in row.tokens.answers))
            for row in rows
        ]
        return self.base.answer_scores(self.role, whole, self.micro)


class ModelScorer:
    """A sequence-classification model of its own, in 4 bits, with its own tokenizer and chat template."""

    def __init__(self, key: str, source: str, weight: float):
        self.key, self.source, self.weight, self.name = key, source, weight, _short(Path(source))
        self.identity = None

    def load(self, base: Base) -> None:
        """Loads it beside the base."""
        settings = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": base.dtype,
        }
        config = BitsAndBytesConfig(load_in_4bit=True, **settings)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.source)
            self.model = AutoModelForSequenceClassification.from_pretrained(
                self.source, quantization_config=config, dtype=base.dtype, device_map={"": base.lm.device}
            ).eval()
        except (OSError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{self.key}: the model '{self.source}' can't be loaded: {reason}") from None
        guard_4bit(self.model)
        if self.model.config.num_labels != 1:
            raise UserError(f"{self.key}: '{self.source}' has {self.model.config.num_labels} labels; a reward has one")
        if not self.tokenizer.chat_template:
            raise UserError(f"{self.key}: '{self.source}' has no chat template to write dialogues in")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = pad_for_scores(self.tokenizer, {})
        if self.model.config.get_text_config().pad_token_id is None:
            self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.bytes = self.model.get_memory_footprint()

    def attach(self, base: Base, role: str, micro: MicroBatchLimit) -> None:
        """Needs nothing more of the base."""

    @torch.no_grad()
    def scores(self, rows: Sequence[SampledAnswers]) -> Tensor:
        texts = [self._written(row.prompt, text) for row in rows for text in row.texts]
        found = torch.zeros(len(texts))
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        for start in range(0, len(order), ROWS_AT_ONCE):
            numbers = order[start : start + ROWS_AT_ONCE]
            some = self.tokenizer(
                [texts[n] for n in numbers], add_special_tokens=False, padding=True, return_tensors="pt"
            ).to(self.model.device)
            found[numbers] = self.model(**some).logits[:, 0].float().cpu()
        return found.view(len(rows), -1)

    def _written(self, prompt: Prompt, answer: str) -> str:
        turns = [*prompt.turns, {"role": "assistant", "content": answer}]
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False)
        except TemplateError as error:  # no system turn, say
            raise UserError(f"{self.key}: the template of '{self.source}' refuses {prompt.where}: {error}") from None


class FunctionScorer:
    """`function(prompts, completions, **row) -> list[float]`, one number an answer.

    It is called with as much of this as it takes: `prompts`, each a list of `{"role", "content"}`; `completions`,
    texts; `completion_ids`; `ended`, whether each ended by itself; and each column of the rows by its name: all lists,
    an entry an answer.
    """

    def __init__(self, key: str, source: str, weight: float):
        self.key, self.source, self.weight = key, source, weight
        where, self.name = function_of(source)
        self.function = _imported(key, where, self.name)
        self.identity = None

    def attach(self, base: Base, role: str, micro: MicroBatchLimit) -> None:
        """Needs nothing of the base."""

    def scores(self, rows: Sequence[SampledAnswers]) -> Tensor:
        given = self._call(rows)
        expected = sum(len(row.texts) for row in rows)
        if len(given) != expected:
            raise UserError(
                f"{self._said} gave {len(given)} scores for {expected} answers, the first to {rows[0].prompt.where}"
            )
        owners = [row for row in rows for _ in row.texts]
        for score, row in zip(given, owners, strict=True):
            if not _is_number(score):
                raise UserError(
                    f"{self._said} gave {score!r} for an answer to {row.prompt.where}; expected a finite number"
                )
        return torch.tensor([float(score) for score in given]).view(len(rows), -1)

    @property
    def _said(self) -> str:
        return f"{self.key}: {self.source}"

    def _call(self, rows: Sequence[SampledAnswers]) -> list:
        try:
            found = self.function(**self._arguments(rows))
            given = list(found) if isinstance(found, Iterable) else None  # a generator runs only here
        except Exception as error:  # whatever the user's function raises
            for row in rows if len(rows) > 1 else ():
                self._call([row])  # says which
            where, reason = rows[0].prompt.where, " ".join(str(error).split())
            raise UserError(f"{self._said} raised {type(error).__name__} on an answer to {where}: {reason}") from None
        if given is None:
            raise UserError(f"{self._said} gave {found!r}; expected a list with a number an answer")
        return given

    def _arguments(self, rows: Sequence[SampledAnswers]) -> dict:
        each = [row for row in rows for _ in row.texts]
        names = dict.fromkeys(name for row in rows for name in row.prompt.columns)
        known = {name: [row.prompt.columns.get(name) for row in each] for name in names if str(name).isidentifier()}
        known |= {
            "prompts": [list(row.prompt.turns) for row in each],
            "completions": [text for row in rows for text in row.texts],
            "completion_ids": [list(ids) for row in rows for ids in row.tokens.answers],
            "ended": [ended for row in rows for ended in row.ended],
        }
        taken = inspect.signature(self.function).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
            return known
        return {name: values for name, values in known.items() if name in taken}


Scorer = AdapterScorer | ModelScorer | FunctionScorer


def open_scorers(recipe: Recipe, key: str, run: RunFolder) -> list[Scorer]:
    """The scorers under `ppo.reward` or `ppo.judge`, checked as far as can be without a model.

    Raises:
        UserError: one can't be had, doesn't fit the base, or would lie in the run's own folder.
    """
    sources: Sequence[RewardSource] = getattr(recipe.ppo, key) or ()
    scorers = [_opened(f"ppo.{key}", source, recipe, run) for source in sources]
    names = [scorer.name for scorer in scorers]
    for number, (scorer, source) in enumerate(zip(scorers, sources, strict=True), start=1):
        if names.count(scorer.name) > 1:
            scorer.name = f"{number}: {source.source}"
    return scorers


def _opened(key: str, source: RewardSource, recipe: Recipe, run: RunFolder) -> Scorer:
    if source.source == REWARD_RUN:
        own = RunFolder(recipe, REWARD_RUN)
        if not own.complete:
            raise UserError(
                f"{key}: there is no finished reward run in {own.path}; "
                f"run python -m qalign.reward {run.command_line} first"
            )
        return AdapterScorer(key, own.adapter, source.weight, recipe)
    if function_of(source.source):
        return FunctionScorer(key, source.source, source.weight)
    if folder := reward_adapter(source.source):
        return AdapterScorer(key, folder, source.weight, recipe)
    place = str(Path(source.source).expanduser()) if looks_local(source.source) else source.source
    return ModelScorer(key, place, source.weight)


def load_models(scorers: list[Scorer], base: Base) -> int:
    """Loads those that are models of their own; the bytes that they take."""
    models = [scorer for scorer in scorers if isinstance(scorer, ModelScorer)]
    for model in models:
        model.load(base)
    return sum(model.bytes for model in models)


def attach(scorers: list[Scorer], base: Base, first: Role, micro: MicroBatchLimit) -> None:
    """Puts scorers on the base: the first as the role itself, further ones as `reward_2` and so on. Models of their own
    are loaded before (`load_models`).

    Raises:
        UserError: one doesn't fit, or can't be loaded.
    """
    for number, scorer in enumerate(scorers, start=1):
        scorer.attach(base, first if number == 1 else f"{first}_{number}", micro)


def combined(scorers: list[Scorer], rows: Sequence[SampledAnswers]) -> tuple[Tensor, dict[str, float]]:
    """(the weighted sum of all scores, float32 `(prompts, answers each)`; the mean of each scorer's, by name).

    Raises:
        RewardFailed: a score is not finite, or a function fails; the row is named.
    """
    total, means = torch.zeros(len(rows), len(rows[0].texts)), {}
    for scorer in scorers:
        try:
            found = scorer.scores(rows)
        except UserError as error:
            raise RewardFailed(*error.lines) from None
        if not found.isfinite().all():
            row = rows[int((~found.isfinite()).nonzero()[0, 0])]
            raise RewardFailed(f"{scorer.key}: {scorer.name} gave a score that is not finite to {row.prompt.where}")
        means[scorer.name] = found.mean().item()
        total += scorer.weight * found
    return total, means


def value_start(scorers: list[Scorer]) -> AdapterScorer | None:
    """The reward adapter that the value model begins as a copy of; None without one."""
    return next((scorer for scorer in scorers if isinstance(scorer, AdapterScorer)), None)


def _check_fits(key: str, folder: Path, recipe: Recipe) -> None:
    """What an adapter's files tell before the base is loaded."""
    try:
        kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("task_type")
        with safe_open(folder / lineage.WEIGHTS, "np") as weights:
            shape = weights.get_slice(HEAD).get_shape() if HEAD in weights.keys() else None  # noqa: SIM118
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise UserError(f"{key}: {folder} is no adapter in safetensors: {error}") from None
    if kind != "SEQ_CLS" or shape is None:
        raise UserError(f"{key}: {folder} gives no scores (its task is {kind}); expected a reward adapter, SEQ_CLS")
    if shape[0] != 1:
        raise UserError(f"{key}: {folder} has {shape[0]} labels; a reward has one")
    hidden = load_config(recipe.model).get_text_config().hidden_size
    if shape[1] != hidden:
        raise UserError(
            f"{key}: {folder} was trained on a base of hidden size {shape[1]}, '{recipe.model.base}' has {hidden}"
        )


def _imported(key: str, where: str, name: str) -> Callable:
    """A function of a module, or of a `.py` file."""
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            module = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(spec.name, module)  # so that its own classes can be pickled
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        function = getattr(module, name)
    except Exception as error:  # whatever the user's file does
        reason = " ".join(str(error).split())
        raise UserError(f"{key}: '{where}:{name}' can't be imported: {type(error).__name__}: {reason}") from None
    if not callable(function):
        raise UserError(f"{key}: '{where}:{name}' is {type(function).__name__}, expected a function")
    return function


def _is_number(score) -> bool:
    try:
        return not isinstance(score, str) and math.isfinite(score)
    except (TypeError, ValueError, OverflowError):
        return False


def _short(folder: Path) -> str:
    """What a scorer is called in figures: the folder's name, or for `runs/demo/reward/adapter` the run's."""
    parts = [part for part in folder.parts if part not in ("adapter", REWARD_RUN)]
    return parts[-1] if parts else folder.name
