"""PPO's iterations from the last checkpoint to the end: metrics, looks, checkpoints, clean stops."""

import json
import math
import shutil
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from qalign.config.stages import PPO
from qalign.errors import Stopped, UserError
from qalign.rl.monitor import Monitor
from qalign.rl.ppo_setup import bytes_by_role
from qalign.rl.ppo_trainer import PPOTrainer
from qalign.rl.rewards import ModelScorer, RewardFailed, Scorer
from qalign.train.callbacks import mark_whole, peak_bytes
from qalign.train.run_folder import RunFolder, print_table

PARTS = ("rollout", "scoring", "update")
STATE = "state.pt"
MOST_SLOWED = 16  # times the recipe's KL coefficient, by alarms
MIB = 2**20


def iterations_of(settings: PPO, prompts: int) -> int:
    """Iterations of the whole run."""
    return settings.max_steps or math.ceil(
        prompts * settings.epochs * settings.samples_per_prompt / settings.batch_size
    )


def train_to_the_end(run: RunFolder, trainer: PPOTrainer, watcher: Monitor, checkpoint: Path | None) -> dict:
    """Runs the loop, from a checkpoint if there is one.

    Returns:
        what the summary keeps.

    Raises:
        Stopped: the user or the system asked to stop; a checkpoint was written.
        UserError: a reward or judge failed, memory is too small, or a figure is not finite. The last checkpoint is
            kept.
    """
    began, resumed = time.monotonic(), checkpoint is not None
    if resumed:
        _load(checkpoint, trainer, watcher)
    every, seen = run.settings.save_every or math.ceil(trainer.iterations / 10), trainer.tokens_seen
    run.stop.patient = True
    # Killed after the alarm's checkpoint and before the summary, it must not train on.
    alarmed = run.settings.on_alarm == "stop" and trainer.done in watcher.alarm_steps
    with tqdm(total=trainer.iterations, initial=trainer.done, desc="ppo", unit="iteration") as bar:
        if watcher.due:  # at the beginning, or where a judge failed
            alarmed = _look(run, trainer, watcher)
        if not resumed:
            _save(run, trainer, watcher)
        while trainer.done < trainer.iterations and not alarmed:
            line = _iterate(run, trainer, watcher)
            bar.update()
            bar.set_postfix_str(_shown(line))
            alarmed = _look(run, trainer, watcher)
            last = trainer.done == trainer.iterations or alarmed
            if run.stop.number is not None or last or trainer.done % every == 0:
                _save(run, trainer, watcher)
            if run.stop.number is not None and not last:
                break
    run.stop.patient = False
    if run.stop.number is not None and trainer.done < trainer.iterations and not alarmed:
        print(f"stopped after iteration {trainer.done}; the checkpoint is {run.last_checkpoint()}")
        print(f"go on with: python -m qalign.{run.stage} {run.command_line} --resume", flush=True)
        raise Stopped(run.stop.number)
    return _facts(run, trainer, watcher, checkpoint, began, seen, alarmed)


def _iterate(run: RunFolder, trainer: PPOTrainer, watcher: Monitor) -> dict:
    """One iteration, its line in the metrics written."""
    before = dict(trainer.seconds)
    try:
        rollout, metrics = trainer.iterate()
    except RewardFailed:
        _save_before_failing(run, trainer, watcher)
        raise
    except torch.OutOfMemoryError as error:
        each = run.settings.samples_per_prompt
        raise UserError(
            f"out of GPU memory ({str(error).partition('. ')[0]}). Try ppo.micro_batch_size={each}, ppo.value=trunk, "
            f"or ppo.max_new_tokens={run.settings.max_new_tokens // 2}"
        ) from None
    watcher.count(metrics)
    spent = {part: trainer.seconds[part] - before.get(part, 0.0) for part in (*PARTS, "all")}
    metrics["episode"] = trainer.done * run.settings.batch_size
    metrics |= {f"tokens_per_second/{part}": rollout.tokens / max(1e-9, spent[part]) for part in PARTS}
    metrics |= {f"share/{part}": spent[part] / max(1e-9, spent["all"]) for part in PARTS}
    line = {"step": trainer.done, **metrics, "num_tokens": trainer.tokens_seen}
    _log(run, line)
    return line


def _look(run: RunFolder, trainer: PPOTrainer, watcher: Monitor) -> bool:
    """A look at the held-out prompts, if one is due. Returns whether it ends the run."""
    if not watcher.due:
        return False
    try:
        figures = watcher.look()
    except RewardFailed:
        _save_before_failing(run, trainer, watcher)
        raise
    judged = f", judge {figures['eval_judge']:+.3f}" if figures["eval_judge"] is not None else ""
    tqdm.write(
        f"iteration {trainer.done}: held-out reward {figures['eval_proxy']:+.3f}{judged}, KL "
        f"{figures['eval_kl_nats']:.2f} nats, {figures['eval_length']:.0f} tokens, {figures['eval_ended']:.0%} ended"
    )
    ends = False
    if watcher.warnings:
        for warning in watcher.warnings:
            tqdm.write(f"warning: iteration {trainer.done}: {warning}")
        for sample in watcher.samples():
            tqdm.write(f"  {sample}")
        if run.settings.on_alarm == "slow":
            # Some alarms last as long as what they tell of: without a bound nothing would be learned any more.
            most = max(trainer.kl_coefficient, MOST_SLOWED * run.settings.kl_coefficient)
            trainer.kl_coefficient = min(2 * trainer.kl_coefficient, most)
            tqdm.write(f"  the KL coefficient is {trainer.kl_coefficient:g} from now on (on_alarm: slow)")
        ends = run.settings.on_alarm == "stop"
        if ends:
            tqdm.write(f"  stopped here (on_alarm: stop); the best adapter so far is {watcher.best}")
    _log(run, {"step": trainer.done, **figures, "alarms": watcher.warnings})
    return ends


def _save_before_failing(run: RunFolder, trainer: PPOTrainer, watcher: Monitor) -> None:
    """Where a reward could not be had: nothing has changed since the iteration before, so what was learned is kept."""
    last = run.last_checkpoint()
    if last is None or _number(last) != trainer.done:
        _save(run, trainer, watcher)


def _log(run: RunFolder, line: dict) -> None:
    with run.metrics.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _save(run: RunFolder, trainer: PPOTrainer, watcher: Monitor) -> None:
    """A checkpoint: whole once it is marked as such; the last two are kept."""
    folder = run.checkpoints / f"checkpoint-{trainer.done}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    identities = [scorer.identity for scorer in (*trainer.scorers, *watcher.judges)]
    state = {"trainer": trainer.state(), "watcher": watcher.state(), "scorers": identities}
    torch.save(state, folder / STATE)
    mark_whole(folder, run, trainer.tokens_seen)
    for old in sorted(run.checkpoints.glob("checkpoint-*"), key=_number)[:-2]:
        shutil.rmtree(old)


def _number(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _load(checkpoint: Path, trainer: PPOTrainer, watcher: Monitor) -> None:
    """Raises a `UserError` if the run would go on with another reward."""
    state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    for scorer, was in zip((*trainer.scorers, *watcher.judges), state["scorers"], strict=True):
        if was != scorer.identity:
            raise UserError(
                f"{scorer.key}: the adapter of {scorer.name} was {was} when this run began and is {scorer.identity} "
                "now; --overwrite starts anew"
            )
    trainer.load_state(state["trainer"])
    watcher.load_state(state["watcher"])


def _facts(run, trainer, watcher, checkpoint, began: float, seen: int, alarmed: bool) -> dict:
    roles, seconds = bytes_by_role(trainer.base, trainer.optimizer), trainer.seconds
    others = {s.name: s.bytes for s in (*trainer.scorers, *watcher.judges) if isinstance(s, ModelScorer)}
    print_table("memory by role, in MiB", _memory_lines(roles, others))
    sampled = trainer.tokens_seen - seen
    speeds = {part: round(sampled / max(1e-9, seconds[part]), 1) for part in PARTS}
    shares = {part: round(seconds[part] / max(1e-9, seconds["all"]), 3) for part in PARTS}
    print_table(
        "speed", [(part, f"{speeds[part]:,.0f} sampled tokens/s, {shares[part]:.0%} of the time") for part in PARTS]
    )
    facts = {
        "steps": trainer.done,
        "resumed_from": str(checkpoint) if checkpoint else None,
        "train_seconds": round(time.monotonic() - began, 1),
        "tokens": trainer.tokens_seen,
        "tokens_per_second": round(sampled / max(1e-9, seconds["all"]), 1),
        "peak_bytes": peak_bytes(),
        "bytes_by_role": roles | ({"other models": others} if others else {}),
        "tokens_per_second_by_part": speeds,
        "share_by_part": shares,
        "kl_coefficient": trainer.kl_coefficient,
        "stopped_by_alarm": alarmed,
        "alarm_steps": watcher.alarm_steps,
        "warnings": watcher.warnings,
    }
    if watcher.looks:
        facts["held_out"] = _held_out(watcher)
        print_table("held-out prompts", [*facts["held_out"]["lines"].items(), ("picture", watcher.picture)])
        del facts["held_out"]["lines"]
    return facts


def _held_out(watcher: Monitor) -> dict:
    from dataclasses import asdict

    from qalign.reports.alarms import best_look

    first, last, best = watcher.looks[0], watcher.looks[-1], best_look(watcher.looks)
    lines = {"reward": f"{first.proxy:+.3f} → {last.proxy:+.3f}"}
    if first.judge is not None:
        lines["judge"] = f"{first.judge:+.3f} → {last.judge:+.3f} (one deviation at the start: {first.judge_std:.3f})"
    lines["KL"] = f"{last.kl_nats:.2f} nats an answer"
    lines["best"] = f"iteration {best.step}, kept as {watcher.best}"
    return {"first": asdict(first), "last": asdict(last), "best": asdict(best), "lines": lines}


def _memory_lines(roles: dict[str, dict[str, int]], others: dict[str, int]) -> list[tuple[str, str]]:
    lines = [
        (role, ", ".join(f"{size / MIB:,.1f} {what}" for what, size in parts.items() if size))
        for role, parts in roles.items()
    ]
    lines += [(name, f"{size / MIB:,.1f} weights, a model of its own") for name, size in others.items()]
    lasting = sum(size for parts in roles.values() for what, size in parts.items() if what != "gradients")
    return [*lines, ("lasting", f"{(lasting + sum(others.values())) / MIB:,.1f} (gradients live in updates only)")]


def _shown(line: dict) -> str:
    return f"reward {line['objective/scores']:+.3f}, KL {line['objective/kl']:.2f} nats"


def print_header(
    run: RunFolder, trainer: PPOTrainer, judges: list[Scorer], at_once: str, checkpoint: Path | None, rows: dict
) -> None:
    """What is about to be trained, on what, against what."""
    base, settings, model = trainer.base, run.settings, run.recipe.model
    named = lambda scorers: " + ".join(  # noqa: E731
        f"{scorer.weight:g} × {scorer.name}" if scorer.weight != 1 else scorer.name for scorer in scorers
    )
    trained = sum(weight.numel() for weight in trainer.weights.values())
    parent = f", the policy a copy of {run.parent}" if run.parent else ""
    values = "a head on the policy's hidden states" if settings.value == "trunk" else "an adapter and a head of its own"
    kl = f"{settings.kl_coefficient:g} a nat" + (
        f", aiming at {settings.kl_target:g} nats" if settings.kl_target else ""
    )
    prompts = settings.batch_size // settings.samples_per_prompt
    print_table(
        f"qalign ppo → {run.path}",
        [
            ("model", f"{model.base}, held in {model.quantization}, computing in {base.precision}"),
            ("chat template", base.template),
            ("trainable", f"{trained:,} weights of policy and value model, in float32{parent}"),
            ("reference", base.reference),
            ("reward", named(trainer.scorers)),
            ("judge", named(judges) if judges else "none: nothing but the reward itself tells whether it is hacked"),
            ("value model", values),
            ("KL", kl),
            ("prompts", ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in rows.items())),
            (
                "iterations",
                f"{trainer.iterations:,}, each of {settings.batch_size} answers to {prompts} prompts, then "
                f"{settings.update_epochs} × {settings.mini_batches} updates, {at_once}",
            ),
            *([("resuming", checkpoint or "from the beginning: no checkpoint was written")] if run.resume else []),
        ],
    )
