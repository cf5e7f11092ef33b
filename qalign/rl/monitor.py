"""Held-out prompts while PPO runs: what reward and judge make of the answers, alarms, the best adapter, the picture."""

import json
from dataclasses import asdict
from pathlib import Path

from qalign.data.prompts import Prompt
from qalign.errors import UserError
from qalign.model import lineage
from qalign.model.base import Role
from qalign.model.lineage import Lineage
from qalign.reports import alarms as watch
from qalign.reports import ppo_report
from qalign.rl.ppo_trainer import PPOTrainer
from qalign.rl.rewards import Scorer, combined
from qalign.rl.rollout_batch import RolloutBatch
from qalign.train.run_folder import RunFolder

SEED = 0  # the same draws at each look: less of a change is luck
SHOWN = 3  # samples beside an alarm


class Monitor:
    """Looks at what the policy has become.

    Args:
        run: where `samples/`, `adapter_best/` and the picture go.
        trainer: with the policy.
        prompts: held-out ones with their ids; without any it looks at nothing.
        judges: what scores the answers beside the reward.
        origin: the lineage of the adapter.

    Attributes:
        looks: so far.
        alarm_steps: the iterations at which an alarm was raised.
        warnings: the last look's, in words.
    """

    def __init__(
        self,
        run: RunFolder,
        trainer: PPOTrainer,
        prompts: list[tuple[Prompt, list[int]]],
        judges: list[Scorer],
        origin: Lineage,
    ):
        self.run, self.trainer, self.prompts, self.judges, self.origin = run, trainer, prompts, judges, origin
        self.looks: list[watch.EvalPoint] = []
        self.alarm_steps: list[int] = []
        self.warnings: list[str] = []
        self._clipped: list[float] = []

    @property
    def due(self) -> bool:
        """Whether this iteration is one to look at: the first, the last, and each `eval_every`-th."""
        done, every = self.trainer.done, self.run.settings.eval_every
        if not self.prompts or (self.looks and self.looks[-1].step == done):
            return False
        return done in (0, self.trainer.iterations) or bool(every and done % every == 0)

    @property
    def best(self) -> Path:
        """The adapter that was best by the judge, or by the reward where there is none."""
        return self.run.path / "adapter_best"

    def count(self, metrics: dict[str, float]) -> None:
        """Takes note of an iteration's updates."""
        self._clipped.append(metrics["policy/clipfrac_avg"])

    def look(self) -> dict[str, float]:
        """Answers the held-out prompts; keeps the adapter if it is the best so far.

        Returns:
            the figures, for the metrics.
        """
        seconds = self.trainer.seconds.copy()  # a look is no part of training's
        rollout = self.trainer.collect(self.prompts, 1, SEED, roles=(Role.POLICY, Role.REFERENCE))
        proxy, _ = combined(self.trainer.scorers, rollout.rows)
        judge = combined(self.judges, rollout.rows)[0] if self.judges else None
        self.trainer.seconds = seconds
        texts = [text for row in rollout.rows for text in row.texts]
        if not rollout.old.isfinite().all():
            raise UserError(
                f"iteration {self.trainer.done}: log-probs of held-out answers are not finite; the last checkpoint, if "
                "there is one, is kept. Try a lower learning_rate, or compute_dtype: bfloat16 or float32"
            )
        found = watch.EvalPoint(
            step=self.trainer.done,
            answers=len(texts),
            kl_nats=rollout.kl.mean().item(),
            proxy=proxy.mean().item(),
            proxy_std=proxy.std(correction=0).item(),
            judge=None if judge is None else judge.mean().item(),
            judge_std=None if judge is None else judge.std(correction=0).item(),
            length=rollout.tokens / len(texts),
            ended=rollout.ended.float().mean().item(),
            distinct=watch.distinct_n(texts),
            repeated=watch.repeated_lines(texts),
            entropy=(rollout.entropies.sum() / rollout.tokens).item(),
            clipped=sum(self._clipped) / max(1, len(self._clipped)),
        )
        self.looks.append(found)
        self._clipped.clear()
        self._keep_samples(rollout, proxy.flatten().tolist(), None if judge is None else judge.flatten().tolist())
        if watch.best_look(self.looks) is found:
            self.trainer.base.save_adapter(Role.POLICY, self.best)
            lineage.write(self.best, self.origin)
        self.warnings = watch.alarms(self.looks, self.run.settings.patience)
        if self.warnings:
            self.alarm_steps.append(found.step)
        self.draw()
        return {f"eval_{name}": value for name, value in asdict(found).items() if name != "step"}

    def draw(self) -> None:
        """The picture of all looks so far."""
        best_of = ppo_report.read_best_of(self.run.path.parent)
        ppo_report.draw(self.looks, self.picture, best_of=best_of, alarm_steps=self.alarm_steps)

    @property
    def picture(self) -> Path:
        return self.run.path / "ppo_report.png"

    def samples(self) -> list[str]:
        """Three of the last look's answers: those that the reward likes best, where hacking shows first."""
        with self._samples_file().open(encoding="utf-8") as lines:  # not splitlines: an answer may hold a U+2028
            rows = sorted(map(json.loads, lines), key=lambda row: -row["reward"])[:SHOWN]
        return [_shown(row) for row in rows]

    def _samples_file(self) -> Path:
        return self.run.path / "samples" / f"step-{self.trainer.done}.jsonl"

    def _keep_samples(self, rollout: RolloutBatch, proxy: list[float], judge: list[float] | None) -> None:
        file = self._samples_file()
        file.parent.mkdir(exist_ok=True)
        with file.open("w", encoding="utf-8") as opened:
            for number, row in enumerate(rollout.rows):
                line = {"prompt": list(row.prompt.turns), "completion": row.texts[0], "reward": proxy[number]}
                line |= {} if judge is None else {"judge": judge[number]}
                line |= {"ended": row.ended[0], "where": row.prompt.where}
                opened.write(json.dumps(line, ensure_ascii=False) + "\n")

    def state(self) -> dict:
        return {
            "looks": [asdict(look) for look in self.looks],
            "alarms": self.alarm_steps,
            "warnings": self.warnings,
            "clipped": self._clipped,
        }

    def load_state(self, state: dict) -> None:
        self.looks = [watch.EvalPoint(**look) for look in state["looks"]]
        self.alarm_steps, self._clipped = list(state["alarms"]), list(state["clipped"])
        self.warnings = list(state["warnings"])


def _shown(row: dict) -> str:
    question, answer = (" ".join(text.split()) for text in (row["prompt"][-1]["content"], row["completion"]))
    judged = f", judge {row['judge']:+.2f}" if "judge" in row else ""
    return f"{question[:80]!r} → {answer[:240]!r} (reward {row['reward']:+.2f}{judged})"
