"""One picture of a PPO run: what the policy gained, how far it went for it, and what became of its answers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import sqrt
from pathlib import Path

from qalign.reports.alarms import EvalPoint, best_look

# Okabe and Ito: told apart by colour-blind eyes too.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#8C8C8C"
SOLID, DASHED = ("-", 6), ("--", 3.5)  # line and marker size: a curve above another one lets it through
FAINTEST = 0.25  # opacity of the first look; the last is opaque
STEPS, PROXY, JUDGE = "PPO iterations", "reward trained on (proxy)", "held-out judge"


BEST_OF = "best_of/summary.json"  # in a recipe's output


@dataclass(frozen=True)
class BestOf:
    """The best by proxy of n answers of the reference, mean over prompts: what search alone gains at that KL."""

    n: int
    kl_nats: float  # `watch.best_of_n_kl`
    proxy: float
    judge: float | None


def draw(
    looks: Sequence[EvalPoint], file: str | Path, *, best_of: Sequence[BestOf] = (), alarm_steps: Sequence[int] = ()
) -> None:
    """Write the report as a PNG of 1500 x 900 pixels; the first look is the one before training.

    Raises:
        ValueError: there are no looks.
        OSError: the file can't be written.
    """
    # Imported here, not above: a run that draws nothing need not wait for it. No pyplot: it keeps global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 9), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    fill(figure, looks, best_of, alarm_steps)
    figure.savefig(file, format="png")


def redraw(output: Path) -> Path | None:
    """Draws the report of the PPO run in a recipe's output anew from its metrics, with best of n beside it if there is
    one. Returns the picture; None without a run, or one that looked at no held-out prompts."""
    run = output / "ppo"
    if not (run / "metrics.jsonl").is_file():
        return None
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "eval_proxy" in line]
    names = [field.name for field in fields(EvalPoint) if field.name != "step"]
    looks = [EvalPoint(step=line["step"], **{name: line[f"eval_{name}"] for name in names}) for line in lines]
    if not looks:
        return None
    picture = run / "ppo_report.png"
    draw(looks, picture, best_of=read_best_of(output), alarm_steps=[line["step"] for line in lines if line["alarms"]])
    return picture


def read_best_of(output: Path) -> list[BestOf]:
    """What `python -m qalign.best_of` found on the held-out prompts of a recipe; empty if it hasn't run."""
    file = output / BEST_OF
    held_out = json.loads(file.read_text(encoding="utf-8"))["held_out"] if file.is_file() else []
    return [BestOf(**point) for point in held_out]


def fill(figure, looks: Sequence[EvalPoint], best_of: Sequence[BestOf], alarm_steps: Sequence[int]) -> None:
    """Put the six panels on an empty matplotlib `Figure`; the rest is as `draw` takes it."""
    best = best_look(list(looks))
    figure.suptitle(_headline(looks, best), fontsize=16)
    (gains, rewards, kl), (length, shares, updates) = figure.subplots(2, 3)
    _draw_gains(gains, looks, best, best_of)
    for axes in (rewards, kl, length, shares, updates):
        axes.axvline(best.step, color=GREY, linestyle="--", linewidth=1)
        for step in alarm_steps:
            axes.axvline(step, color=RED, linestyle=":", linewidth=1.5)
    _draw_rewards(rewards, looks)
    _draw_curve(kl, looks, "kl_nats", BLUE)
    kl.axhline(0, color=GREY, linewidth=1, zorder=0)
    _label(kl, "Distance from the reference", STEPS, "KL (nats an answer)")
    _draw_curve(length, looks, "length", BLUE)
    length.set_ylim(bottom=0)
    _label(length, "Length of the answers", STEPS, "mean length (tokens)")
    _draw_shares(shares, looks)
    _draw_updates(updates, looks)
    _draw_common_legend(figure, gains, best, best_of, alarm_steps)


def above_start(values: Sequence[float], first: float, std: float) -> list[float]:
    """By how many standard deviations of the first look's answers each value lies above that look's mean.

    In the values' own units where those answers all scored alike.
    """
    return [(value - first) / (std or 1.0) for value in values]


def _headline(looks: Sequence[EvalPoint], best: EvalPoint) -> str:
    first, last = looks[0], looks[-1]
    said = [f"reward {_signed(first.proxy)} → {_signed(last.proxy)}"]
    if first.judge is not None and last.judge is not None:
        said.append(f"judge {_signed(first.judge)} → {_signed(last.judge)}")
    said += [f"KL {last.kl_nats:.1f} nats", f"best at step {best.step}"]
    return f"PPO, {last.step} iteration{'' if last.step == 1 else 's'}: " + ", ".join(said)


def _draw_gains(axes, looks: Sequence[EvalPoint], best: EvalPoint, best_of: Sequence[BestOf]) -> None:
    """The axes of Gao et al. 2023 (arXiv:2210.10760, fig. 1): both rewards against the root of the KL."""
    first = looks[0]
    for name, label, colour, marker, size in (("proxy", PROXY, BLUE, "o", 7), ("judge", JUDGE, ORANGE, "s", 5)):
        start, std = getattr(first, name), getattr(first, f"{name}_std")
        if start is None:
            continue
        gone, gained = _points(looks, name, start, std)
        axes.plot(gone, gained, color=colour, linewidth=1, alpha=0.5, zorder=2)
        fading = [1 - (1 - FAINTEST) * before / max(1, len(gone) - 1) for before in reversed(range(len(gone)))]
        axes.scatter(gone, gained, s=size**2, color=colour, marker=marker, alpha=fading, linewidths=0, zorder=3)
        axes.plot([], [], f"{marker}-", color=colour, label=label if std else f"{label}, in its own units")
        axes.plot(*_points([best], name, start, std), "*", color=colour, markersize=3 * size, mec="black", zorder=4)
        gone, gained = _points(best_of, name, start, std)
        axes.plot(gone, gained, "D--", color=colour, linewidth=1, markersize=size, markerfacecolor="white")
        for one, x, y in zip(best_of, gone, gained, strict=True) if name == "proxy" else ():
            axes.annotate(f"n={one.n}", (x, y), (0, 8), textcoords="offset points", ha="center", fontsize=9)
    reach = max(0.1, *(sqrt(max(0.0, at.kl_nats)) for at in (*looks, *best_of)))
    axes.set_xlim(-0.05 * reach, 1.05 * reach)
    axes.margins(y=0.12)
    axes.axhline(0, color=GREY, linewidth=1, zorder=0)
    axes.legend(fontsize=10)
    gain = "gain over the first look, in its\nstandard deviations over answers"
    _label(axes, "What the distance buys (darker is later)", "√KL from the reference (√nats)", gain)


def _points(
    group: Sequence[EvalPoint | BestOf], name: str, start: float, std: float
) -> tuple[list[float], list[float]]:
    """Roots of the KL, which noise may put below 0, and gains, of those that have such a score."""
    scored = [at for at in group if getattr(at, name) is not None]
    return [sqrt(max(0.0, at.kl_nats)) for at in scored], above_start([getattr(at, name) for at in scored], start, std)


def _draw_rewards(axes, looks: Sequence[EvalPoint]) -> None:
    _draw_curve(axes, looks, "proxy", BLUE)
    _label(axes, "Rewards as the models give them", STEPS, PROXY)
    judged = [look for look in looks if look.judge is not None]
    if judged:
        _draw_curve(_second_scale(axes, PROXY, JUDGE), judged, "judge", ORANGE, DASHED)


def _draw_shares(axes, looks: Sequence[EvalPoint]) -> None:
    _draw_curve(axes, looks, "ended", BLUE, label="answers that end")
    _draw_curve(axes, looks, "distinct", GREEN, DASHED, label="distinct-2")
    _draw_curve(axes, looks, "repeated", PURPLE, label="lines said before")
    axes.set_ylim(-0.03, 1.3)  # room for the legend, whatever the curves do
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(fontsize=10, loc="upper center", ncols=2)
    _label(axes, "Do answers end, and do they loop?", STEPS, "share")


def _draw_updates(axes, looks: Sequence[EvalPoint]) -> None:
    _draw_curve(axes, looks, "entropy", BLUE)
    axes.set_ylim(bottom=0)
    _label(axes, "Entropy and clipping", STEPS, "")
    other = _second_scale(axes, "entropy (nats a token)", "clipped ratios")
    updated = [look for look in looks if look.step]  # before the first update there is nothing to clip
    _draw_curve(other, updated, "clipped", ORANGE, DASHED)
    other.set_ylim(0, 1.1 * max([0.01, *(look.clipped for look in updated)]))
    other.yaxis.set_major_formatter("{x:.1%}")


def _draw_common_legend(figure, axes, best: EvalPoint, best_of: Sequence[BestOf], alarm_steps: Sequence[int]) -> None:
    (star,) = axes.plot([], [], "*--", color=GREY, markersize=14, mec="black", mfc="white")
    kinds = {f"best look, step {best.step}": star}
    if alarm_steps:
        (kinds["alarm"],) = axes.plot([], [], ":", color=RED)
    if best_of:
        (kinds["best of n answers of the reference"],) = axes.plot([], [], "D--", color=GREY, markerfacecolor="white")
    figure.legend(kinds.values(), kinds, loc="outside lower center", ncols=len(kinds), fontsize=11, frameon=False)


def _draw_curve(
    axes, looks: Sequence[EvalPoint], name: str, colour: str, style=SOLID, label: str | None = None
) -> None:
    steps, values = [look.step for look in looks], [getattr(look, name) for look in looks]
    line, size = style
    axes.plot(steps, values, marker="o", linestyle=line, color=colour, markersize=size, label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.ticklabel_format(axis="y", useOffset=False)
    if len(looks) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)


def _second_scale(axes, left: str, right: str):
    """Axes on the right; each scale's colour says whose it is."""
    other = axes.twinx()
    for side, label, colour in ((axes, left, BLUE), (other, right, ORANGE)):
        side.set_ylabel(label, fontsize=12, color=colour)
        side.tick_params(axis="y", colors=colour)
    other.spines[["top", "left"]].set_visible(False)
    return other


def _label(axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=13)
    axes.set_xlabel(x, fontsize=12)
    axes.set_ylabel(y, fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)


def _signed(value: float) -> str:
    return f"{value:+.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:+.2g}"
