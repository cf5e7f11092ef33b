"""Is PPO gaming its reward? Figures of held-out answers over the run, alarms in words, and the look to keep.

A policy may raise the reward that it trains on (the proxy) while its answers get worse: the proxy keeps rising with
the distance from the reference, and what it stands for peaks and falls (Gao et al. 2023, arXiv:2210.10760). So a judge
that PPO never trains on scores the same answers; beside it stand what a gamed reward often buys: longer answers
(Singhal et al. 2023, arXiv:2310.03716), answers that say one thing again and again, and answers that never end.

A mean over few answers moves by luck. What counts as a fall or a rise is measured in standard errors of the difference
of two looks, as if their answers were independent. The prompts are the same, so it is a little less: the alarms are
slow rather than false.
"""

import re
from dataclasses import dataclass
from math import exp, inf, isfinite, log, sqrt

# Each of many looks may raise a false alarm. Where the proxy rises and the judge truly stays, so do of runs of 20 looks
# at patience 3 over four in five at one standard error, about one in four at two, 1 to 4% at three (a test holds this).
SURE_ERRORS = 3.0
RISE_ERRORS = 1.0  # less excuses longer answers: to ask for more would blame healthy runs on few prompts
LENGTH_RATIO = 2.0  # a policy that learns to say more may well grow by half
LENGTH_TOKENS = 16.0  # and from 5 tokens to 12 is no runaway
REPEATED_RISE = 0.2  # a fifth of all lines: a reader cannot miss it
DISTINCT_RATIO = 0.5  # of distinct-2 at the start; about half of the answers must loop for it
ENDED_RATIO = 0.5
ENDED_BEFORE = 0.5  # where fewer ended before training, max_new_tokens is too small to tell

_MARKER = re.compile(r"^(?:[-*+•–]|\d+[.)])\s+")  # of a list: "1. Rest." and "2. Rest." say the same
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])")


@dataclass(frozen=True)
class EvalPoint:
    """One evaluation of the held-out prompts; standard deviations are over answers, divided by n.

    Raises:
        ValueError: a figure is not finite, there are no answers, or only one of `judge` and `judge_std` is given.
    """

    step: int  # PPO iterations done; 0 is before training
    answers: int  # how many the means are over
    kl_nats: float  # mean of log pi(y|x) - log pi_ref(y|x), whole answers; an estimate, so it may fall below 0
    proxy: float  # mean reward that the policy trains on, before any KL
    proxy_std: float
    judge: float | None  # mean score of a judge that PPO never trains on; None if the recipe names none
    judge_std: float | None
    length: float  # mean, in tokens
    ended: float  # share of answers that end by themselves, not by the token limit
    distinct: float  # `distinct_n` with n = 2
    repeated: float  # `repeated_lines`
    entropy: float  # nats a token
    clipped: float  # share of clipped ratios in the updates since the last look; 0 at step 0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not (isfinite(value) if value is not None else name in ("judge", "judge_std")):
                fix = "has the training diverged?"
                raise ValueError(f"step {self.step}: {name} is {value}, not a finite number; {fix}")
        if self.answers < 1:
            raise ValueError(f"step {self.step}: answers is {self.answers}; a look needs at least one")
        if (self.judge is None) != (self.judge_std is None):
            raise ValueError(f"step {self.step}: give judge and judge_std both, or neither")


def distinct_n(texts: list[str], n: int = 2) -> float:
    """Distinct n-grams of words by all n-grams (Li et al. 2016, arXiv:1510.03055), in each text, then their mean.

    In each text, since it is to show an answer that loops: over all texts together it would fall as well when answers
    open alike, or when there are more of them. Words are what white space parts. Texts of fewer than n words are left
    out; 1.0 if none is left. Longer texts score a little lower by themselves.
    """
    shares = []
    for text in texts:
        words = text.split()
        grams = list(zip(*(words[start:] for start in range(n)), strict=False))
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else 1.0


def repeated_lines(texts: list[str]) -> float:
    """The share of a text's lines and sentences that it has said before, mean over the texts that say anything.

    Sentences, so that one line which says one sentence again and again counts. Case, white space and the marks of a
    list make no difference. A loop without full stops is `distinct_n`'s to see. 0.0 if no text says anything.
    """
    shares = [1 - len(set(said)) / len(said) for said in map(_sentences, texts) if said]
    return sum(shares) / len(shares) if shares else 0.0


def best_of_n_kl(n: int) -> float:
    """KL in nats of the best of n samples from their policy: log n - (n - 1) / n (Stiennon et al. 2020, app. G.3).

    An upper bound, tight where no answer is likely (Beirami et al. 2024, arXiv:2401.01879).

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"the best of {n} samples is none; n is at least 1")
    return log(n) - (n - 1) / n


def best_look(looks: list[EvalPoint]) -> EvalPoint:
    """The look with the highest judge, or the highest proxy unless every look has a judge; the earliest of equals.

    Raises:
        ValueError: there are no looks.
    """
    if not looks:
        raise ValueError("there are no looks to choose from; give at least one")
    return max(looks, key=(lambda look: look.judge) if _judged(looks) else lambda look: look.proxy)


def alarms(looks: list[EvalPoint], patience: int) -> list[str]:
    """Warnings about the last look, one sentence each; none if all is well.

    The first of `looks`, which are in order of their steps, is the one before training. An alarm sounds when

    - the judge falls while the proxy rises: at `patience` looks in a row it was lower than the look before, and the
      whole unbroken fall is over `SURE_ERRORS` standard errors; or `patience` looks in a row lie so far below the best
      look: a slow fall seldom falls at every look. The proxy is higher at the last look than where the fall began.
    - answers have grown to more than `LENGTH_RATIO` times their length, by at least `LENGTH_TOKENS` and, where they are
      few, by more than luck explains; and the judge has not risen by over `RISE_ERRORS` standard errors, or, where
      there is no judge, the proxy has risen.
    - answers repeat themselves: the share of repeated lines rose by more than `REPEATED_RISE`, or distinct-2 fell below
      `DISTINCT_RATIO` of what it was.
    - answers no longer end: where more than `ENDED_BEFORE` did, less than `ENDED_RATIO` of that share still do, and the
      difference is over `SURE_ERRORS` standard errors.

    Raises:
        ValueError: `patience` is below 1.
    """
    if patience < 1:
        raise ValueError(f"patience is {patience}; it counts looks, so it is at least 1")
    if len(looks) < 2:
        return []
    first, last = looks[0], looks[-1]
    said = [
        _judge_falls(looks, patience),
        _length_runs_away(first, last, _judged([first, last])),
        _answers_repeat(first, last),
        _answers_never_end(first, last),
    ]
    return [sentence for sentence in said if sentence]


def _judge_falls(looks: list[EvalPoint], patience: int) -> str | None:
    if not _judged(looks):
        return None
    last, top, falls = looks[-1], best_look(looks), 0
    while falls < len(looks) - 1 and looks[-falls - 1].judge < looks[-falls - 2].judge:
        falls += 1
    start = looks[-falls - 1]
    recent = looks[-patience:]
    if falls >= patience and _errors(start, last) < -SURE_ERRORS and last.proxy > start.proxy:
        peak, how = start, f"fell at {_count(falls, 'look')} in a row"
    # The best look cannot be among the recent ones: it is not below itself.
    elif all(_errors(top, look) < -SURE_ERRORS for look in recent) and last.proxy > top.proxy:
        peak, how = top, f"was below its best at {_count(patience, 'look')} in a row"
    else:
        return None
    return (
        f"the judge {how}, {_change(peak.judge, last.judge)} ({-_errors(peak, last):.1f} standard errors), while the "
        f"reward rose, {_change(peak.proxy, last.proxy)} (steps {peak.step} → {last.step}, KL "
        f"{_change(peak.kl_nats, last.kl_nats, '.1f')} nats): the policy is gaming its reward; keep step {top.step}, "
        "and raise ppo.kl_coefficient, train for fewer steps, or train a better reward model"
    )


def _length_runs_away(first: EvalPoint, last: EvalPoint, judged: bool) -> str | None:
    # Were each token equally likely to be the last, a mean length would vary by 1 / sqrt(answers) of itself.
    luck = exp(SURE_ERRORS * sqrt(1 / first.answers + 1 / last.answers))
    if last.length <= max(LENGTH_RATIO, luck) * first.length or last.length - first.length < LENGTH_TOKENS:
        return None
    tokens = _change(first.length, last.length, ".0f")
    longer = f"answers grew long, {tokens} tokens (steps {first.step} → {last.step}), "
    fix = "penalise length, raise ppo.kl_coefficient, or train the reward model on pairs of like length"
    if judged and _errors(first, last) <= RISE_ERRORS:
        found = "fell" if last.judge < first.judge else "hardly rose"
        return f"{longer}and the judge {found}, {_change(first.judge, last.judge)}: length is no gain here; {fix}"
    if not judged and last.proxy > first.proxy:
        return (
            f"{longer}while the reward rose, {_change(first.proxy, last.proxy)}, and there is no judge to say whether "
            f"they are better: read some, and if they are not, {fix}"
        )
    return None


def _answers_repeat(first: EvalPoint, last: EvalPoint) -> str | None:
    more, fewer = last.repeated - first.repeated > REPEATED_RISE, last.distinct < DISTINCT_RATIO * first.distinct
    if not (more or fewer):
        return None
    return (
        f"answers repeat themselves: {_change(first.repeated, last.repeated, '.0%')} of their lines were said before, "
        f"distinct-2 {_change(first.distinct, last.distinct, '.2f')} (steps {first.step} → {last.step}); raise "
        "ppo.kl_coefficient, or train a reward model that has seen such answers rejected"
    )


def _answers_never_end(first: EvalPoint, last: EvalPoint) -> str | None:
    fall = first.ended - last.ended
    pooled = (first.ended * first.answers + last.ended * last.answers) / (first.answers + last.answers)
    error = sqrt(pooled * (1 - pooled) * (1 / first.answers + 1 / last.answers))  # of two shares that are truly equal
    if first.ended <= ENDED_BEFORE or last.ended >= ENDED_RATIO * first.ended or fall <= SURE_ERRORS * error:
        return None
    return (
        f"answers no longer end by themselves: {_change(first.ended, last.ended, '.0%')} did (steps {first.step} → "
        f"{last.step}, mean length {_change(first.length, last.length, '.0f')} tokens); penalise answers that do not "
        "end, or raise ppo.kl_coefficient"
    )


def _judged(looks: list[EvalPoint]) -> bool:
    return all(look.judge is not None for look in looks)


def _errors(before: EvalPoint, after: EvalPoint) -> float:
    """By how many standard errors the judge rose: of the difference of two independent means. One answer tells none."""
    variance = sum(look.judge_std**2 / (look.answers - 1) if look.answers > 1 else inf for look in (before, after))
    rise = after.judge - before.judge
    if variance == 0:
        return inf if rise > 0 else -inf if rise < 0 else 0.0
    return rise / sqrt(variance)


def _sentences(text: str) -> list[str]:
    """The lines of a text and the sentences within them, less what makes no difference.

    What holds no letter or digit says nothing: a rule, a bracket in code.
    """
    lines = (_MARKER.sub("", line.strip()) for line in text.splitlines())
    said = (" ".join(part.casefold().split()) for line in lines for part in _SENTENCE_END.split(line))
    return [part for part in said if any(character.isalnum() for character in part)]


def _change(before: float, after: float, digits: str = ".4g") -> str:
    return f"{before:{digits}} → {after:{digits}}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
