"""Evaluation on held-out prompts during a run: scores of reward and judge, alarms, the best adapter, the report."""

from dataclasses import asdict
from typing import Any, cast

from qalign.config import manifest
from qalign.config.atomic import replacing_folder
from qalign.config.stages import PPO
from qalign.errors import not_finite
from qalign.model import lineage
from qalign.model.base import Role
from qalign.reports import alarms, ppo_report
from qalign.reports.answers import SEED, in_a_line, write_samples
from qalign.rl.ppo_trainer import PPOTrainer
from qalign.rl.rewards import combined, spread_of
from qalign.train.run_folder import RunFolder

SAMPLES_SHOWN = 3
# Attributes by their names in a checkpoint, besides the points.
KEPT = {"alarms": "alarm_steps", "warnings": "warnings", "clipped": "clip_fractions", "best_files": "_best_files"}


class Monitor:
    """Evaluates the policy while it trains, if there are held-out prompts, and writes `samples/`, `adapter_best/` and
    the report into the run folder."""

    def __init__(self, run: RunFolder, trainer: PPOTrainer):
        self.run, self.trainer, self.settings = run, trainer, cast(PPO, run.settings)
        self.prompts, self.judges = trainer.setup.rows.held_out, trainer.setup.scorers.judge
        self.best, self.picture = run.path / "adapter_best", run.path / ppo_report.file_name(run.stage)
        self.points: list[alarms.EvalPoint] = []
        self.alarm_steps: list[int] = []  # iterations at which an alarm was raised
        self.warnings: list[str] = []  # the alarms of the last evaluation
        self.clip_fractions: list[float] = []  # of the iterations since the last evaluation
        self._best_files: dict[str, dict[str, Any]] = {}  # as they were written
        self._samples: list[dict[str, Any]] = []

    @property
    def due(self) -> bool:
        """Whether to evaluate now: before training, at the end, and every `eval_every` iterations."""
        done, every = self.trainer.done, self.settings.eval_every
        if not self.prompts or (self.points and self.points[-1].step == done):
            return False
        return done in (0, self.trainer.iterations) or bool(every and done % every == 0)

    def evaluate(self) -> dict[str, Any]:
        """Samples and scores answers to the held-out prompts, and keeps the adapter if it is the best so far. Returns
        the figures for the metrics; raises a `UserError` if a scorer fails or log-probs are not finite."""
        seconds = self.trainer.seconds.copy()  # evaluation doesn't count as training time
        rollout = self.trainer.collect(self.prompts, 1, SEED, roles=(Role.POLICY, Role.REFERENCE))
        proxy, _ = combined(self.trainer.scorers, rollout.rows)
        judge = combined(self.judges, rollout.rows)[0] if self.judges else None
        self.trainer.seconds = seconds
        apart = spread_of(self.trainer.scorers)
        if not rollout.old_logps.isfinite().all():
            raise not_finite(f"iteration {self.trainer.done}", "log-probs of held-out answers are")
        clipped = sum(self.clip_fractions) / max(1, len(self.clip_fractions))
        self.points.append(point := rollout.point(self.trainer.done, proxy, judge, clipped=clipped, spread=apart))
        self.clip_fractions.clear()
        self._samples = rollout.samples(proxy, judge)
        self.warnings = alarms.alarms(self.points, self.settings.patience)
        if self.warnings:
            self.alarm_steps.append(point.step)
        self.trainer.world.first(self._write)
        return {f"eval_{name}": value for name, value in asdict(point).items() if name != "step"}

    def _write(self) -> None:
        """Writes the answers and the report of the last evaluation, and the adapter if it is the best so far."""
        write_samples(self.run.path, self.trainer.done, self._samples)
        if alarms.best_point(self.points) is self.points[-1]:
            with replacing_folder(self.best) as aside:
                self.trainer.base.save_adapter(Role.POLICY, aside)
                lineage.write(aside, self.trainer.setup.origin)
            self._best_files = manifest.files(self.best)
        best_of = ppo_report.read_best_of(self.run.path.parent)
        title = self.run.stage.upper()
        ppo_report.draw(self.points, self.picture, best_of=best_of, alarm_steps=self.alarm_steps, title=title)

    @property
    def best_is_damaged(self) -> bool:
        """Whether the best adapter is no longer what was written, which a resumed session may not do again."""
        return bool(self._best_files) and manifest.files(self.best) != self._best_files

    def samples(self) -> list[str]:
        """The last evaluation's answers with the highest reward, where reward hacking shows first, one line each."""
        lines = []
        for row in sorted(self._samples, key=lambda row: -row["reward"])[:SAMPLES_SHOWN]:
            judged = f", judge {row['judge']:+.2f}" if "judge" in row else ""
            lines.append(f"{in_a_line(row)} (reward {row['reward']:+.2f}{judged})")
        return lines

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        kept = {key: getattr(self, name) for key, name in KEPT.items()}
        return {"looks": [asdict(point) for point in self.points], **kept}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        self.points = [alarms.EvalPoint(**point) for point in state["looks"]]
        for key, name in KEPT.items():
            setattr(self, name, state[key])
