"""What a model says by principles: critiques and revisions of its own answers, and labels of pairs of them.

SL-CAI (Bai et al. 2022, arXiv:2212.08073, section 3): an answer is criticised by a principle drawn at random, then
rewritten, some rounds of it; the last rewriting is what to imitate. RL-CAI (section 4): pairs of answers are judged by
all principles, and the mean judgement is the pair's soft label.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from qalign.data.collate import MicroBatchLimit
from qalign.data.formats import Message, Preference, Prompt
from qalign.data.readers import BadRow
from qalign.data.tokenize import encode_question
from qalign.judge.labeller import Comparison, FunctionLabeller, Labeller
from qalign.judge.principles import Principle
from qalign.model.generation import Sampling, TransformersEngine
from qalign.reports.answers import Answer, answers_of

if TYPE_CHECKING:
    from qalign.model.base import Base

CRITIQUE = "Criticise your last answer. {critique}"
REVISE = "{revise} Write only the new answer."


class Asked(NamedTuple):
    """A prompt to answer; its number decides which principles are drawn for it."""

    number: int
    prompt: Prompt
    ids: list[int]


@dataclass(frozen=True)
class Feedback:
    """One model that answers and revises, and one that labels, both on one base."""

    base: "Base"
    role: str  # of the model that answers
    labeller: Labeller | FunctionLabeller
    principles: tuple[Principle, ...]
    sampling: Sampling
    seed: int
    limit: MicroBatchLimit  # of one forward pass of the labeller

    def revise(self, asked: Sequence[Asked], rounds: int, draw: int) -> dict[str, Any]:
        """`revisions`: rows to imitate; `without`: the number of prompts whose answer, critique or revision is empty,
        doesn't fit or, of the last one, was cut. The number `draw` of this call seeds what is sampled."""
        first = self._sample([one.ids for one in asked], 1, draw, 0)
        going = [(one, [answers[0]], [""]) for one, answers in zip(asked, first, strict=True)]
        drawn = {one.number: self._drawn(one.number, rounds) for one in asked}
        for number in range(rounds):
            going = self._criticised(going, drawn, number, draw)
            going = self._rewritten(going, drawn, number, draw)
        rows = [
            {
                **_prompt(one.prompt),
                "completion": answers[-1].text,
                "principles": [principle.name for principle in drawn[one.number]],
                "initial_text": answers[0].text,
                "critique_texts": critiques[1:],
                "where": one.prompt.where,
            }
            for one, answers, critiques in going
            if answers[-1].ended and answers[-1].text
        ]
        return {"revisions": rows, "without": len(asked) - len(rows)}

    def _drawn(self, number: int, rounds: int) -> list[Principle]:
        """The principles of a prompt's rounds, no one twice before all were drawn."""
        random, found = Random(f"{self.seed} {number}"), list[Principle]()
        while len(found) < rounds:
            found += random.sample(self.principles, len(self.principles))
        return found[:rounds]

    def _criticised(self, going: list[Any], drawn: dict[int, list[Principle]], number: int, draw: int) -> list[Any]:
        dialogues = [
            (one.prompt, [_said(answers[-1]), _ask(CRITIQUE.format(critique=drawn[one.number][number].critique))])
            for one, answers, _ in going
        ]
        said = self._continue(dialogues, draw, 2 * number + 1)
        kept = zip(going, said, strict=True)
        return [(one, answers, [*texts, new.text]) for (one, answers, texts), new in kept if new and new.text]

    def _rewritten(self, going: list[Any], drawn: dict[int, list[Principle]], number: int, draw: int) -> list[Any]:
        dialogues = []
        for one, answers, texts in going:
            principle = drawn[one.number][number]
            critique = [_ask(CRITIQUE.format(critique=principle.critique)), _turn("assistant", texts[-1])]
            asked = _ask(REVISE.format(revise=principle.revise))
            dialogues.append((one.prompt, [_said(answers[-1]), *critique, asked]))
        said = self._continue(dialogues, draw, 2 * number + 2)
        kept = zip(going, said, strict=True)
        return [(one, [*answers, new], texts) for (one, answers, texts), new in kept if new and new.text]

    def _continue(self, dialogues: Sequence[tuple[Prompt, list[Message]]], draw: int, call: int) -> list[Answer | None]:
        """One answer to each dialogue; None where it is empty or doesn't fit."""
        room, ids = self.base.max_length - self.sampling.max_new_tokens, list[list[int]]()
        places: list[int | None] = []
        for prompt, turns in dialogues:
            try:
                template = self.base.template.with_tools(prompt.tools)
                found = encode_question(template, [*prompt.turns, *turns], room) if turns[0]["content"] else None
            except BadRow:
                found = None
            places.append(None if found is None else len(ids))
            ids += [] if found is None else [found]
        said = self._sample(ids, 1, draw, call)
        return [None if place is None else said[place][0] for place in places]

    def _sample(self, ids: list[list[int]], num_samples: int, draw: int, call: int) -> list[list[Answer]]:
        if not ids:
            return []
        seed = (self.seed * 1_000_003 + draw) * 64 + call
        found = TransformersEngine().generate(
            self.base, self.role, ids, self.sampling, num_samples=num_samples, seed=seed
        )
        return [answers_of(self.base.tokenizer, answers, self.sampling.stop_ids) for answers in found]

    def answered(self, asked: Sequence[Asked], candidates: int, draw: int) -> list[tuple[str, Comparison]]:
        """The prompts' answers in pairs to judge, each with the place of its prompt."""
        answers, pairs = self._sample([one.ids for one in asked], candidates, draw, 0), list[tuple[str, Comparison]]()
        for one, given in zip(asked, answers, strict=True):
            texts = [answer.text for answer in given if answer.ended and answer.text]
            sides = zip(texts[::2], texts[1::2], strict=False)
            pairs += [(one.prompt.where, Comparison(one.prompt.turns, a, b)) for a, b in sides if a != b]
        return pairs

    def label(self, asked: Sequence[Asked], pairs: Sequence[tuple[str, Comparison]]) -> dict[str, Any]:
        """`pairs`: rows to prefer; `judgements` of them; `unpaired`: the number of prompts without a pair, as too few
        answers ended, they were the same, or don't fit the labeller's question together."""
        rows, judged = self._judged(pairs)
        tools = {one.prompt.where: one.prompt.tools for one in asked}
        found = [row for one in judged if (row := self._pair(one, tools[one["where"]]))]
        paired = {row["where"] for row in found}
        return {
            "pairs": found,
            "judgements": judged,
            **rows,
            "unpaired": sum(o.prompt.where not in paired for o in asked),
        }

    def _pair(self, judged: dict[str, Any], tools: tuple[dict[str, Any], ...]) -> dict[str, Any] | None:
        """A judgement as a row to prefer; None for a tie."""
        better = judged["a_is_better"]
        sides = ("a", "b") if better > 0.5 else ("b", "a")
        means = {name: sum(orders) / 2 for name, orders in judged["by_principle"].items()}
        deciding = (max if better > 0.5 else min)(means, key=means.__getitem__)
        row = {"prompt": judged["prompt"], **({"tools": list(tools)} if tools else {})}
        row |= dict(zip(("chosen", "rejected"), (judged[side] for side in sides), strict=True))
        row |= {"chosen_probability": round(max(better, 1 - better), 6), "principle": deciding}
        return row | {"where": judged["where"]} if better != 0.5 else None

    def agree(self, pairs: Sequence[Preference]) -> dict[str, Any]:
        """Judgements of pairs that people judged; the people's answer is `a`."""
        comparisons = [
            (row.where, Comparison(row.prompt, row.chosen["content"], row.rejected["content"])) for row in pairs
        ]
        tokens, judged = self._judged(comparisons)
        known = {row.where: row for row in pairs}
        for one in judged:
            one["people"] = known[one["where"]].chosen_probability
            one["tokens"] = [len(self.base.tokenizer(one[side]).input_ids) for side in ("a", "b")]
        return {"judgements": judged, **tokens}

    def _judged(self, comparisons: Sequence[tuple[str, Comparison]]) -> tuple[dict[str, int], list[dict[str, Any]]]:
        """(tokens that the judging took, the judgements); comparisons that don't fit are left out."""
        kept, encoded = [], []
        for where, comparison in comparisons:
            try:
                encoded.append(self.labeller.encode(comparison))
                kept.append((where, comparison))
            except BadRow:
                continue
        if not kept:
            return {"tokens": 0, "tokens_single": 0}, []
        found = self.labeller.judge(encoded, self.limit)
        names = [principle.name for principle in self.principles]
        rows = [
            {
                "where": where,
                "prompt": list(comparison.turns),
                "a": comparison.a,
                "b": comparison.b,
                "a_is_better": round(float(given.mean()), 6),
                "by_principle": dict(zip(names, given.round(6).tolist(), strict=True)),
            }
            for (where, comparison), given in zip(kept, found.probabilities, strict=True)
        ]
        return {"tokens": found.tokens, "tokens_single": found.tokens_single}, rows


def _prompt(prompt: Prompt) -> dict[str, Any]:
    return {"prompt": list(prompt.turns), **({"tools": list(prompt.tools)} if prompt.tools else {})}


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _said(answer: Answer) -> Message:
    return _turn("assistant", answer.text)


def _ask(content: str) -> Message:
    return _turn("user", content)
