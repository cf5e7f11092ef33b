"""Does a policy that learns from given answers still answer well itself? Figures of a run, alarms, and the picture.

The loss of DPO or KTO looks at given answers alone. It can fall while the policy becomes less likely to say any of them
(likelihood displacement: Razin et al. 2024, arXiv:2410.08847), only learns that longer is better (Park et al. 2024,
arXiv:2403.19159), or loses the end of its answers. So held-out answers are sampled, and measured beside held-out pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qalign.reports.alarms import (
    REPEATED_RISE,
    SURE_ERRORS,
    SampledPoint,
    change,
    grew_long,
    never_end,
    share_error,
    with_sft,
)
from qalign.reports.plots import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    counted,
    curve,
    label,
    mark_steps,
    picture,
    shares,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Nats per token by which the chosen answers may become less likely. Each of their tokens then has 0.61 times the
# probability it had, and an answer of 40 tokens a part in half a billion. Healthy runs stay far below
# (docs/dpo_report.md has the runs that were measured).
CHOSEN_FALL = 0.5
PREFIX, STEPS = "eval_samples_", "optimiser steps"
# The names of a point's figures in metrics.jsonl, TRL's where it has one; transformers writes `eval_NAME_` before the
# figures of one evaluation set among several.
NAMES = {
    "kl_nats": "kl", "length": "completions/mean_length", "length_low": "completions/length_p10",
    "length_high": "completions/length_p90", "ended": "completions/ended", "looping": "completions/looping",
    "distinct": "completions/distinct", "repeated": "completions/repeated", "answers": "completions/count",
    "rows": "rows", "chosen_tokens": "chosen_tokens", "chosen_logps": "logps/chosen",
    "rejected_logps": "logps/rejected", "accuracy": "rewards/accuracies", "margin": "rewards/margins",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PreferencePoint(SampledPoint):
    """The figures of one evaluation of a run that learns from given answers."""

    looping: float  # share of answers that say the same again and again (`answers.Answer.loops`)
    length_low: float  # the 10th and the 90th percentile of the lengths, in tokens
    length_high: float
    rows: int  # held-out rows that the figures below are means over
    chosen_tokens: float  # mean length of their chosen answers
    chosen_logps: float  # log-probs summed over an answer's tokens, in nats
    rejected_logps: float | None
    accuracy: float | None  # share of pairs with a positive margin; None where rows are no pairs
    margin: float | None  # mean implicit reward, chosen minus rejected

    may_be_none: ClassVar[tuple[str, ...]] = ("kl_nats", "rejected_logps", "accuracy", "margin")


def as_metrics(point: PreferencePoint) -> dict[str, float]:
    """A point's figures by their names in metrics.jsonl, without the step."""
    return {PREFIX + NAMES[name]: value for name, value in asdict(point).items() if name in NAMES and value is not None}


def point_of(line: dict[str, Any]) -> PreferencePoint:
    """The point that a line of metrics.jsonl has."""
    figures: dict[str, Any] = {name: line.get(PREFIX + key) for name, key in NAMES.items()}
    return PreferencePoint(step=line["step"], **figures)


def alarms(points: Sequence[PreferencePoint], stage: str, losses: Mapping[str, float] | None = None) -> list[str]:
    """Warnings about the last point, one sentence each, with what to set; empty if all is well. The first point is from
    before training. `losses`: the weights of DPO's losses by name; None in other stages."""
    if len(points) < 2:
        return []
    first, last = points[0], points[-1]
    held = f"raise {stage}.beta, halve {stage}.learning_rate or train for fewer steps"
    sft = f"set {with_sft(losses)}, " if losses else ""
    shorter = "dpo.loss=sigmoid_norm or " if losses else ""
    found = (
        (_chosen_fell(first, last), f"{sft}{held}"),
        (
            _longer_than_chosen(first, last),
            f"read some (samples/); if they are no better, {shorter}a larger {stage}.beta",
        ),
        (_loop(first, last), f"{sft}{held}"),
        (never_end(first, last), f"{sft}{held}; are the ends of long answers cut in the data?"),
    )
    return [f"{sentence}: {fix}" for sentence, fix in found if sentence]


def _chosen_fell(first: PreferencePoint, last: PreferencePoint) -> str | None:
    fell = first.chosen_logps - last.chosen_logps
    if fell <= CHOSEN_FALL * first.chosen_tokens:
        return None
    rejected = ""
    if first.rejected_logps is not None and last.rejected_logps is not None:
        rejected = f", those of rejected answers by {first.rejected_logps - last.rejected_logps:.0f}"
    return (
        f"log-probs of chosen answers fell by {fell:.0f} nats, {change(first.chosen_logps, last.chosen_logps, '.0f')} "
        f"({fell / first.chosen_tokens:.2f} a token, steps {first.step} → {last.step}{rejected}): the policy is losing "
        "what makes them good"
    )


def _longer_than_chosen(first: PreferencePoint, last: PreferencePoint) -> str | None:
    """Answers that grow to the length of the chosen ones learn what the data shows."""
    if last.length <= last.chosen_tokens or not (grew := grew_long(first, last)):
        return None
    return f"{grew}, and the chosen answers of the data have {last.chosen_tokens:.0f}"


def _loop(first: PreferencePoint, last: PreferencePoint) -> str | None:
    rise = last.looping - first.looping
    if rise <= max(REPEATED_RISE, SURE_ERRORS * share_error(first, last, "looping")):
        return None
    now, before = (round(point.looping * point.answers) for point in (last, first))
    return f"{now} of {last.answers} answers loop ({before} before training, steps {first.step} → {last.step})"


# --- the picture -----------------------------------------------------------------------------------------------------


def draw(points: Sequence[PreferencePoint], file: Path, stage: str, *, alarm_steps: Sequence[int] = ()) -> None:
    """Writes the report as a PNG of 1500 x 900 pixels."""
    first, last = points[0], points[-1]
    with picture(file, (15, 9), pad=0.12) as figure:
        parts = (
            [] if last.accuracy is None else [f"right on {last.accuracy:.0%} of {counted(last.rows, 'held-out pair')}"]
        )
        parts += [f"answers {change(first.length, last.length, '.0f')} tokens"]
        parts += [] if last.kl_nats is None else [f"KL {last.kl_nats:.1f} nats"]
        figure.suptitle(f"{stage.upper()}, {counted(last.step, 'step')}: {', '.join(parts)}", fontsize=16)
        panels = (_draw_accuracy, _draw_margin, _draw_logps, _draw_kl, _draw_lengths, _draw_shares)
        for axes, (draw_panel, note) in zip(figure.subplots(2, 3).flat, zip(panels, NOTES, strict=True), strict=True):
            mark_steps(axes, alarm_steps)
            draw_panel(axes, points)
            axes.text(0.5, -0.19, note, transform=axes.transAxes, ha="center", va="top", fontsize=9.5, color="#404040")
        if alarm_steps:
            (line,) = figure.axes[-1].plot([], [], ":", color=RED)
            figure.legend([line], ["alarm"], loc="outside lower center", fontsize=11, frameon=False)


# How to read each panel, in one or two short lines.
NOTES = (
    "Share of held-out pairs whose chosen answer has the\nhigher implicit reward. Bars: 95% intervals.",
    "It should rise. Where chosen log-probs fall as it does,\nthe policy only learns what not to say.",
    "Both may fall a little. Chosen below the red line: the policy\nis losing what makes those answers good.",
    "log π(y|x) − log π_ref(y|x), mean over sampled answers.\nA steep rise calls for a larger beta.",
    "Band: from the 10th to the 90th percentile. Longer than the\nchosen answers: read some of them (samples/).",
    "Loops: the same is said again and again.\nBars: 95% intervals.",
)


def _draw_accuracy(axes: "Axes", points: Sequence[PreferencePoint]) -> None:
    label(axes, "Preferred on held-out pairs", STEPS, "share of pairs")
    if _known(axes, points, "accuracy", "these rows are no pairs"):
        # Before training every margin is 0, which counts half.
        shares(axes, points, {"accuracy": ("pairs that are right", BLUE)}, count="rows")
        axes.axhline(0.5, color=GREY, linewidth=1, zorder=0)


def _draw_margin(axes: "Axes", points: Sequence[PreferencePoint]) -> None:
    label(axes, "Margin on held-out pairs", STEPS, "implicit reward, chosen − rejected")
    if _known(axes, points, "margin", "these rows are no pairs"):
        curve(axes, points, "margin", BLUE)
        axes.axhline(0, color=GREY, linewidth=1, zorder=0)


def _draw_logps(axes: "Axes", points: Sequence[PreferencePoint]) -> None:
    """The changes since the first point, in nats per token of the chosen answers, so that the alarm is one line."""
    first, steps = points[0], [point.step for point in points]
    for name, words, colour in (("chosen_logps", "chosen", BLUE), ("rejected_logps", "rejected", ORANGE)):
        if (start := getattr(first, name)) is not None:
            moved = [(getattr(point, name) - start) / first.chosen_tokens for point in points]
            axes.plot(steps, moved, marker="o", color=colour, label=words)
    axes.axhline(-CHOSEN_FALL, color=RED, linestyle="--", linewidth=1)
    axes.axhline(0, color=GREY, linewidth=1, zorder=0)
    axes.locator_params(axis="x", integer=True)
    axes.legend(fontsize=10)
    label(axes, "Log-probs of given answers", STEPS, "change since the start\n(nats a token)")


def _draw_kl(axes: "Axes", points: Sequence[PreferencePoint]) -> None:
    label(axes, "Distance from the reference", STEPS, "KL (nats an answer)")
    if _known(axes, points, "kl_nats", "this loss has no reference"):
        curve(axes, points, "kl_nats", BLUE)
        axes.axhline(0, color=GREY, linewidth=1, zorder=0)


def _draw_lengths(axes: "Axes", points: Sequence[PreferencePoint]) -> None:
    low, high = ([getattr(point, name) for point in points] for name in ("length_low", "length_high"))
    axes.fill_between([point.step for point in points], low, high, color=BLUE, alpha=0.15, linewidth=0)
    curve(axes, points, "length", BLUE, label="sampled, mean")
    axes.axhline(points[-1].chosen_tokens, color=GREEN, linestyle="--", label="chosen answers of the data")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=10)
    label(axes, "Length of sampled answers", STEPS, "tokens")


def _draw_shares(axes: "Axes", points: Sequence[PreferencePoint]) -> None:
    shares(
        axes, points, {"ended": ("answers that end", BLUE), "looping": ("answers that loop", PURPLE)}, count="answers"
    )
    label(axes, "Do sampled answers end, do they loop?", STEPS, "share")


def _known(axes: "Axes", points: Sequence[PreferencePoint], name: str, why_not: str) -> bool:
    """Whether the points have this figure; otherwise the panel says why not."""
    if getattr(points[0], name) is not None:
        return True
    axes.text(0.5, 0.5, why_not, transform=axes.transAxes, ha="center", va="center", fontsize=12, color="#404040")
    axes.set_xticks([])
    axes.set_yticks([])
    return False
