"""The curves of a run, at work, finished or stopped, from its `metrics.jsonl`: what `qalign.watch` and the page show.
Imports neither torch nor a library that draws."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qalign.train.checkpoints import METRICS, read_metrics
from qalign.train.lock import Holder, at_work, folder_of

# Panels in the order in which they are shown, each with its figures by their names in metrics.jsonl.
PANELS: dict[str, tuple[str, ...]] = {
    "loss": ("loss", "eval_loss"),
    "reward": ("objective/scores", "eval_proxy"),
    "judge": ("eval_judge",),
    "accuracy": (
        *("rewards/accuracies", "eval_rewards/accuracies", "accuracy", "eval_accuracy"),
        *("mean_token_accuracy", "eval_mean_token_accuracy"),
    ),
    "margin": ("rewards/margins", "eval_rewards/margins", "margin", "eval_margin"),
    "KL, nats": ("objective/kl", "eval_kl_nats", "kl", "eval_kl"),
    "log-probs of answers": ("logps/chosen", "logps/rejected"),
    "length of answers, tokens": ("completions/mean_length", "eval_length"),
    "answers that end": ("eval_ended",),
    "entropy, nats": ("policy/entropy_avg", "entropy"),
    "gradient norm": ("grad_norm",),
    "learning rate": ("learning_rate", "lr"),
}
AT_FIRST = 6  # panels that are shown unless others are asked for


class Curve(NamedTuple):
    """A figure over the steps."""

    name: str  # in metrics.jsonl
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class RunView:
    """A run folder as it is now."""

    path: Path
    lines: list[dict[str, Any]]
    holder: Holder | None  # who works in it

    @property
    def state(self) -> str:
        if self.holder:
            return "running"
        return "finished" if (self.path / "summary.json").is_file() else "stopped"

    @property
    def step(self) -> int:
        return max((line["step"] for line in self.lines), default=0)

    @property
    def alarms(self) -> list[str]:
        """The alarms of the last evaluation that raised any, with its step."""
        raised = [line for line in self.lines if line.get("alarms")]
        return [f"step {raised[-1]['step']}: {alarm}" for alarm in raised[-1]["alarms"]] if raised else []

    def names(self) -> list[str]:
        """The names of all figures that were logged."""
        found = {name: None for line in self.lines for name, value in line.items() if _is_figure(value)}
        return [name for name in found if name != "step"]

    def curve(self, name: str) -> Curve:
        points = [(line["step"], line[name]) for line in self.lines if _is_figure(line.get(name))]
        return Curve(name, [step for step, _ in points], [value for _, value in points])

    def panels(self, wanted: Iterable[str] = ()) -> dict[str, list[Curve]]:
        """Curves by the title of their panel: those of each wanted name, or the first panels that have any."""
        names, chosen = {*self.names()}, {name: (name,) for name in wanted}
        found = {
            title: [self.curve(name) for name in curves if name in names]
            for title, curves in (chosen or PANELS).items()
        }
        drawn = {title: curves for title, curves in found.items() if curves}
        return drawn if chosen else dict([*drawn.items()][:AT_FIRST])


def word(curve: Curve, curves: Sequence[Curve]) -> str:
    """What tells a curve from the others of its panel; empty for a curve of training that is alone."""
    if curve.name.startswith("eval_"):
        return "held out"
    others = [other for other in curves if other is not curve and not other.name.startswith("eval_")]
    return curve.name.rpartition("/")[2] if others else ""


def view(path: Path) -> RunView:
    """The run in a folder."""
    return RunView(path, read_metrics(path / METRICS), at_work(path))


def runs_under(folder: Path) -> list[Path]:
    """The run folders under a folder such as `runs` or `runs/demo`: those at work first, also one whose recipe isn't
    written yet, then the newest."""
    found = {file.parent for stars in ("*", "*/*", "*/*/*", "*/*/*/*") for file in folder.glob(f"{stars}/recipe.yaml")}
    locks = (file for stars in ("", "*/", "*/*/", "*/*/*/") for file in folder.glob(f"{stars}.*.lock"))
    found |= {run for run in map(folder_of, locks) if at_work(run)}
    return sorted(found, key=lambda run: (at_work(run) is None, -_changed(run)))


def run_in(folder: Path) -> Path | None:
    """The run that a path such as `runs/demo/dpo` or `runs/demo` means; None if there is none."""
    is_run = (folder / "recipe.yaml").is_file() or (folder / METRICS).is_file() or at_work(folder) is not None
    return folder if is_run else next(iter(runs_under(folder)), None)


def _changed(run: Path) -> float:
    files = [file for file in (run / METRICS, run / "recipe.yaml") if file.is_file()]
    return max((file.stat().st_mtime for file in files), default=0.0)


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
