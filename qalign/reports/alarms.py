"""Figures of the held-out answers during a run, alarms about them, and the best evaluation point of a PPO run.

Three symptoms of a policy that goes wrong are measured in every stage that samples: longer answers (Singhal et al.
2023, arXiv:2310.03716), answers that repeat themselves, and answers that never end. PPO may also game its reward. The
reward that PPO trains on is a proxy: the farther the policy moves from the reference, the more it rises, while the
quality that it stands for peaks and then falls (Gao et al. 2023, arXiv:2210.10760). So a judge that PPO never trains on
scores the same answers.

A rise or fall is measured in standard errors of the difference of two evaluation points, as if their answers were
independent. The prompts are the same, so the true error is a little smaller: an alarm comes late rather than falsely.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, isfinite, log, sqrt
from typing import ClassVar

from qalign.reports.plots import counted

# Every evaluation may raise a false alarm. Among runs of 20 evaluations at patience 3 in which the proxy rises and the
# judge truly stays the same, over 80% raise one at one standard error, about 25% at two, 1 to 4% at three (tested).
SURE_ERRORS = 3.0
RISE_ERRORS = 1.0  # a smaller rise of the judge excuses longer answers: few prompts can't show a large one
SPREAD_RATIO = 2.0  # of an ensemble's disagreement; on answers like the first ones it hardly moves
LENGTH_RATIO = 2.0  # a healthy policy that learns to say more may well grow its answers by half
LENGTH_TOKENS = 16.0  # growing from 5 tokens to 12 is harmless
REPEATED_RISE = 0.2  # a fifth of all lines: a reader can't miss it
DISTINCT_RATIO = 0.5  # of distinct-2 at the start; about half of the answers must loop to get there
ENDED_RATIO = 0.5
SFT_WEIGHT = 0.1  # of the SFT loss that is advised beside DPO's losses
ENDED_BEFORE = 0.5  # if fewer answers ended before training, max_new_tokens is too small to tell

_LIST_MARKER = re.compile(r"^(?:[-*+•–]|\d+[.)])\s+")  # "1. Rest." and "2. Rest." say the same
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])")


@dataclass(frozen=True, kw_only=True)
class SampledPoint:
    """The figures of the answers of one evaluation on the held-out prompts, all finite."""

    step: int  # optimiser steps done, of PPO iterations; 0 is before training
    answers: int  # number of answers that the means are over
    # Mean of log pi(y|x) - log pi_ref(y|x) over whole answers; an estimate, so it may fall below 0. None: no reference.
    kl_nats: float | None
    length: float  # mean, in tokens
    ended: float  # share of answers that end by themselves, not by the token limit
    distinct: float  # `distinct_n` with n = 2
    repeated: float  # `repeated_lines`

    may_be_none: ClassVar[tuple[str, ...]] = ("kl_nats",)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (isfinite(value) if value is not None else name in self.may_be_none):
                fix = "has the training diverged?"
                raise ValueError(f"step {self.step}: {name} is {value}, expected a finite number; {fix}")
        if self.answers < 1:
            raise ValueError(f"step {self.step}: answers is {self.answers}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class EvalPoint(SampledPoint):
    """The figures of one evaluation of a PPO run. Standard deviations are over answers, divided by n."""

    kl_nats: float
    proxy: float  # mean reward that the policy trains on, without the KL penalty
    proxy_std: float
    judge: float | None  # mean score of a judge that PPO never trains on; None if the recipe names none
    judge_std: float | None
    entropy: float  # nats per token
    clipped: float  # share of clipped ratios in the updates since the last evaluation; 0 at step 0
    spread: float | None = None  # mean standard deviation of the members of the reward; None if it is no ensemble

    may_be_none: ClassVar[tuple[str, ...]] = ("judge", "judge_std", "spread")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.judge is None) != (self.judge_std is None):
            raise ValueError(f"step {self.step}: give both judge and judge_std, or neither")


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Distinct n-grams divided by all n-grams of words (Li et al. 2016, arXiv:1510.03055) per text, then the mean.

    Per text, to show an answer that loops: over all texts together it would also fall when answers open alike. Texts of
    fewer than n words are left out; 1.0 if none is left. Longer texts score a little lower by nature.
    """
    shares = []
    for text in texts:
        words = text.split()
        if grams := list(zip(*(words[start:] for start in range(n)), strict=False)):
            shares.append(len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else 1.0


def repeated_lines(texts: Sequence[str]) -> float:
    """The share of lines and sentences that repeat an earlier one of the same text; the mean over non-empty texts.

    Sentences count, so that one line that says one sentence again and again is seen. Case, white space and list
    markers are ignored. A loop without full stops shows in `distinct_n` instead. 0.0 if all texts are empty.
    """
    shares = [1 - len(set(said)) / len(said) for said in map(_sentences, texts) if said]
    return sum(shares) / len(shares) if shares else 0.0


def best_of_n_kl(n: int) -> float:
    """KL in nats of best-of-n sampling from the sampled policy: log n - (n - 1) / n (Stiennon et al. 2020, app. G.3).
    An upper bound; tight if no single answer is likely (Beirami et al. 2024, arXiv:2401.01879)."""
    return log(n) - (n - 1) / n


def best_point(points: Sequence[EvalPoint]) -> EvalPoint:
    """The point with the highest judge; the highest proxy unless every point has a judge; the earliest of equals."""
    return max(points, key=_judge if _have_judge(points) else lambda point: point.proxy)


def alarms(points: Sequence[EvalPoint], patience: int) -> list[str]:
    """Warnings about the last point, one sentence each; empty if all is well.

    `points` are in the order of their steps; the first is from before training. docs/ppo.md lists the alarms.
    """
    if len(points) < 2:
        return []
    first, last = points[0], points[-1]
    found = (
        _judge_falls(points, patience),
        _length_grows(first, last),
        _answers_repeat(first, last),
        _answers_never_end(first, last),
        _members_part(first, last),
    )
    return [sentence for sentence in found if sentence]


def _judge_falls(points: Sequence[EvalPoint], patience: int) -> str | None:
    """The judge fell at `patience` points in a row, or the last `patience` points are all far below the best one, as a
    slow fall is seldom unbroken; and the proxy rose meanwhile."""
    if not _have_judge(points):
        return None
    last, best, falls = points[-1], best_point(points), 0
    while falls < len(points) - 1 and _judge(points[-falls - 1]) < _judge(points[-falls - 2]):
        falls += 1
    start = points[-falls - 1]
    if falls >= patience and _errors(start, last) < -SURE_ERRORS and last.proxy > start.proxy:
        peak, how = start, f"fell at {counted(falls, 'evaluation')} in a row"
    # The best point can't be among the recent ones: it is not below itself.
    elif all(_errors(best, point) < -SURE_ERRORS for point in points[-patience:]) and last.proxy > best.proxy:
        peak, how = best, f"was below its best at {counted(patience, 'evaluation')} in a row"
    else:
        return None
    return (
        f"the judge {how}, {change(_judge(peak), _judge(last))} ({-_errors(peak, last):.1f} standard errors), "
        f"while the reward rose, {change(peak.proxy, last.proxy)} (steps {peak.step} → {last.step}, KL "
        f"{change(peak.kl_nats, last.kl_nats, '.1f')} nats): the policy is gaming its reward; keep step {best.step}, "
        "and raise kl_coefficient, train for fewer steps, or train a better reward model"
    )


def _length_grows(first: EvalPoint, last: EvalPoint) -> str | None:
    if not (grew := grew_long(first, last)):
        return None
    fix = "penalise length, raise kl_coefficient, or train the reward model on pairs of similar length"
    if _have_judge([first, last]):
        if _errors(first, last) > RISE_ERRORS:
            return None
        before, after = _judge(first), _judge(last)
        found = "fell" if after < before else "hardly rose"
        return f"{grew}, and the judge {found}, {change(before, after)}: the length gains nothing; {fix}"
    if last.proxy <= first.proxy:
        return None
    return (
        f"{grew}, while the reward rose, {change(first.proxy, last.proxy)}, and there is no judge to say whether they "
        f"are better: read some of them, and if they are not better, {fix}"
    )


def _members_part(first: EvalPoint, last: EvalPoint) -> str | None:
    """The members of an ensemble disagree far more than at the start: the answers are of a kind that the reward models
    know nothing about, and what they score there is chance (Coste et al. 2023, arXiv:2310.02743)."""
    if (
        first.spread is None
        or last.spread is None
        or last.spread <= max(SPREAD_RATIO, _by_chance(first, last)) * first.spread
    ):
        return None
    return (
        f"the members of the reward disagree more, {change(first.spread, last.spread, '.2f')} (steps {first.step} → "
        f"{last.step}): the answers have moved away from what the reward models have learned to score, a sign of "
        "reward hacking; set reward_combine: min, raise kl_coefficient, or train for fewer steps"
    )


def _by_chance(first: SampledPoint, last: SampledPoint) -> float:
    """The ratio of two means that chance alone may give, where values vary by as much as their mean."""
    return exp(SURE_ERRORS * sqrt(1 / first.answers + 1 / last.answers))


def _answers_repeat(first: EvalPoint, last: EvalPoint) -> str | None:
    if last.repeated - first.repeated <= REPEATED_RISE and last.distinct >= DISTINCT_RATIO * first.distinct:
        return None
    return (
        f"answers repeat themselves: {change(first.repeated, last.repeated, '.0%')} of their lines are repetitions, "
        f"distinct-2 {change(first.distinct, last.distinct, '.2f')} (steps {first.step} → {last.step}); raise "
        "kl_coefficient, or train a reward model on pairs in which such answers are rejected"
    )


def _answers_never_end(first: EvalPoint, last: EvalPoint) -> str | None:
    fix = "penalise answers that do not end, or raise kl_coefficient"
    return f"{found}; {fix}" if (found := never_end(first, last)) else None


def with_sft(loss: str | Mapping[str, float]) -> str:
    """The override that adds the SFT loss to DPO's `loss`, or doubles its weight: `dpo.loss='{sigmoid: 1.0, sft: 0.1}'`
    and the like."""
    weights = {loss: 1.0} if isinstance(loss, str) else {**loss}
    weights["sft"] = 2 * weights["sft"] if "sft" in weights else SFT_WEIGHT
    return f"dpo.loss='{{{', '.join(f'{name}: {weight}' for name, weight in weights.items())}}}'"


def grew_long(first: SampledPoint, last: SampledPoint) -> str | None:
    """Says that answers grew by more than chance and a healthy policy explain; None if they didn't."""
    # If every token were equally likely to be the last, the mean length would vary by 1 / sqrt(answers) of itself.
    ratio = max(LENGTH_RATIO, _by_chance(first, last))
    if last.length <= ratio * first.length or last.length - first.length < LENGTH_TOKENS:
        return None
    return f"answers grew long, {change(first.length, last.length, '.0f')} tokens (steps {first.step} → {last.step})"


def never_end(first: SampledPoint, last: SampledPoint) -> str | None:
    """Says that answers no longer end; None if they do, or hardly did before."""
    sure = first.ended - last.ended > SURE_ERRORS * share_error(first, last, "ended")
    if first.ended <= ENDED_BEFORE or last.ended >= ENDED_RATIO * first.ended or not sure:
        return None
    return (
        f"answers no longer end by themselves: {change(first.ended, last.ended, '.0%')} did (steps {first.step} → "
        f"{last.step}, mean length {change(first.length, last.length, '.0f')} tokens)"
    )


def share_error(first: SampledPoint, last: SampledPoint, name: str) -> float:
    """The standard error of the difference of a share of answers, if both shares are truly equal."""
    one, other = getattr(first, name), getattr(last, name)
    pooled = (one * first.answers + other * last.answers) / (first.answers + last.answers)
    return sqrt(pooled * (1 - pooled) * (1 / first.answers + 1 / last.answers))


def _have_judge(points: Sequence[EvalPoint]) -> bool:
    return all(point.judge is not None for point in points)


def _judge(point: EvalPoint) -> float:
    if point.judge is None:
        raise ValueError(f"step {point.step}: has no judge")
    return point.judge


def _errors(before: EvalPoint, after: EvalPoint) -> float:
    """The judge's rise in standard errors of the difference of two independent means. One answer has no known error."""
    spreads = ((point.judge_std or 0.0, point.answers) for point in (before, after))
    variance = sum(std**2 / (answers - 1) if answers > 1 else inf for std, answers in spreads)
    rise = _judge(after) - _judge(before)
    if variance == 0:
        return inf if rise > 0 else -inf if rise < 0 else 0.0
    return rise / sqrt(variance)


def _sentences(text: str) -> list[str]:
    """The sentences of all lines, normalised; those without a letter or digit (a rule, a bracket in code) left out."""
    lines = (_LIST_MARKER.sub("", line.strip()) for line in text.splitlines())
    said = (" ".join(part.casefold().split()) for line in lines for part in _SENTENCE_END.split(line))
    return [part for part in said if any(character.isalnum() for character in part)]


def change(before: float, after: float, digits: str = ".4g") -> str:
    """`before → after`."""
    return f"{before:{digits}} → {after:{digits}}"
