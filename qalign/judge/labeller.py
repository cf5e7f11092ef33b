"""A language model as labeller: which of two answers is better by a principle, from the log-probs of two words.

The model is shown a dialogue and two answers, is told a rule, and has begun to say "The better answer is the". The
probability that it goes on with "first", against "second", is its judgement (Bai et al. 2022, arXiv:2212.08073,
section 4.1; Lee et al. 2023, arXiv:2309.00267, section 2.1). Models prefer a place, so each pair is judged twice with
the answers' places swapped, as Lee et al. do.

Everything up to the rule is the same for all principles: it is the trunk of a packed row and is computed once for each
of the two orders, and each principle is a short branch. A language model reads the second answer after the first, so
the two orders can share no more than the dialogue.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from qalign.data.collate import AnsweredPrompt, MicroBatchLimit, in_groups
from qalign.data.formats import Message
from qalign.data.readers import BadRow
from qalign.data.rows import check_texts
from qalign.data.store.sequences import TokenAnswers
from qalign.errors import UserError, short
from qalign.judge.principles import Principle
from qalign.model.logps import backbone, state_logps
from qalign.rl.user_code import Failed, import_function, is_number, listed, user_code

if TYPE_CHECKING:
    from qalign.model.base import Base

WORDS = ("first", "second")
LEAD = "The better answer is the"  # how the labeller's own turn begins; a base without a chat template goes on from it
QUESTION = """\
Below are a dialogue between a user and an assistant, and two answers that the assistant could give next.

Dialogue:
{dialogue}

First answer:
{first}

Second answer:
{second}

Which answer is better by this rule, the first or the second? Rule: """


@dataclass(frozen=True)
class Comparison:
    """Two answers to one dialogue."""

    turns: tuple[Message, ...]  # of the dialogue, a user's last
    a: str
    b: str


class Judged(NamedTuple):
    """What one labeller says about many comparisons."""

    probabilities: np.ndarray  # float64 (comparisons, principles, 2): P(a is better), a in first place, then in second
    tokens: int  # that went through the model
    tokens_single: int  # that as many prompts with one judgement each would have taken


class Labeller:
    """Judges comparisons by principles.

    Args:
        base: the model; a labeller is a role on it.
        role: `base`, or the name of an adapter that was put on the base.
        principles: whose `choose` is the rule.

    Raises `UserError` if the tokenizer begins "first" and "second" with the same tokens to the end.
    """

    def __init__(self, base: "Base", role: str, principles: Sequence[Principle]):
        self.base, self.role, self.principles = base, role, tuple(principles)
        probes = [self._ids([{"role": "user", "content": "a"}], word) for word in WORDS]
        alike = sum(1 for _ in takewhile(bool, (len({*tokens}) == 1 for tokens in zip(*probes, strict=False))))
        if alike == min(map(len, probes)):
            raise UserError(f"model.base: its tokenizer can't tell {' and '.join(WORDS)} apart, so it can't be asked")
        # The words may share tokens before they differ, such as a space of its own.
        self.targets = [ids[alike] for ids in probes]
        self._after = len(probes[0]) - alike  # tokens of the first word from where the two differ

    def _ids(self, turns: list[Message], word: str) -> list[int]:
        """A question with an answer that ends with `word`, as ids."""
        template = self.base.template
        return template.ids(template.render(turns, add_generation_prompt=True) + f"{LEAD} {word}")

    def encode(self, comparison: Comparison) -> tuple[TokenAnswers, TokenAnswers]:
        """Both orders, each as a trunk with a branch for each principle: the tokens before the one that is asked for.
        The dialogue's oldest turns are left out until it fits `max_length`; a `BadRow` if the answers alone don't."""
        check_texts(self.base.template, [*comparison.turns, comparison.a, comparison.b], self.base.max_length)
        for start in range(len(comparison.turns)):
            dialogue = "\n\n".join(f"{turn['role'].title()}: {turn['content']}" for turn in comparison.turns[start:])
            answers = comparison.a, comparison.b
            found = [self._order(QUESTION.format(dialogue=dialogue, first=first, second=second))
                     for first, second in (answers, answers[::-1])]  # fmt: skip
            if max(map(len, found)) < self.base.max_length:
                return found[0], found[1]
        raise BadRow(f"the two answers don't fit model.max_length {self.base.max_length} together with the question")

    def _order(self, question: str) -> TokenAnswers:
        rows: list[list[int]] = []
        for principle in self.principles:
            ids = self._ids([{"role": "user", "content": question + principle.choose}], WORDS[0])
            if ids[-self._after] != self.targets[0]:
                raise BadRow("the tokenizer joins the labeller's word with what stands before it")
            rows.append(ids[: -self._after])
        alike = sum(1 for _ in takewhile(bool, (len({*tokens}) == 1 for tokens in zip(*rows, strict=False))))
        trunk = min(alike, min(map(len, rows)) - 1)  # a branch has one token at least, at which the word is predicted
        return TokenAnswers(rows[0][:trunk], tuple(ids[trunk:] for ids in rows))

    @torch.no_grad()
    def judge(
        self, encoded: Sequence[tuple[TokenAnswers, TokenAnswers]], limit: MicroBatchLimit, *, progress: bool = False
    ) -> Judged:
        """The judgements of comparisons that `encode` made; `limit` bounds one forward pass and changes no number."""
        base, rows = self.base, [row for orders in encoded for row in orders]
        numbers = {id(row): number for number, row in enumerate(rows)}
        found = np.empty((len(rows), len(self.principles)))
        with base.packed_attention(), base.acting_as(self.role), tqdm(
            total=len(encoded), desc="judging", unit="pair", disable=not progress
        ) as bar:  # fmt: skip
            for some in (some for group in in_groups(rows) for some in base.micro_batches(group, limit)):
                found[[numbers[id(row)] for row in some]] = self._first(some)
                bar.update(len(some) / 2)
        if not np.isfinite(found).all():
            raise UserError(
                f"labeller: its log-probs are not finite in {base.precision}; try another model.compute_dtype"
            )
        first = found.reshape(len(encoded), 2, -1).transpose(0, 2, 1)
        return Judged(
            np.stack([first[..., 0], 1 - first[..., 1]], axis=-1),
            sum(map(base.tokens_taken, rows)),
            sum(len(row.prompt_ids) + len(ids) for row in rows for ids in row.answers),
        )

    def _first(self, rows: Sequence[AnsweredPrompt]) -> np.ndarray:
        """P("first") against P("second") of some trunks with their branches: float64 `(rows, principles)`."""
        lm = self.base.lm
        batch = self.base.batch(rows, last_token="kept")
        hidden = backbone(lm)(**batch.inputs, use_cache=False).last_hidden_state
        states = hidden.flatten(0, 1)[batch.last_tokens]
        words = [state_logps(lm, states, batch.last_tokens.new_full((len(states),), word)) for word in self.targets]
        return (words[0].double() - words[1].double()).sigmoid().view(len(rows), -1).cpu().numpy()


class FunctionLabeller:
    """A Python function in a labeller's place: `function(prompts, firsts, seconds, principles) -> list[float]`, for
    each judgement the probability that the first answer is better. It is asked in both orders too.

    `prompts` are lists of turns, `firsts` and `seconds` texts, `principles` the names of the principles.
    """

    def __init__(self, key: str, source: str, principles: Sequence[Principle]):
        module, _, name = source.rpartition(":")
        self.key, self.source, self.function = key, source, import_function(key, module, name)
        self.principles = tuple(principles)

    def encode(self, comparison: Comparison) -> Comparison:
        return comparison

    def judge(self, encoded: Sequence[Any], limit: MicroBatchLimit, *, progress: bool = False) -> Judged:
        """As `Labeller.judge`, of comparisons; a `UserError` if the function fails or gives anything else than
        probabilities."""
        asked = [
            (list(one.turns), first, second, principle.name)
            for one in encoded
            for principle in self.principles
            for first, second in ((one.a, one.b), (one.b, one.a))
        ]
        try:
            with user_code():
                given = listed(self.function(*map(list, zip(*copy.deepcopy(asked), strict=True))), len(asked))
        except Failed as failed:
            raise UserError(f"{self.key}: {self.source} raised {failed}") from None
        expected = f"expected {len(asked)} probabilities from 0 to 1, one for each judgement"
        if given is None or len(given) != len(asked):
            raise UserError(f"{self.key}: {self.source} gave {short(given)}; {expected}")
        if (bad := next((p for p in given if not (is_number(p) and 0 <= p <= 1)), None)) is not None:
            raise UserError(f"{self.key}: {self.source} gave {short(bad)}; {expected}")
        first = np.array(given, dtype=np.float64).reshape(len(encoded), len(self.principles), 2)
        return Judged(np.stack([first[..., 0], 1 - first[..., 1]], axis=-1), 0, 0)
