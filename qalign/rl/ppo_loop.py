"""A run's iterations from the last checkpoint to the end: metrics, evaluations, checkpoints, clean stops."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from tqdm.auto import tqdm

from qalign.config.stages import PPO
from qalign.model.decoding.vllm_server import EngineFailed
from qalign.reports.alarms import best_point
from qalign.rl.monitor import Monitor
from qalign.rl.ppo_setup import bytes_by_role
from qalign.rl.ppo_trainer import PPOTrainer
from qalign.rl.rewards import (
    AdapterScorer,
    ModelScorer,
    RewardFailed,
    Scorer,
    check_unchanged,
    restore_scorers,
    scorers_state,
)
from qalign.train.callbacks import asked_to_stop
from qalign.train.checkpoints import discard, step_of
from qalign.train.run_folder import RunFolder, print_table

PARTS = ("rollout", "scoring", "update")
STATE = "state.pt"
MOST_SLOWED = 16  # alarms raise the KL coefficient to at most this multiple of the recipe's
MIB = 2**20
# Per token. Log-probs of decoding and of the training forward are 0.033 nats apart on average in bfloat16: 0.001 of KL.
MISMATCH_NATS = 0.02


class PPOLoop:
    """The training loop of PPO and GRPO, in a run folder that was begun."""

    def __init__(self, run: RunFolder, trainer: PPOTrainer, monitor: Monitor):
        self.run_folder, self.trainer, self.monitor, self.settings = run, trainer, monitor, cast(PPO, run.settings)
        self.tokens_before, self.done_before = 0, 0
        self.scorers, self.alarmed, self.world = trainer.setup.scorers.all, False, trainer.world

    def run(self, checkpoint: Path | None) -> tuple[int, int, int]:
        """Runs all iterations that are left, from a checkpoint if there is one. Returns those done, those planned (or
        done, after an alarm with `on_alarm: stop`), and the tokens sampled by the whole run."""
        run, trainer, monitor = self.run_folder, self.trainer, self.monitor
        if checkpoint:
            self._load(checkpoint)
        run.stop.patient = True
        # Killed between the alarm's checkpoint and the summary, it must not train on.
        self.alarmed = self.settings.on_alarm == "stop" and trainer.done in monitor.alarm_steps
        try:
            self._run(resumed=checkpoint is not None)
        except (RewardFailed, EngineFailed):  # keeps what was learned: the state is still that after the last iteration
            self.world.first(self._keep)
            raise
        run.stop.patient = False
        return trainer.done, trainer.done if self.alarmed else trainer.iterations, trainer.tokens_seen

    def _run(self, *, resumed: bool) -> None:
        run, trainer, monitor = self.run_folder, self.trainer, self.monitor
        every = self.settings.save_every or math.ceil(trainer.iterations / 10)
        with tqdm(total=trainer.iterations, initial=trainer.done, desc=run.stage, unit="iteration") as bar:
            if monitor.due:  # at the beginning, or where a judge failed
                self._evaluate()
            if not resumed:
                self.world.first(self._save)
            while trainer.done < trainer.iterations and not self.alarmed:
                line = self._iterate()
                bar.update()
                bar.set_postfix_str(f"reward {line['objective/scores']:+.3f}, KL {line['objective/kl']:.2f} nats")
                if monitor.due:
                    self._evaluate()
                last, stopped = trainer.done == trainer.iterations or self.alarmed, asked_to_stop(run)
                if last or stopped or trainer.done % every == 0:
                    self.world.first(self._save)
                if stopped:
                    break

    def _iterate(self) -> dict[str, Any]:
        """One iteration; returns the line that it wrote to the metrics."""
        trainer, before = self.trainer, dict(self.trainer.seconds)
        rollout, metrics = trainer.iterate()
        self.monitor.clip_fractions.append(metrics["policy/clipfrac_avg"])
        spent = {part: trainer.seconds[part] - before.get(part, 0.0) for part in (*PARTS, "all")}
        line = {"step": trainer.done, **metrics, "episode": trainer.done * self.settings.batch_size}
        line |= {f"tokens_per_second/{part}": rollout.tokens / max(1e-9, spent[part]) for part in PARTS}
        line |= {f"share/{part}": spent[part] / max(1e-9, spent["all"]) for part in PARTS}
        line |= {"num_tokens": trainer.tokens_seen}
        self._log(line)
        if trainer.done - self.done_before == 1:
            for warning in [*self._alike(), *_mismatch(line, self.settings)]:
                tqdm.write(f"warning: iteration {trainer.done}: {warning}")
        return line

    def _alike(self) -> list[str]:
        """A warning for every reward and judge that gave all answers of this session the same score."""
        so = {"reward": "the policy can't learn from it", "judge": "nothing is judged"}
        return [
            f"{scorer.key}: {scorer.name} gave every answer the same score, {scorer.lowest:g}: "
            f"it tells no answers apart, so that {so[scorer.key.rpartition('.')[2]]}"
            for scorer in self.scorers
            if scorer.lowest == scorer.highest
        ]

    def _evaluate(self) -> None:
        """Evaluates the held-out prompts and does what `on_alarm` says."""
        trainer, monitor = self.trainer, self.monitor
        figures = monitor.evaluate()
        judged = f", judge {figures['eval_judge']:+.3f}" if figures["eval_judge"] is not None else ""
        kl, length, ended = (figures[f"eval_{name}"] for name in ("kl_nats", "length", "ended"))
        scores = f"held-out reward {figures['eval_proxy']:+.3f}{judged}"
        tqdm.write(f"iteration {trainer.done}: {scores}, KL {kl:.2f} nats, {length:.0f} tokens, {ended:.0%} ended")
        if monitor.warnings:
            for warning in monitor.warnings:
                tqdm.write(f"warning: iteration {trainer.done}: {warning}")
            for sample in monitor.samples():
                tqdm.write(f"  {sample}")
            if self.settings.on_alarm == "slow":
                # Some alarms repeat at every evaluation: without a bound nothing would be learned any more.
                most = max(trainer.kl_coefficient, MOST_SLOWED * self.settings.kl_coefficient)
                trainer.kl_coefficient = min(2 * trainer.kl_coefficient, most)
                tqdm.write(f"  the KL coefficient is {trainer.kl_coefficient:g} from now on (on_alarm: slow)")
            self.alarmed = self.settings.on_alarm == "stop"
            if self.alarmed:
                tqdm.write(f"  stopped here (on_alarm: stop); the best adapter so far is {monitor.best}")
        self._log({"step": trainer.done, **figures, "alarms": monitor.warnings})

    def _log(self, line: dict[str, Any]) -> None:
        if self.world.is_first:
            self.run_folder.log(line)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Writes a checkpoint of the last iteration if there is none yet."""
        last = self.run_folder.last_checkpoint()
        if last is None or step_of(last) != self.trainer.done:
            self._save()

    def _save(self) -> None:
        """Writes a checkpoint."""
        folder = self.run_folder.checkpoints / f"checkpoint-{self.trainer.done}"
        discard(folder)
        folder.mkdir(parents=True)
        identities = [scorer.identity for scorer in self.scorers]
        state = {"trainer": self.trainer.state(), "watcher": self.monitor.state(), "scorers": identities}
        state |= {"zeros": scorers_state(self.scorers)}
        torch.save(state, folder / STATE)
        self.run_folder.mark_whole(self.trainer.done, self.trainer.tokens_seen)

    def _load(self, checkpoint: Path) -> None:
        state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
        check_unchanged(self.scorers, state["scorers"])
        restore_scorers(self.scorers, state["zeros"])
        self.trainer.load_state(state["trainer"])
        self.monitor.load_state(state["watcher"])
        self.tokens_before, self.done_before = self.trainer.tokens_seen, self.trainer.done

    # --- at the end --------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Prints memory, speed and held-out scores; returns them for the summary."""
        trainer, monitor, seconds = self.trainer, self.monitor, self.trainer.seconds
        roles = bytes_by_role(trainer.base, trainer.optimizer)
        others = {scorer.name: scorer.bytes for scorer in self.scorers if isinstance(scorer, ModelScorer)}
        print_table("memory by role, in MiB", _memory_lines(roles, others))
        sampled = trainer.tokens_seen - self.tokens_before
        speeds = {part: round(sampled / max(1e-9, seconds[part]), 1) for part in PARTS}
        shares = {part: round(seconds[part] / max(1e-9, seconds["all"]), 3) for part in PARTS}
        lines = [(p, f"{speeds[p]:,.0f} sampled tokens/s, {shares[p]:.0%} of the time") for p in PARTS]
        print_table("speed", lines)
        facts = {
            "tokens_per_second": round(sampled / max(1e-9, seconds["all"]), 1),
            "bytes_by_role": roles | ({"other models": others} if others else {}),
            "tokens_per_second_by_part": speeds,
            "share_by_part": shares,
            "kl_coefficient": trainer.kl_coefficient,
            "stopped_by_alarm": self.alarmed,
            "alarm_steps": monitor.alarm_steps,
            "warnings": monitor.warnings + (alike := self._alike()),
        }
        if alike:
            print_table("warnings", [("", warning) for warning in alike])
        if monitor.points:
            first, last, best = monitor.points[0], monitor.points[-1], best_point(monitor.points)
            facts["held_out"] = {"first": asdict(first), "last": asdict(last), "best": asdict(best)}
            lines = [("reward", f"{first.proxy:+.3f} → {last.proxy:+.3f}")]
            if first.judge is not None:
                start = f"one standard deviation at the start: {first.judge_std:.3f}"
                lines += [("judge", f"{first.judge:+.3f} → {last.judge:+.3f} ({start})")]
            lines += [("KL", f"{last.kl_nats:.2f} nats per answer")]
            kept = f"{monitor.best}: was changed since: don't use it" if monitor.best_is_damaged else monitor.best
            lines += [("best", f"iteration {best.step}, kept as {kept}"), ("report", str(monitor.picture))]
            print_table("held-out prompts", lines)
        return facts


def _mismatch(line: dict[str, Any], settings: PPO) -> list[str]:
    """A warning if vLLM's log-probs are further from the training model's than rounding explains."""
    if (nats := line.get("sampling/kl", 0.0)) < MISMATCH_NATS:
        return []
    same = "the same base, quantised alike (`vllm serve BASE --quantization bitsandbytes`)"
    samples = f"{settings.stage}.engine: {settings.engine} samples {nats:.2g} nats a token from the model that learns"
    return [f"{samples}; does it hold {same}?"]


def _memory_lines(roles: dict[str, dict[str, int]], others: dict[str, int]) -> list[tuple[str, str]]:
    lines = [
        (role, ", ".join(f"{size / MIB:,.1f} {what}" for what, size in parts.items() if size))
        for role, parts in roles.items()
    ]
    lines += [(name, f"{size / MIB:,.1f} weights, a model of its own") for name, size in others.items()]
    lasting = sum(size for parts in roles.values() for what, size in parts.items() if what != "gradients")
    return [*lines, ("lasting", f"{(lasting + sum(others.values())) / MIB:,.1f} (gradients live in updates only)")]


def header(trainer: PPOTrainer, settings: PPO) -> dict[str, str]:
    """The header's own lines for PPO and GRPO."""
    judges = trainer.setup.scorers.judge
    weights = sum(weight.numel() for weight in trainer.weights.values())
    values = {
        "adapter": "an adapter and a head of its own",
        "trunk": "a head on the policy's hidden states",
        "none": f"none: advantage {settings.advantage} compares the answers to a prompt",
    }
    trained = "the policy" if settings.value == "none" else "policy and value model"
    target = f", adapted towards {settings.kl_target:g} nats" if settings.kl_target else ""
    where = " (k3), in the loss" if settings.kl == "in_loss" else ""
    prompts = settings.batch_size // settings.samples_per_prompt
    updates = f"{settings.update_epochs} × {settings.mini_batches} updates"
    return {
        "trainable": f"{weights:,} weights of {trained}, in float32",
        "reference": trainer.base.reference,
        **({} if settings.engine == "transformers" else {"sampling": _sampling(settings)}),
        "reward": _names(trainer.scorers),
        "judge": _names(judges) if judges else "none: nothing but the reward itself tells whether it is hacked",
        "value model": values[settings.value],
        "KL": "no penalty" if settings.kl == "none" else f"{settings.kl_coefficient:g} per nat{where}{target}",
        "steps": f"{trainer.iterations:,}, each of {settings.batch_size} answers to {prompts} prompts and {updates}",
    }


def _sampling(settings: PPO) -> str:
    cap = settings.importance_cap
    weighted = "unweighted" if cap is None else f"weighted by min(π / π_vllm, {cap:g}), token by token"
    return f"by {settings.engine}; its answers are scored again by the training model and {weighted}"


def _names(scorers: list[Scorer]) -> str:
    named = (f"{s.weight:g} × {_name(s)}" if s.weight != 1 else _name(s) for s in scorers)
    return " + ".join(named)


def _name(scorer: Scorer) -> str:
    if not isinstance(scorer, AdapterScorer) or len(scorer.folders) == 1:
        return scorer.name
    how = scorer.combine if scorer.combine != "mean_minus_std" else f"mean - {scorer.uncertainty:g} × deviation"
    return f"{how} of {scorer.name}'s {', '.join(folder.name for folder in scorer.folders)}"
