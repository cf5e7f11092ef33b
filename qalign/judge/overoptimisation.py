"""Reward over-optimisation: the pairs of a proxy, and the scaling laws of Gao, Schulman and Hilton
2023 (arXiv:2210.10760), their fits and peaks.

A policy is optimised against a proxy, and a gold reward that it never sees says what that is worth. With
d = √KL(π ‖ π_init), the gold reward's gain over the initial policy follows

    best-of-n:  R(d) = d (α − β d)        RL:  R(d) = d (α − β log d)        (their equations 1 and 2)

α is what the first step buys; β is how fast the proxy loses touch with gold. Imports no torch.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import exp, inf, isfinite, log, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qalign.data.formats import Preference, Prompt
from qalign.errors import UserError
from qalign.reports.plots import BLUE, GREY, ORANGE, RED, counted, label, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Labelled = dict[str, Any]  # a pair as a row of a file
Method = Literal["best_of", "rl"]
METHODS: dict[Method, str] = {"best_of": "Best of n", "rl": "PPO without KL price"}  # in the picture's order


@dataclass(frozen=True)
class Law:
    """R(d) = d (α − β f(d)), where f(d) is d for best-of-n and log d for RL."""

    method: Method
    alpha: float
    beta: float
    r_squared: float
    """Share of the gains' variance that the law explains; below 0, their mean would explain more."""

    def gain(self, kl_nats: float) -> float:
        """The gold reward's gain at this distance."""
        d = distance(kl_nats)
        return self.alpha * d - self.beta * _bend(self.method, d)

    @property
    def facts(self) -> dict[str, float | None]:
        """For JSON, which has no infinity."""
        peak = self.peak_kl_nats
        return {"alpha": self.alpha, "beta": self.beta, "r_squared": self.r_squared,
                "peak_kl_nats": peak if isfinite(peak) else None}  # fmt: skip

    @property
    def peak_kl_nats(self) -> float:
        """The KL at which the gold reward is highest: d = α / 2β for best-of-n, d = exp(α / β − 1) for RL. Infinite if
        it never falls, 0 if it never rises."""
        if self.beta <= 0:
            return inf if self.beta < 0 or self.alpha > 0 else 0.0
        if self.method == "best_of":
            return max(0.0, self.alpha / (2 * self.beta)) ** 2
        exponent = 2 * (self.alpha / self.beta - 1)
        return exp(exponent) if exponent < 700 else inf


def fit(method: Method, kl_nats: Sequence[float], gains: Sequence[float]) -> Law | None:
    """The law's α and β by least squares, in which it is linear. None with fewer than two points away from d = 0, where
    the law is 0 whatever α and β.

    Args:
        kl_nats: distances from the initial policy; an estimate below 0 counts as 0.
        gains: gold rewards minus that of the initial policy.
    """
    import numpy as np

    ds = [distance(kl) for kl in kl_nats]
    if len({d for d in ds if d > 0}) < 2:
        return None
    columns = np.array([[d, -_bend(method, d)] for d in ds])
    found = np.array(gains, dtype=float)
    (alpha, beta), *_ = np.linalg.lstsq(columns, found, rcond=None)
    left, spread = found - columns @ [alpha, beta], found - found.mean()
    total = float(spread @ spread)
    return Law(method, float(alpha), float(beta), 1 - float(left @ left) / total if total else 0.0)


def distance(kl_nats: float) -> float:
    """d = √KL; the estimate of a KL may fall below 0."""
    return sqrt(max(0.0, kl_nats))


def _bend(method: Method, d: float) -> float:
    """What β multiplies."""
    return d * d if method == "best_of" else d * log(d) if d else 0.0


def as_row(row: Preference) -> Labelled:
    """A pair as a row of a file."""
    asked = {"prompt": list(row.prompt), **({"tools": list(row.tools)} if row.tools else {})}
    return {**asked, "chosen": row.chosen["content"], "rejected": row.rejected["content"]}


def scored_by_function(gold: str, rows: Sequence[Preference], plain: Sequence[Labelled]) -> list[Labelled]:
    """The rows with the scores that a function gives to both of their answers."""
    from qalign.data.store.sequences import TokenAnswers
    from qalign.rl.rollout_batch import SampledAnswers
    from qalign.rl.scorers import FunctionScorer

    scorer = FunctionScorer("goodhart.gold", gold, 1.0)
    if scorer.takes("completion_ids"):
        raise UserError("goodhart.gold: takes completion_ids, which the pairs of reward.data lack; take completions")
    answered = [
        SampledAnswers(Prompt(row.prompt, row.where, {}, row.tools), TokenAnswers([], ([], [])),
                       (row.chosen["content"], row.rejected["content"]), (True, True))
        for row in rows
    ]  # fmt: skip
    scores = scorer.scores(answered).tolist()
    return [
        {**row, "reward_chosen": chosen, "reward_rejected": rejected, "reward_margin": chosen - rejected}
        for row, (chosen, rejected) in zip(plain, scores, strict=True)
    ]


def by_gold(row: Labelled) -> Labelled:
    """A scored pair with the better answer by gold as the chosen one."""
    own = {name: value for name, value in row.items() if not name.startswith("reward_")}
    return own if row["reward_margin"] > 0 else turned_round(own)


def turned_round(row: Labelled) -> Labelled:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def proxy_pairs(rows: Sequence[Labelled], count: int, flipped: float, seed: int) -> list[Labelled]:
    """`count` of the pairs, of which the share `flipped`, to the nearest whole number, is turned round. With one seed,
    fewer pairs are some of the more."""
    drawn = random.Random(seed)
    some = drawn.sample(list(rows), len(rows))[:count]
    turned = set(drawn.sample(range(count), round(flipped * count)))
    return [turned_round(row) if number in turned else row for number, row in enumerate(some)]


@dataclass(frozen=True)
class Point:
    """Where a policy is: gains over the initial policy, in standard deviations of its answers' scores."""

    kl_nats: float
    proxy: float
    gold: float


@dataclass(frozen=True)
class Track:
    """What optimising one proxy came to: the points in their order, and where the monitor's alarm was first raised."""

    method: Method
    seed: int
    pairs: int
    members: int
    points: tuple[Point, ...]
    alarm_kl_nats: float | None = None
    alarm: str | None = None

    @property
    def peak(self) -> Point:
        """Where gold was highest; the earliest of equals."""
        return max(self.points, key=lambda point: point.gold)

    @property
    def facts(self) -> dict[str, Any]:
        """For JSON."""
        law = self.law
        return asdict(self) | {"gold_peak_kl_nats": self.peak.kl_nats, "law": law and law.facts}

    @property
    def law(self) -> Law | None:
        return fit(self.method, [point.kl_nats for point in self.points], [point.gold for point in self.points])


def pooled(tracks: Sequence[Track]) -> Law | None:
    """The law of several seeds' points together; they share a method, a number of pairs and of members."""
    points = [point for track in tracks for point in track.points]
    return fit(tracks[0].method, [point.kl_nats for point in points], [point.gold for point in points])


def draw(tracks: Sequence[Track], combine: str, file: Path) -> None:
    """Writes the picture: a row for each number of pairs, best-of-n on the left, PPO on the right."""
    sizes = sorted({track.pairs for track in tracks})
    with picture(file, (13, 1 + 4.6 * len(sizes)), pad=0.12) as figure:
        figure.suptitle("Goodhart's law: what optimising a proxy does to the gold reward", fontsize=16)
        grid = figure.subplots(len(sizes), 2, squeeze=False)
        for row, size in zip(grid, sizes, strict=True):
            for axes, method in zip(row, METHODS, strict=True):
                _panel(axes, [track for track in tracks if (track.pairs, track.method) == (size, method)])
                title = f"{METHODS[method]}, proxies of {counted(size, 'pair')}"
                label(axes, title, "d = √KL from the initial policy (√nats)", "gain (standard deviations)")
        most = max(track.members for track in tracks)
        keys = {"single proxy": ORANGE, f"{combine} of {most}": BLUE} if most > 1 else {"proxy": ORANGE}
        handles = {f"gold, {name}": grid[0][0].plot([], [], "o-", color=colour)[0] for name, colour in keys.items()}
        handles |= {
            "the proxies themselves": grid[0][0].plot([], [], ":", color=GREY)[0],
            "fitted law, and its peak": grid[0][0].plot([], [], "-*", color=GREY, linewidth=3, markersize=12)[0],
            "alarm": grid[0][0].plot([], [], "v", color=RED)[0],
        }
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _panel(axes: "Axes", tracks: Sequence[Track]) -> None:
    """Gold and proxy over the distance: each seed's points, the law of all seeds, and the alarms on the axis below."""
    import numpy as np

    axes.axhline(0, color=GREY, linewidth=1, zorder=0)
    for members in sorted({track.members for track in tracks}):
        some, colour = [track for track in tracks if track.members == members], BLUE if members > 1 else ORANGE
        for track in some:
            ds = [distance(point.kl_nats) for point in track.points]
            axes.plot(ds, [point.proxy for point in track.points], ":", color=colour, linewidth=1, alpha=0.6)
            axes.plot(ds, [point.gold for point in track.points], "o-", color=colour, markersize=4, alpha=0.4)
            if track.alarm_kl_nats is not None:
                axes.plot(distance(track.alarm_kl_nats), 0.02, "v", color=RED, mec=colour, markersize=9,
                          transform=axes.get_xaxis_transform(), clip_on=False, zorder=5)  # fmt: skip
        if law := pooled(some):
            far = max(distance(point.kl_nats) for track in some for point in track.points)
            ds = np.linspace(0, far, 100)
            axes.plot(ds, [law.gain(float(d) ** 2) for d in ds], color=colour, linewidth=3)
            if law.peak_kl_nats <= far**2:
                axes.plot(distance(law.peak_kl_nats), law.gain(law.peak_kl_nats), "*", color=colour, mec="black",
                          markersize=16, zorder=6)  # fmt: skip
