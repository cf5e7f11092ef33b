"""Can this reward model be trusted? Figures, a warning and a picture, from its scores of held-out pairs.

A reward model can look good for the wrong reason: raters often prefer the longer answer (Singhal et al. 2023,
arXiv:2310.03716; Dubois et al. 2024, arXiv:2404.04475), so a judge that only compares lengths may be as accurate. The
report therefore compares the model's accuracy with that of such a length judge, and with a coin's.

A pick counts 1 if right, 0 if wrong, and one half if there is nothing to choose by: equal scores or lengths, or raters
who call it a tie.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, pi, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qalign.reports.plots import BLUE, GREY, ORANGE, counted, label, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COIN = 0.5
BY_CHANCE = 0.05  # a lead is not shown if chance alone gives one as large more often than this
MARGIN_BUCKETS = 4
CALIBRATION_BINS = 5
QUANTILES = 21
DISPUTED = 5
Figures = dict[str, Any]  # what `measure` returns


@dataclass(frozen=True)
class ScoredPair:
    """A held-out pair with the model's scores."""

    chosen: float  # the score of the answer that the raters preferred
    rejected: float
    chosen_tokens: int  # the answer's length
    rejected_tokens: int
    margin: float | None  # difference of the raters' scores, chosen minus rejected; None if unknown
    chosen_probability: float = 1.0  # that the chosen answer is the better one, by the raters


def measure(pairs: list[ScoredPair]) -> Figures:
    """All figures, ready for JSON. Every `interval` is Wilson's at 95%, `[low, high]`.

    Returns:
        `pairs`: their number. `accuracy`, `accuracy_interval`: share of pairs whose chosen answer scores higher.
        `length_accuracy`, `short_accuracy`: of a judge that always picks the longer, or the shorter answer.
        `length_judge`: the better of the two, `{"picks": "longer" or "shorter", "accuracy"}`, with `length_interval`.
        `discordant`: number of pairs on which one of the two does better, `{"model", "length_judge"}`.
        `beats_length_judge_p`: p-value of the sign test on these pairs (a little too large: the length judge's side
        was chosen on the same pairs). `agreement_with_length_judge`: share of pairs with the same pick.
        `accuracy_where_length_misleads`: `{"pairs", "accuracy", "interval"}` where that judge is wrong; None if never.
        `by_margin`: buckets `{"from", "to", "pairs", "accuracy", "interval"}` of the absolute margin. `margin_source`:
        "raters" if they gave one for every pair, else "model" (its own score difference).
        `calibration`: bins `{"predicted", "observed", "pairs", "interval"}`: the model's probability that its pick is
        right (Bradley-Terry: sigmoid of the score difference), and how often it is right by the raters' probabilities.
        `calibration_error`: expected calibration error (Guo et al. 2017, arXiv:1706.04599, eq. 3).
        `calibration_error_by_chance`: about the error of a perfectly calibrated model on as many pairs.
        `mean_log_loss`: cross entropy in nats; a coin's is ln 2. `score_mean`, `score_std` (divided by n): of all
        answers. `score_quantiles`: 21 of all answers' scores, from the least to the greatest, one for every 5%.
        `length_correlation`: Spearman's, of score and length over all answers; None if either never varies.

    Raises:
        ValueError: a score or margin is not finite.
    """
    _check(pairs)
    scores = np.array([(pair.chosen, pair.rejected) for pair in pairs], dtype=np.float64)  # (pairs, 2), as are tokens
    tokens = np.array([(pair.chosen_tokens, pair.rejected_tokens) for pair in pairs], dtype=np.float64)
    better = np.array([pair.chosen_probability for pair in pairs])
    gap, longer, lean = scores[:, 0] - scores[:, 1], tokens[:, 0] - tokens[:, 1], 2 * better - 1
    model = _points(gap * lean)
    return {
        "pairs": len(pairs),
        "accuracy": model.mean().item(),
        "accuracy_interval": wilson(model.mean().item(), len(pairs)),
        **_beside_length_judge(model, _points(longer * lean), _points(gap * longer)),
        **_by_margin([pair.margin for pair in pairs], gap, model),
        **_calibration(np.abs(gap), (1 + np.sign(gap) * lean) / 2),
        "mean_log_loss": (better * np.logaddexp(0, -gap) + (1 - better) * np.logaddexp(0, gap)).mean().item(),
        "length_correlation": spearman(scores.ravel(), tokens.ravel()),
        "score_mean": scores.mean().item(),
        "score_std": scores.std().item(),
        "score_quantiles": np.quantile(scores, np.linspace(0, 1, QUANTILES)).tolist(),
    }


def members(gaps: list[list[float]], where: list[str], pairs: Sequence[ScoredPair] = ()) -> Figures:
    """Where the members of an ensemble disagree, from their score differences `(pairs, members)`, chosen minus
    rejected, and where the pairs come from; of `pairs` the probabilities are read.

    Returns:
        `accuracy`: of each member alone. `disagreement`: share of pairs on which members pick different answers.
        `spread`: mean standard deviation of the members' score differences. `by_agreement`: groups of pairs by the
        number of members that agree with the majority, `{"agree", "pairs", "accuracy", "interval"}`, where the accuracy
        is that of the mean score. `most_disputed`: up to 5 pairs with the largest spread, `{"where", "gaps"}`.
    """
    found = np.array(gaps, dtype=np.float64)
    lean = np.array([2 * pair.chosen_probability - 1 for pair in pairs] or np.ones(len(found)))
    points, mean, spread = _points(found.T * lean).T, _points(found.mean(axis=1) * lean), found.std(axis=1)
    agree = np.maximum((found > 0).sum(axis=1), (found < 0).sum(axis=1))
    disputed = np.argsort(-spread, kind="stable")[:DISPUTED]
    return {
        "accuracy": points.mean(axis=0).tolist(),
        "disagreement": (np.ptp(np.sign(found), axis=1) > 0).mean().item(),
        "spread": spread.mean().item(),
        "by_agreement": [{"agree": int(n), **_group(mean[agree == n])} for n in np.unique(agree)],
        "most_disputed": [{"where": where[row], "gaps": found[row].tolist()} for row in disputed],
    }


def members_in_words(figures: Figures) -> dict[str, str]:
    """Lines for a table, from what `members` returns."""
    alone = ", ".join(f"{share:.1%}" for share in figures["accuracy"])
    groups = (f"{g['accuracy']:.1%} where {g['agree']} agree ({g['pairs']})" for g in figures["by_agreement"])
    disputed = ", ".join(f"{pair['where']}" for pair in figures["most_disputed"][:3])
    return {
        "members": f"{alone} alone; they disagree on {figures['disagreement']:.1%} of the pairs",
        "their mean": ", ".join(groups),
        "most disputed": disputed,
    }


def warning(figures: Figures) -> str | None:
    """One line if the lead over a coin or over the length judge may be chance (`figures` from `measure`), else None.

    A coin is beaten if the whole interval of the accuracy lies above one half. The length judge is tested only on the
    pairs on which the two differ: this shows leads that a comparison of two intervals would miss.
    """
    accuracy, (low, high), judge = figures["accuracy"], figures["accuracy_interval"], figures["length_judge"]
    p_value, better = figures["beats_length_judge_p"], figures["discordant"]
    coin, length = low <= COIN, p_value > BY_CHANCE or accuracy <= judge["accuracy"]
    if not (coin or length):
        return None
    rival = judge["accuracy"] if length else COIN  # the length judge is never worse than a coin
    rivals = " or ".join(["a coin"] * coin + ["the length judge"] * length)
    beats = "hardly beats" if accuracy > rival else "does not beat"
    fix = "train on more or more varied pairs, on pairs of similar length, or for longer"
    if high < COIN:
        fix = "check that chosen and rejected are not swapped"
    elif sign_test(better["length_judge"], better["model"]) > BY_CHANCE:  # the length judge's lead isn't shown either
        fix += "; more held-out pairs would tell a small lead from chance"
    return (
        f"the reward model {beats} {rivals}: right on {accuracy:.1%} of "
        f"{counted(figures['pairs'], 'held-out pair')} (95% interval {low:.1%} to {high:.1%}), always picking the "
        f"{judge['picks']} answer on {judge['accuracy']:.1%} (p = {p_value:.2g}), a coin on {COIN:.0%}; {fix}"
    )


def draw(pairs: list[ScoredPair], figures: Figures, file: Path) -> None:
    """Writes the report as a PNG of 1200 x 900 pixels; `figures` are those that `measure` returns for these pairs."""
    low, high = figures["accuracy_interval"]
    title = f"Reward model: right on {figures['accuracy']:.1%} of {counted(figures['pairs'], 'held-out pair')}"
    with picture(file, (12, 9), pad=0.15) as figure:
        figure.suptitle(f"{title} (95% interval {low:.1%} to {high:.1%})", fontsize=16)
        (judges, margins), (calibration, lengths) = figure.subplots(2, 2)
        _draw_judges(judges, figures)
        _draw_margins(margins, figures)
        _draw_calibration(calibration, figures)
        _draw_lengths(lengths, pairs, figures)


def wilson(share: float, count: int) -> list[float]:
    """95% score interval `[low, high]` of a share of `count` (Wilson 1927), sound for few pairs and near 0 and 1.

    Its ends solve (p - share)² = z² p (1 - p) / count. SciPy has it for whole successes only; here a half point counts
    as half a success, which makes the interval a little too wide, never too narrow.
    """
    from scipy.stats import norm  # here, as in the next two functions: SciPy takes half a second to import

    ratio = float(norm.ppf(0.975)) ** 2 / count
    low, high = sorted(np.roots([1 + ratio, -2 * share - ratio, share**2]).tolist())
    return [max(0.0, min(low, share)), min(1.0, max(high, share))]  # rounding may step over 0, 1 or the share


def sign_test(wins: int, losses: int) -> float:
    """P-value of at least this many wins if each were a fair coin's: McNemar's exact test, one-sided (McNemar 1947)."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses, alternative="greater").pvalue) if wins or losses else 1.0


def spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    """Rank correlation of two `(values,)`, ties sharing their mean rank; None if either never varies."""
    from scipy.stats import spearmanr

    if not (np.ptp(first) and np.ptp(second)):
        return None
    return float(spearmanr(first, second).statistic)  # pyright: ignore[reportAttributeAccessIssue]: SciPy has no types


def quantile_groups(values: np.ndarray, count: int) -> list[np.ndarray]:
    """Row numbers of at most `count` groups, ascending and about equally large; equal values stay together."""
    order = np.argsort(values, kind="stable")
    cuts = np.flatnonzero(np.diff(values[order])) + 1
    if len(cuts):
        wanted = len(values) * np.arange(1, count) / count
        cuts = np.unique(cuts[np.abs(cuts[:, None] - wanted).argmin(axis=0)])
    return np.split(order, cuts)


def _check(pairs: list[ScoredPair]) -> None:
    for number, pair in enumerate(pairs, 1):
        for name, value in vars(pair).items():
            if value is not None and not isfinite(value):
                where = f"pair {number} of {len(pairs)}"
                raise ValueError(f"{where}: {name} is {value}, expected a finite number; has the training diverged?")


def _points(lead: np.ndarray) -> np.ndarray:
    return (1 + np.sign(lead)) / 2


def _group(points: np.ndarray) -> Figures:
    accuracy = points.mean().item()
    return {"pairs": len(points), "accuracy": accuracy, "interval": wilson(accuracy, len(points))}


def _beside_length_judge(model: np.ndarray, longer: np.ndarray, model_is_longer: np.ndarray) -> Figures:
    """Compares the model's points with those of always picking the longer answer, or the shorter if that is better;
    `model_is_longer` is 1 where the model picks the longer one."""
    picks, judge, agrees = "longer", longer, model_is_longer
    if longer.mean() < COIN:
        picks, judge, agrees = "shorter", 1 - longer, 1 - model_is_longer
    ahead, behind = int((model > judge).sum()), int((model < judge).sum())
    misled = model[judge == 0]
    return {
        "length_accuracy": longer.mean().item(),
        "short_accuracy": 1 - longer.mean().item(),
        "length_judge": {"picks": picks, "accuracy": judge.mean().item()},
        "length_interval": wilson(judge.mean().item(), len(judge)),
        "discordant": {"model": ahead, "length_judge": behind},
        "beats_length_judge_p": sign_test(ahead, behind),
        "agreement_with_length_judge": agrees.mean().item(),
        "accuracy_where_length_misleads": _group(misled) if len(misled) else None,
    }


def _by_margin(raters: Sequence[float | None], gap: np.ndarray, model: np.ndarray) -> Figures:
    known = [margin for margin in raters if margin is not None]
    from_raters = len(known) == len(raters)
    margins = np.abs(np.round(known, 6) if from_raters else gap)  # rounded, so that 0.3 and 4.5 - 4.2 are one margin
    buckets = [
        {"from": margins[rows].min().item(), "to": margins[rows].max().item(), **_group(model[rows])}
        for rows in quantile_groups(margins, MARGIN_BUCKETS)
    ]
    return {"margin_source": "raters" if from_raters else "model", "by_margin": buckets}


def _calibration(gap: np.ndarray, model: np.ndarray) -> Figures:
    """Expected calibration error of the model's picks; `gap` is the absolute score difference."""
    sure = 1 / (1 + np.exp(-gap))
    bins, error, by_chance = [], 0.0, 0.0
    for rows in quantile_groups(gap, CALIBRATION_BINS):
        predicted, right = sure[rows].mean().item(), _group(model[rows])
        bins.append({"predicted": predicted, "observed": right.pop("accuracy"), **right})
        error += len(rows) / len(gap) * abs(bins[-1]["observed"] - predicted)
        # The mean of |N(0, s)| is s sqrt(2 / pi), and a sum of independent picks is nearly normal.
        by_chance += sqrt(2 / pi * (sure[rows] * (1 - sure[rows])).sum()) / len(gap)
    return {"calibration": bins, "calibration_error": error, "calibration_error_by_chance": by_chance}


def _draw_judges(axes: "Axes", figures: Figures) -> None:
    judge, misled = figures["length_judge"], figures["accuracy_where_length_misleads"]
    shares = [figures["accuracy"], judge["accuracy"], COIN]
    intervals = [figures["accuracy_interval"], figures["length_interval"], [COIN, COIN]]
    axes.bar(range(3), shares, width=0.6, color=[BLUE, ORANGE, GREY])
    axes.vlines(range(2), *zip(*intervals[:2], strict=True), color="black", linewidth=2)
    if alone := figures.get("members", {}).get("accuracy"):
        axes.plot(np.linspace(-0.2, 0.2, len(alone)), alone, "o", color="white", mec="black", markersize=6)
    for x, (share, (_, high)) in enumerate(zip(shares, intervals, strict=True)):
        axes.text(x, high + 0.02, f"{share:.1%}", ha="center", va="bottom", fontsize=12)
    axes.set_xticks(range(3), ["this model", f"picks the\n{judge['picks']} answer", "a coin"], fontsize=11)
    axes.set_ylim(0, 1.12)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter("{x:.0%}")
    if alone:
        disagree = figures["members"]["disagreement"]
        axes.text(0, 0.03, f"points: {len(alone)} members\nthey disagree on\n{disagree:.1%}", ha="center", fontsize=10)
    note = (
        misled and f"where length misleads, this model: {misled['accuracy']:.1%} of {counted(misled['pairs'], 'pair')}"
    )
    label(axes, "Beside simpler judges", note or "", "picks that are right")


def _draw_margins(axes: "Axes", figures: Figures) -> None:
    buckets = figures["by_margin"]
    _draw_shares(axes, range(len(buckets)), "accuracy", buckets)
    axes.axhline(COIN, color=GREY, linestyle="--")
    by, digits = {"raters": ("raters'", ".3g"), "model": ("model's", ".2g")}[figures["margin_source"]]
    ends = ["–".join(dict.fromkeys(f"{bucket[end]:{digits}}" for end in ("from", "to"))) for bucket in buckets]
    counts = [counted(bucket["pairs"], "pair") for bucket in buckets]
    axes.set_xticks(range(len(buckets)), [f"{end}\n{count}" for end, count in zip(ends, counts, strict=True)])
    axes.set_xlim(-0.5, len(buckets) - 0.5)
    label(axes, "Hard and easy pairs", f"how far apart the {by} scores are", "picks that are right")


def _draw_calibration(axes: "Axes", figures: Figures) -> None:
    bins = figures["calibration"]
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--")
    _draw_shares(axes, [group["predicted"] for group in bins], "observed", bins)
    axes.set_xlim(0.48, 1.02)
    axes.xaxis.set_major_formatter("{x:.0%}")
    error, by_chance = figures["calibration_error"], figures["calibration_error_by_chance"]
    title = f"As right as it is sure? Off by {error:.1%} (chance alone: {by_chance:.1%})"
    label(axes, title, "how sure the model is of its pick", "picks that are right")


def _draw_lengths(axes: "Axes", pairs: list[ScoredPair], figures: Figures) -> None:
    # Chosen and rejected alternate, so that neither hides the other.
    tokens = [length for pair in pairs for length in (pair.chosen_tokens, pair.rejected_tokens)]
    scores = [score for pair in pairs for score in (pair.chosen, pair.rejected)]
    axes.scatter(tokens, scores, s=18, alpha=0.6, linewidths=0, color=[BLUE, ORANGE] * len(pairs))
    for name, colour in (("chosen", BLUE), ("rejected", ORANGE)):
        axes.scatter([], [], s=40, color=colour, label=name)
    rho = figures["length_correlation"]
    title = f"Score against length: rank correlation {'undefined' if rho is None else f'{rho:+.2f}'}"
    label(axes, title, "answer's length (tokens)", "score")
    axes.legend(fontsize=11, loc="lower right" if rho and rho > 0 else "upper right")  # the corner with fewest points


def _draw_shares(axes: "Axes", x: Sequence[float], share: str, groups: list[Figures]) -> None:
    """Dots with their intervals, on an axis from one half to 1, or from lower if the data need it."""
    lows, highs = zip(*(group["interval"] for group in groups), strict=True)
    axes.vlines(x, lows, highs, color=BLUE, linewidth=1.5)
    axes.plot(x, [group[share] for group in groups], "o", color=BLUE, markersize=8)
    axes.set_ylim(min(0.45, *lows) - 0.03, 1.03)
    axes.yaxis.set_major_formatter("{x:.0%}")
