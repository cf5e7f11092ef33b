"""Win rates from pairwise judgements: raw, length-controlled, with bootstrap intervals. NumPy alone.

A preference p in [0, 1] is the judge's probability that side A's answer is better than side B's; 0.5 is a tie. Lengths
are in characters, as in AlpacaEval.

Length control is the generalised linear model of Dubois et al. 2024, "Length-Controlled AlpacaEval"
(arXiv:2404.04475), without the difficulties of instructions, which exist for AlpacaEval's own prompts alone:

    P(A is better) = σ(θ + φ · tanh((length_A − length_B) / std(length_A − length_B)))

It is fitted with cross-entropy and an L1 penalty, whose strength is chosen by 5-fold cross-validation. The controlled
win rate is the prediction for answers of equal length, σ(θ): `length_controlled_minimal` of the package `alpaca_eval`.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qalign.judge.logistic import Floats, fit, sigmoid
from qalign.reports.reward_report import wilson

Interval = tuple[float, float]

FOLDS, STRENGTHS = 5, np.logspace(-4, 4, 10)  # C, the inverse of the penalty: the values that alpaca_eval tries
RESAMPLES, LEVEL = 1000, 0.95
REFITS = 200  # of the resamples, on which the model is fitted again, with the penalty of the whole
LENGTH_ALONE = 30.0  # φ of a judge that follows length with hardly an exception


@dataclass(frozen=True)
class WinRate:
    """How often side A wins. Rates are from 0 to 1, intervals hold 95%."""

    rate: float
    interval: Interval
    controlled: float | None  # the rate that answers of equal length would have; None with a single prompt
    controlled_interval: Interval | None  # None too where the penalty makes the rate 0.5, as with few prompts
    length_weight: float | None  # φ; above 0, the judge prefers longer answers
    wins: int
    ties: int
    losses: int
    prompts: int

    @property
    def follows_length(self) -> bool:
        """Whether length alone explains the judgements: what answers of equal length would get is then a guess."""
        return abs(self.length_weight or 0.0) > LENGTH_ALONE


def win_rate(
    preferences: ArrayLike,
    lengths_a: ArrayLike,
    lengths_b: ArrayLike,
    prompts: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> WinRate:
    """The win rate of side A, raw and length-controlled.

    Args:
        preferences: `(judgements,)`; NaN where the judge gave none, which is left out.
        lengths_a: lengths of A's answers in characters, `(judgements,)`; `lengths_b` those of B's.
        prompts: the name of each judgement's prompt. Judgements of one prompt are resampled, and held out, together. By
            default each has a prompt of its own.
        seed: of the resamples.

    Raises:
        ValueError: there is no judgement, or a preference lies outside [0, 1].
    """
    given = np.asarray(preferences, float)
    has = ~np.isnan(given)
    p, x = given[has], design(lengths_a, lengths_b)[has]
    if not (len(p) and p.min() >= 0 and p.max() <= 1):
        raise ValueError("expected at least one preference, each from 0 to 1")
    names = [name for name, is_given in zip(prompts or range(len(given)), has, strict=True) if is_given]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    prompt = np.array([numbers[name] for name in names])
    counts = np.random.default_rng(seed).multinomial(
        len(numbers), np.full(len(numbers), 1 / len(numbers)), size=RESAMPLES
    )
    rates = [weights @ p / weights.sum() for weights in (row[prompt] for row in counts)]
    alike, weight, constant, interval = _if_alike(p, len(numbers)), None, None, None
    if len(numbers) > 1:
        strength, (first, *_) = best_strength(x, p, prompt), _seeds(1)
        weight, constant = map(float, fit(x, p, np.ones_like(p), strength, first))
        constants = np.array([fit(x, p, row[prompt].astype(float), strength, first)[1] for row in counts[:REFITS]])
        interval = (alike or _interval(sigmoid(constants))) if constants.any() else None
    wins, losses = int((p > 0.5).sum()), int((p < 0.5).sum())
    return WinRate(
        rate=float(p.mean()),
        interval=alike or _interval(rates),
        controlled=None if constant is None else float(sigmoid(constant)),
        controlled_interval=interval,
        length_weight=weight,
        wins=wins,
        ties=len(p) - wins - losses,
        losses=losses,
        prompts=len(numbers),
    )


def _if_alike(p: Floats, prompts: int) -> Interval | None:
    """Wilson's interval where all preferences are the same, as all resamples are then; None where they differ."""
    low, high = wilson(float(p.mean()), prompts)
    return (low, high) if p.min() == p.max() else None


def design(lengths_a: ArrayLike, lengths_b: ArrayLike) -> Floats:
    """The model's inputs `(judgements, 2)`: tanh of the difference of lengths in standard deviations, and 1. (With one
    length everywhere, or one judgement, the first is 0.)"""
    apart = np.asarray(lengths_a, float) - np.asarray(lengths_b, float)
    spread = apart.std(ddof=1) if len(apart) > 1 else 0.0
    return np.stack([np.tanh(apart / spread) if spread else np.zeros_like(apart), np.ones_like(apart)], axis=1)


def best_strength(x: Floats, p: Floats, prompt: NDArray[np.int64]) -> float:
    """C of the lowest cross-entropy on held-out prompts, the smallest of equals. `prompt` `(judgements,)` counts from
    0; with one judgement a prompt, the folds are those of scikit-learn's `GroupKFold`."""
    folds = (prompt.max() - prompt) % FOLDS
    losses = []
    for strength, seed in zip(STRENGTHS, _seeds(len(STRENGTHS)), strict=True):
        of_folds = []
        for held_out in (folds == fold for fold in np.unique(folds)):
            fitted = fit(x, p, (~held_out).astype(float), strength, seed)
            predicted = np.clip(sigmoid(x[held_out] @ fitted), 1e-15, 1 - 1e-15)
            true = p[held_out]
            of_folds.append(-(true * np.log(predicted) + (1 - true) * np.log(1 - predicted)).mean())
        losses.append(np.mean(of_folds))
    return float(STRENGTHS[int(np.argmin(losses))])


def _seeds(count: int) -> list[int]:
    """Those that scikit-learn draws for LIBLINEAR from `alpaca_eval`'s `random_state`."""
    generator = np.random.RandomState(123)
    return [int(generator.randint(2**31 - 1)) for _ in range(count)]


def _interval(resampled: Sequence[float] | Floats) -> Interval:
    """The percentile interval of a figure's resamples."""
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
