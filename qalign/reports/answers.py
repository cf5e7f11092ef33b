"""Answers before and after training: do they end, do they loop, how long are they; and a verdict in words.

Imports no torch.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qalign.config.atomic import write_whole
from qalign.config.stages import needs_reference
from qalign.reports.alarms import LENGTH_RATIO, LENGTH_TOKENS, distinct_n, repeated_lines
from qalign.reports.plots import counted
from qalign.reports.reward_report import BY_CHANCE, sign_test

SEED = 0  # every evaluation draws the same random numbers, so that less of a change is chance
LOOP_TOKENS = 12  # a shorter tail that repeats may be meant: "no, no, no"
LOOP_TURNS = 3
LOOP_LINES = 0.5  # share of an answer's lines and sentences that repeat earlier ones
FEW_BETTER = 0.95  # share of pairs that were right before, from which on hardly any can be gained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Figures = dict[str, Any]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Answer:
    """A sampled answer; `ids` are its tokens without the one that ended it."""

    text: str
    ids: Sequence[int]
    ended: bool  # by itself, not by the limit of tokens

    @property
    def loops(self) -> bool:
        """Whether it says the same again and again: its tail is one sequence of tokens three times or more, or over
        half of its lines and sentences repeat earlier ones."""
        ids = list(self.ids)
        for period in range(1, len(ids) // LOOP_TURNS + 1):
            tail = ids[-max(LOOP_TURNS * period, LOOP_TOKENS) :]
            if len(tail) >= LOOP_TOKENS and tail[period:] == tail[:-period]:
                return True
        return repeated_lines([self.text]) > LOOP_LINES


def answers_of(
    tokenizer: "PreTrainedTokenizerBase", found: Sequence[list[int]], stop_ids: Sequence[int]
) -> list[Answer]:
    """Sampled token ids as answers."""
    from qalign.model.generation import text_of  # here, as verdicts on finished runs must not wait for torch

    return [
        Answer(text_of(tokenizer, ids), ids[:-1] if ids[-1] in stop_ids else ids, ids[-1] in stop_ids) for ids in found
    ]


def measure_answers(answers: Sequence[Answer]) -> Figures:
    """Figures of answers, ready for JSON: their number `answers`; the shares that `ended` and that `looping` answers
    have; `length`, the mean in tokens; `distinct` (distinct-2) and `repeated` (repeated lines)."""
    texts = [answer.text for answer in answers]
    return {
        "answers": len(answers),
        "ended": sum(answer.ended for answer in answers) / len(answers),
        "looping": sum(answer.loops for answer in answers) / len(answers),
        "length": sum(len(answer.ids) for answer in answers) / len(answers),
        "distinct": distinct_n(texts),
        "repeated": repeated_lines(texts),
    }


def spread(rows: Sequence[Item], count: int) -> list[Item]:
    """At most `count` rows, spread evenly."""
    return [*rows[:: max(1, len(rows) // max(1, count))][:count]]


def write_samples(run: Path, step: int, rows: Sequence[Figures], unit: str = "step") -> None:
    """Keeps the answers of an evaluation in a run folder, as `samples/step-STEP.jsonl`."""
    file = run / "samples" / f"{unit}-{step}.jsonl"
    file.parent.mkdir(exist_ok=True)
    write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def in_a_line(row: Figures) -> str:
    """The question and the answer of a sample, shortened."""
    question, answer = (" ".join(text.split()) for text in (row["prompt"][-1]["content"], row["completion"]))
    return f"{question[:80]!r} → {answer[:240]!r}"


def verdict(figures: Figures) -> list[str]:
    """What the figures of `qalign.evaluate` mean, one sentence each, with what to try as overrides of the recipe."""
    found = [_of_pairs(figures)]
    if answers := figures.get("answers"):
        before, after = answers["before"], answers["after"]
        if answers["unchanged"] == after["answers"]:
            found.append(f"all {counted(after['answers'], 'greedy answer')} are word for word as before")
        stage = _stage(figures)
        found += [line for line in (_of_endings(before, after, stage), _of_length(before, after, stage)) if line]
    return found


def _stage(figures: Figures) -> str:
    return figures.get("stage", "dpo")


def _of_pairs(figures: Figures) -> str:
    pairs, reward, stage = figures["pairs"], figures["reward_accuracy"], _stage(figures)
    right = round(reward * pairs)
    more = f"more pairs, {stage}.epochs=3 or twice the {stage}.learning_rate"
    # Otherwise it is no change since then.
    is_measured_from_reference = stage == "kto" or needs_reference(figures.get("loss", "sigmoid"))
    if is_measured_from_reference and sign_test(right, pairs - right) > BY_CHANCE:
        if sign_test(pairs - right, right) <= BY_CHANCE:
            return f"the wrong way: chosen answers lost, reward {reward:.1%}; are chosen and rejected swapped?"
        shown = f"reward {reward:.1%} of {counted(pairs, 'pair')}, a coin has 50%"
        return f"no effect shown on what is preferred ({shown}); try {more}"
    before, after = figures["accuracy_before"], figures["accuracy_after"]
    change = f"preferred {before:.1%} → {after:.1%}"
    gained, lost = figures["pairs_gained"], figures["pairs_lost"]
    if sign_test(lost, gained) <= BY_CHANCE:
        fewer = f"half the {stage}.learning_rate, fewer {stage}.epochs or a larger {stage}.beta"
        return f"{change}: worse than before; try {fewer}"
    if sign_test(gained, lost) <= BY_CHANCE:
        return f"it helped: {counted(gained, 'pair')} won and {lost} lost, {change}"
    if before >= FEW_BETTER:
        return f"little was left to learn: {change}"
    if not is_measured_from_reference:
        return f"no effect shown on what is preferred ({change}); try {more}"
    return (
        f"a small shift: reward {reward:.1%} counts any move from the reference towards chosen answers, but the model "
        f"hardly prefers more of them by itself, {change}; for more try {stage}.epochs=3, twice the "
        f"{stage}.learning_rate or half the {stage}.beta"
    )


def _of_endings(before: Figures, after: Figures, stage: str) -> str | None:
    count = after["answers"]
    cut, was_cut = (round((1 - each["ended"]) * count) for each in (after, before))
    loops, looped = (round(each["looping"] * count) for each in (after, before))
    said = f"{cut} of {count} answers don't end, {loops} loop (before: {was_cut}, {looped})"
    if loops > looped or cut > was_cut + count // 10:
        mixed = "a larger dpo.beta or dpo.loss='{sigmoid: 1, sft: 0.2}'"
        last = mixed if stage == "dpo" else f"or a larger {stage}.beta"
        return f"{said}; try fewer {stage}.epochs, half the {stage}.learning_rate, {last}"
    if max(cut, loops) > count // 4:
        return f"{said}: as before training; SFT on short whole answers first ({stage}.start_from=sft) teaches to end"
    return None


def _of_length(before: Figures, after: Figures, stage: str) -> str | None:
    if after["length"] <= LENGTH_RATIO * before["length"] or after["length"] - before["length"] < LENGTH_TOKENS:
        return None
    grew = f"answers grew long, {before['length']:.0f} → {after['length']:.0f} tokens"
    other = "dpo.loss=sigmoid_norm or " if stage == "dpo" else ""
    return f"{grew}; read some, and if they are not better, try {other}a larger {stage}.beta"
