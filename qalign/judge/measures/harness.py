"""lm-eval's tasks (EleutherAI) on the base in memory: each role of it is a model that lm-eval asks.

It goes by lm-eval's public interface alone: `lm_eval.api.model.LM` and `simple_evaluate`. Tasks are asked as lm-eval
asks them by default, as plain text without a chat template, so that figures compare with published ones.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from datasets.exceptions import DatasetsError
from lm_eval import simple_evaluate, utils  # pyright: ignore[reportMissingImports]: optional
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

from qalign.data.store.sequences import TokenAnswers
from qalign.errors import UserError, did_you_mean, short
from qalign.judge.measures.held_out import over_all, sampled
from qalign.model.base import Base
from qalign.model.generation import Sampling, stop_ids_of
from qalign.model.logps import answer_states, token_scores

MOST_NEW_TOKENS = 256  # where a task names no limit
METRICS = ("acc", "exact_match", "acc_norm", "f1", "word_perplexity", "byte_perplexity")  # shown first, in this order

# What lm-eval raises where a task's package or data set isn't there.
NOT_THERE = (ImportError, LookupError, ValueError, OSError, DatasetsError)


class HarnessModel(LM):
    """A role of the base as lm-eval asks it. `role` may be changed between evaluations."""

    def __init__(self, base: Base, role: str):
        super().__init__()
        self.base, self.role, self.tokenizer = base, role, base.tokenizer
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self.prefix = cast(int, eos if bos is None else bos)  # before a text that has nothing before it

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return self._scored([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        found = []
        for request in requests:
            ids = self.tokenizer(request.args[0]).input_ids  # behind the prefix even a BOS of its own, as lm-eval does
            windows = utils.get_rolling_token_windows(ids, self.prefix, self.base.max_length - 1, context_len=1)
            found.append(sum(logp for logp, _ in self._scored([*map(utils.make_disjoint_window, windows)])))
        return found

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Greedy, or sampled where the task asks for it; cut before the first of the texts that end an answer."""
        answers: list[str] = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda number: str(requests[number].args[1]))
        for _, some in groupby(order, key=lambda number: str(requests[number].args[1])):
            numbers = [*some]
            options = requests[numbers[0]].args[1]
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else until
            wanted = options.get("max_gen_toks") or options.get("max_new_tokens") or MOST_NEW_TOKENS
            new = min(int(wanted), self.base.max_length // 2)
            temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
            sampling = Sampling(new, temperature, stop_ids_of(self.base.template))
            prompts = [self._prompt(requests[number].args[0], self.base.max_length - new) for number in numbers]
            found = sampled(self.base, self.role, prompts, sampling)
            for number, ids in zip(numbers, found, strict=True):
                text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
                answers[number] = min((text.split(end)[0] for end in until if end), key=len, default=text)
        return answers

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _prompt(self, text: str, room: int) -> list[int]:
        """The ids of a text, behind what the tokenizer puts before one; the beginning goes if it is too long."""
        return (self.tokenizer(text).input_ids or [self.prefix])[-room:]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """(ids of the context, ids of the continuation), split as lm-eval's own models do: a space at the border
        belongs to what follows it."""
        if not context:
            return [self.prefix], self._ids(continuation)
        kept = context.rstrip()
        continuation, context = context[len(kept) :] + continuation, kept
        before = self.tokenizer(context).input_ids or [self.prefix]
        return before, self.tokenizer(context + continuation).input_ids[len(self.tokenizer(context).input_ids) :]

    @torch.no_grad()
    def _scored(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(log-prob of the continuation in nats, whether greedy decoding would write it) of each pair."""
        rows = [TokenAnswers(*_shortened(before, after, self.base.max_length)) for before, after in pairs]
        numbers, found = {id(row): number for number, row in enumerate(rows)}, [(0.0, True)] * len(rows)
        asked = [row for row in rows if row.answers[0]]
        base = self.base
        with base.packed_attention(), base.acting_as(self.role) as lm:

            def read(some: Sequence[TokenAnswers]) -> tuple[list[float], set[int]]:
                batch = base.batch(some)
                scored = token_scores(lm, answer_states(lm, batch), batch.targets)
                sums = scored.logps.new_zeros(len(some)).index_add(0, batch.owners, scored.logps).tolist()
                return sums, set(batch.owners[~scored.is_top].tolist())

            for some, (sums, missed) in over_all(base, asked, "lm-eval", read):
                for place, (row, logp) in enumerate(zip(some, sums, strict=True)):
                    found[numbers[id(row)]] = (logp, place not in missed)
        return found


def _shortened(before: list[int], after: list[int], most: int) -> tuple[list[int], tuple[list[int]]]:
    """At most `most` ids, of which the context loses its beginning; one id of it stays."""
    after = after[-(most - 1) :]
    return before[-(most - len(after)) :], (after,)


class Tasks:
    """Tasks by lm-eval's names, or of `.yaml` files. A `UserError` if there is no such task or file."""

    def __init__(self, words: Sequence[str]):
        self.words = words
        self.named = [_of_file(Path(word)) if word.endswith((".yaml", ".yml")) else word for word in words]
        names = [task for task in self.named if isinstance(task, str)]
        self.manager = TaskManager(include_defaults=bool(names))  # reading all takes seconds
        for name in names:
            if name not in (known := self.manager.all_tasks):
                raise UserError(f"--tasks: lm-eval has no task {short(name)}{did_you_mean(name, known)}")


def measure_tasks(
    base: Base, roles: dict[str, str], tasks: Tasks, limit: int | None
) -> dict[str, dict[str, dict[str, Any]]]:
    """Each task's main metric under each role: `{task: {name of the role: {"metric", "value", "error"}}}`, where the
    error is lm-eval's standard error, None if it gives none."""
    model, found = HarnessModel(base, next(iter(roles.values()))), dict[str, dict[str, dict[str, Any]]]()
    base.model.eval()
    for name, role in roles.items():
        model.role = role
        options: dict[str, Any] = {"tasks": tasks.named, "limit": limit, "log_samples": False}
        try:
            results: Any = simple_evaluate(model=model, task_manager=tasks.manager, **options)
        except NOT_THERE as error:
            raise UserError(f"--tasks: {','.join(tasks.words)}: lm-eval can't run them: {short(str(error))}") from None
        for task, values in results["results"].items():
            if main := _main_metric(values):
                found.setdefault(task, {})[name] = main
    return found


def _of_file(file: Path) -> dict[str, Any]:
    """A task's own configuration, whose data files are looked up beside it."""
    try:
        task = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"--tasks: {file}: can't be read: {short(str(error))}") from None
    if not isinstance(task, dict) or "task" not in task:
        raise UserError(f"--tasks: {file}: expected a task of lm-eval, with its name under `task`")
    options = task.get("dataset_kwargs")
    if isinstance(options, dict) and isinstance(files := options.get("data_files"), dict):
        options["data_files"] = {key: str(file.parent / str(name)) for key, name in files.items()}
    return task


def _main_metric(values: dict[str, Any]) -> dict[str, Any] | None:
    """The metric that a task is known by, of what lm-eval calls `acc,none`, `acc_stderr,none` and so on."""

    def numbers() -> Iterator[tuple[int, str, float, Any]]:
        for key, value in values.items():
            metric, _, of_filter = key.partition(",")
            if isinstance(value, (int, float)) and of_filter and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{of_filter}")
                rank = METRICS.index(metric) if metric in METRICS else len(METRICS)
                yield rank, metric, float(value), error if isinstance(error, float) else None

    best = min(numbers(), key=lambda number: number[0], default=None)
    return dict(zip(("metric", "value", "error"), best[1:], strict=True)) if best else None
