"""Answers before and after training: do they end, do they loop, how long are they; and a verdict in words.

Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent, wrap
from typing import TYPE_CHECKING, Any, TypeVar

from qalign.config.atomic import write_rows
from qalign.config.stages import needs_reference
from qalign.data.formats import Prompt
from qalign.reports.alarms import LENGTH_RATIO, LENGTH_TOKENS, distinct_n, repeated_lines, with_sft
from qalign.reports.plots import counted
from qalign.reports.reward_report import BY_CHANCE, sign_test

SEED = 0  # every evaluation draws the same random numbers, so that less of a change is chance
LOOP_TOKENS = 12  # a shorter tail that repeats may be meant: "no, no, no"
LOOP_TURNS = 3
LOOP_LINES = 0.5  # share of an answer's lines and sentences that repeat earlier ones
RESAMPLES = 2000
HELD_BY = {"dpo": "beta", "kto": "beta", "ppo": "kl_coefficient", "grpo": "kl_coefficient"}  # to the reference
SIDE_BY_SIDE = 3  # prompts whose answers are printed
SHOWN_LINES = 8  # of an answer
FEW_BETTER = 0.95  # share of pairs that were right before, from which on hardly any can be gained

if TYPE_CHECKING:
    import numpy as np
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


def change(before: Sequence[float], after: Sequence[float], weights: Sequence[float] | None = None) -> Figures:
    """What a figure of the same rows is `before` and `after`, as means over the rows; the mean `change` of a row, and
    its 95% `interval` `[low, high]`: the percentile bootstrap over rows (Efron 1979). `weights`: of the rows, all alike
    by default."""
    import numpy as np  # here, as verdicts on finished runs must not wait for it

    one, other = (np.asarray(values, dtype=np.float64) for values in (before, after))
    weight = np.ones(len(one)) if weights is None else np.asarray(weights, dtype=np.float64)
    rows = np.random.default_rng(SEED).integers(len(one), size=(RESAMPLES, len(one)))
    changes = np.average((other - one)[rows], axis=1, weights=weight[rows])
    means = (float(np.average(values, weights=weight)) for values in (one, other, other - one))
    return {**dict(zip(("before", "after", "change"), means, strict=True)), "interval": _middle(changes)}


def _middle(values: "np.ndarray") -> list[float]:
    """The range that holds 95% of some values."""
    import numpy as np

    return np.quantile(values, [0.025, 0.975]).tolist()


def spread(rows: Sequence[Item], count: int) -> list[Item]:
    """At most `count` rows, spread evenly."""
    return [*rows[:: max(1, len(rows) // max(1, count))][:count]]


def print_answers(prompts: Sequence[Prompt], answers: dict[str, list[Answer]]) -> None:
    """A few prompts with the answers of each model."""
    shown = {name: spread(texts, SIDE_BY_SIDE) for name, texts in answers.items()}
    for prompt, *found in zip(spread(prompts, SIDE_BY_SIDE), *shown.values(), strict=True):
        print("─" * 100)
        texts = (prompt.turns[-1]["content"], *(answer.text for answer in found))
        for name, text in zip(("prompt", *shown), texts, strict=True):
            lines = [part for line in text.splitlines() or [""] for part in wrap(line, 88) or [""]]
            lines = lines if len(lines) <= SHOWN_LINES else [*lines[:SHOWN_LINES], "…"]
            print(f"{name:<9} " + indent("\n".join(lines), " " * 10).strip(), flush=True)


def write_samples(run: Path, step: int, rows: Sequence[Figures], unit: str = "step") -> None:
    """Keeps the answers of an evaluation in a run folder, as `samples/step-STEP.jsonl`."""
    file = run / "samples" / f"{unit}-{step}.jsonl"
    file.parent.mkdir(exist_ok=True)
    write_rows(file, rows)


def in_a_line(row: Figures) -> str:
    """The question and the answer of a sample, shortened."""
    question, answer = (" ".join(text.split()) for text in (row["prompt"][-1]["content"], row["completion"]))
    return f"{question[:80]!r} → {answer[:240]!r}"


def evaluation_lines(figures: Figures, *, has_parent: bool) -> dict[str, str]:
    """The figures of `qalign.evaluate` in words, for a table. `has_parent`: the run started from an adapter."""
    lines, start = {}, "SFT" if has_parent else "base"
    if "reward_accuracy" in figures:
        stops = {"accuracy_base": "base", "accuracy_before": "SFT", "accuracy_after": "aligned"}
        if not has_parent:
            stops = {"accuracy_before": "base", "accuracy_after": "aligned"}
        preferred, models = " → ".join(f"{figures[name]:.1%}" for name in stops), " → ".join(stops.values())
        lines["preferred"] = (
            f"{preferred:<24} pairs whose chosen answer has the higher mean log-prob per token: {models}"
        )
        lines["reward"] = (
            f"{figures['reward_accuracy']:<24.1%} pairs whose chosen answer has the higher implicit reward"
        )
        lines["margin"] = f"{figures['reward_margin']:<+24.2f} mean implicit reward, chosen minus rejected"
    elif "perplexity" in figures:
        lines |= _predicted(figures, f"of the answers' tokens: {start} → trained", "perplexity")
    elif "kl_nats" in figures:
        for key in ("reward", "judge"):
            if key in figures:
                lines[key] = f"{_moved(figures[key], '+.3f'):<24} mean score, {start} → aligned; {_by(figures[key])}"
        kl = figures["kl_nats"]
        lines["KL"] = f"{kl['after']:<24.2f} nats from the reference, 95%: {_range(kl['interval'], '.2f')}"
    elif "rewards" in figures:
        lines["loss"] = f"{_moved(figures['loss_change'], '.3f'):<24} {figures['loss']}; {_by(figures['loss_change'])}"
        for name, rewards in figures["rewards"].items():
            shown = _moved(rewards, "+.3f")
            lines[name] = f"{shown:<24} mean implicit reward of {counted(rewards['answers'], f'{name} answer')}"
    elif "accuracy_base" in figures:
        shown = f"{figures['accuracy_base']:.1%} → {figures['trust']['accuracy']:.1%}"
        lines["accuracy"] = f"{shown:<24} pairs right: the base's mean log-prob per token → the reward model"
    if answers := figures.get("answers"):
        before, after, count = answers["before"], answers["after"], answers["after"]["answers"]
        ended, loops = (f"{before[key]:.0%} → {after[key]:.0%}" for key in ("ended", "looping"))
        length, limit = f"{before['length']:.0f} → {after['length']:.0f}", answers["max_new_tokens"]
        kind = "sampled" if "kl_nats" in figures else "greedy"
        lines |= {
            "ended": f"{ended:<24} of {count} {kind} answers ended by themselves within {limit} tokens",
            "length": f"{length:<24} their mean length in tokens",
            "loops": f"{loops:<24} of them repeat themselves",
        }
    if tax := figures.get("tax"):
        lines |= _predicted(tax, f"on {counted(tax['rows'], 'row')} of {tax['rows_of']}: base → aligned", "tax")
    return lines


def task_lines(tasks: dict[str, Figures]) -> dict[str, str]:
    """The figures of lm-eval's tasks in words, for a table."""
    lines = {}
    for name, by_model in tasks.items():
        base, aligned = (by_model[model]["value"] for model in ("base", "aligned"))
        apart = f"standard error {by_model['aligned']['error']:.3f}" if by_model["aligned"]["error"] else ""
        lines[name[:14]] = f"{f'{base:.3f} → {aligned:.3f}':<24} {by_model['base']['metric']}, base → aligned; {apart}"
    return lines


def _predicted(figures: Figures, what: str, name: str) -> dict[str, str]:
    perplexity, right = figures["perplexity"], figures["token_accuracy"]
    shown, tokens = (
        f"{before['before']:{f}} → {before['after']:{f}}" for before, f in ((perplexity, ".2f"), (right, ".1%"))
    )
    by = f"{figures['loss']['change']:+.3f} nats a token, 95%: {_range(figures['loss']['interval'], '+.3f')}"
    return {name: f"{shown:<24} perplexity {what}", "": f"{by}; most likely token right: {tokens}"}


def _moved(figures: Figures, form: str) -> str:
    return f"{figures['before']:{form}} → {figures['after']:{form}}"


def _by(figures: Figures) -> str:
    return f"{figures['change']:+.3f}, 95%: {_range(figures['interval'], '+.3f')}"


def _range(interval: Sequence[float], form: str) -> str:
    return f"{interval[0]:{form}} to {interval[1]:{form}}"


def verdict(figures: Figures) -> list[str]:
    """What the figures of `qalign.evaluate` mean, one sentence each, with what to try as overrides of the recipe."""
    others = _of_policy if "kl_nats" in figures else _of_labelled if "rewards" in figures else _of_pairs
    of_stage = {"sft": _of_loss, "reward": _of_trust}.get(_stage(figures), others)
    found = [of_stage(figures)]
    if answers := figures.get("answers"):
        before, after = answers["before"], answers["after"]
        if answers["unchanged"] == after["answers"]:
            found.append(f"all {counted(after['answers'], 'answer')} are word for word as before")
        found += [line for line in (_of_endings(before, after, figures), _of_length(before, after, figures)) if line]
    if tax := figures.get("tax"):
        found.append(_of_tax(tax))
    return found


def _of_loss(figures: Figures) -> str:
    loss, (low, high) = figures["loss"], figures["loss"]["interval"]
    if high < 0:
        return f"it helped: held-out loss {_moved(loss, '.3f')} nats a token"
    if low > 0:
        return (
            f"worse than before, {_moved(loss, '.3f')} nats a token; try fewer sft.epochs or half the sft.learning_rate"
        )
    return f"no effect shown on the held-out loss ({_moved(loss, '.3f')}); try sft.epochs=3 or more dialogues"


def _of_labelled(figures: Figures) -> str:
    loss, (low, high) = figures["loss_change"], figures["loss_change"]["interval"]
    shown = f"held-out loss {_moved(loss, '.3f')}"
    if high < 0:
        return f"it helped: {shown}; pairs of a good and a bad answer to one prompt would show what is preferred"
    if low > 0:
        return f"worse than before: {shown}; try half the kto.learning_rate or fewer kto.epochs"
    return f"no effect shown on the {shown}; try kto.epochs=3, twice the kto.learning_rate or more answers"


def _of_trust(figures: Figures) -> str:
    return (
        figures["warning"] or f"it beats a coin and the length judge, {figures['trust']['accuracy']:.1%} of the pairs"
    )


def _of_policy(figures: Figures) -> str:
    stage, reward = _stage(figures), figures["reward"]
    judge = figures.get("judge")
    judged = f", judge {_moved(judge, '+.3f')}" if judge else ""
    shown = f"held-out reward {_moved(reward, '+.3f')}{judged}, KL {figures['kl_nats']['after']:.2f} nats"
    if judge and reward["interval"][0] > 0 > judge["interval"][1]:
        return f"the reward rose and the judge fell ({shown}): it is hacked; see adapter_best and the alarms of the run"
    if reward["interval"][0] > 0:
        return f"it learned: {shown}"
    if reward["interval"][1] < 0:
        return f"worse than before: {shown}; try half the {stage}.learning_rate"
    return f"no effect shown on the reward: {shown}; try more {stage}.max_steps or more held-out prompts"


def _of_tax(tax: Figures) -> str:
    loss, (low, high) = tax["loss"], tax["loss"]["interval"]
    if low > 0:
        return f"alignment tax: dialogues of {tax['rows_of']} cost {loss['change']:+.3f} nats a token"
    shown = f"{loss['change']:+.3f} nats a token on {tax['rows_of']}"
    return f"no alignment tax there: {shown}" if high < 0 else f"no alignment tax shown: {shown}"


def _stage(figures: Figures) -> str:
    """The section of the recipe that says how it was trained; that of best_of's rounds is DPO's."""
    stage = figures.get("stage", "dpo")
    return "dpo" if stage == "best_of" else stage


def _held_more(stage: str) -> str:
    return f"a larger {stage}.{HELD_BY[stage]}" if stage in HELD_BY else ""


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


def _of_endings(before: Figures, after: Figures, figures: Figures) -> str | None:
    stage, count = _stage(figures), after["answers"]
    cut, was_cut = (round((1 - each["ended"]) * count) for each in (after, before))
    loops, looped = (round(each["looping"] * count) for each in (after, before))
    said = f"{cut} of {count} answers don't end, {loops} loop (before: {was_cut}, {looped})"
    if loops > looped or cut > was_cut + count // 10:
        fixes = [f"fewer {stage}.epochs", f"half the {stage}.learning_rate", _held_more(stage)]
        fixes.append(with_sft(figures["loss"]) if stage == "dpo" and "loss" in figures else "")
        return f"{said}; try {' or '.join(filter(None, fixes))}"
    if max(cut, loops) > count // 4:
        first = "short whole answers in sft.data teach"
        if stage != "sft":
            first = f"SFT on short whole answers first ({stage}.start_from=sft) teaches"
        return f"{said}: as before training; {first} to end"
    return None


def _of_length(before: Figures, after: Figures, figures: Figures) -> str | None:
    if after["length"] <= LENGTH_RATIO * before["length"] or after["length"] - before["length"] < LENGTH_TOKENS:
        return None
    grew = f"answers grew long, {before['length']:.0f} → {after['length']:.0f} tokens"
    stage = _stage(figures)
    fixes = ["dpo.loss=sigmoid_norm" if stage == "dpo" else "", _held_more(stage) or f"fewer {stage}.epochs"]
    return f"{grew}; read some, and if they are not better, try {' or '.join(filter(None, fixes))}"
