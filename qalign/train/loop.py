"""A stage's settings as TRL's config, and the loop from the last checkpoint to the end."""

import math
import time
from pathlib import Path
from typing import Literal

import torch
import trl
from transformers import Trainer, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from qalign.config.stages import PPO, Stage
from qalign.data.collate import MicroBatchLimit
from qalign.errors import Stopped, UserError
from qalign.model.base import Base
from qalign.model.memory import Forecast, Plan, usable_memory
from qalign.train.callbacks import RunCallback, peak_bytes
from qalign.train.run_folder import RunFolder, print_table

CONFIGS = {"sft": trl.SFTConfig, "reward": trl.RewardConfig, "dpo": trl.DPOConfig}


def training_config(run: RunFolder, base: Base, rows: int, checkpointed: int, **special):
    """The recipe as TRL's config of the stage, in which `trainer:` has the last word.

    Args:
        rows: how many the trainer takes at once. (Those that learn from pairs take a whole optimiser step's, and
            split it themselves.)
        checkpointed: how many layers are.
        special: what only this stage's config has.

    Raises:
        UserError: a value under `trainer:` that TRL refuses.
    """
    settings = run.settings
    on_gpu = base.lm.device.type == "cuda"
    values = {
        "output_dir": str(run.checkpoints),
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": rows,
        "gradient_accumulation_steps": settings.batch_size // rows,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.scheduler,
        "warmup_steps": settings.warmup_ratio,
        "logging_steps": 1,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if settings.eval_data and settings.eval_every else "no",
        "eval_steps": settings.eval_every,
        "prediction_loss_only": True,
        "save_strategy": "steps",
        "save_steps": settings.save_every or 0.1,
        "save_total_limit": 2,
        "seed": run.recipe.seed,
        "bf16": base.dtype == torch.bfloat16,
        "fp16": base.dtype == torch.float16,
        "use_cpu": not on_gpu,
        "activation_checkpointing": checkpointed > 0,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "dataloader_pin_memory": on_gpu,
        "remove_unused_columns": False,
        "disable_tqdm": True,  # the RunCallback has its own bar
        "report_to": "none",
        "max_length": run.recipe.model.max_length,
    }
    try:
        return CONFIGS[run.stage](**values | special | settings.trainer)
    except (TypeError, ValueError) as error:
        raise UserError(f"{run.stage}.trainer: {' '.join(str(error).split())}") from None


def planned_steps(settings: Stage, rows: int) -> int:
    """Optimiser steps of the whole run, as `Trainer` counts them."""
    return settings.max_steps or math.ceil(math.ceil(rows / settings.batch_size) * settings.epochs)


def plan(run: RunFolder, base: Base, longest: int, others: int = 0) -> Plan:
    """What `auto` comes to for this stage, this base and this device.

    Args:
        longest: tokens of the longest row; for a pair, of both answers with the prompt once.
        others: bytes of models beside the base.

    Raises:
        UserError: not even the longest row fits.
    """
    settings, device = run.settings, base.lm.device.type
    size, layers = rows_at_once(settings), settings.checkpointed_layers
    if size != "auto" and (device == "cpu" or layers != "auto"):  # nothing to find out
        return Plan(size * longest, 0 if layers == "auto" else layers)
    forecast = Forecast(run.recipe, run.stage, base.lm.config, device, base.dtype)
    memory = usable_memory(device) - (others if device == "cuda" else 0)  # a CPU's is what these left
    found = forecast.plan(memory, longest if size == "auto" else size * longest)
    if found is None and size != "auto":  # the user's choice: it may fit all the same
        found = Plan(size * longest, forecast.layers)
    if found is None:
        needed = forecast.total(longest, forecast.layers) / 2**30
        raise UserError(
            f"{run.stage}: the longest row ({longest:,} tokens) would take {needed:.1f} GiB of the "
            f"{memory / 2**30:.1f} GiB there are; python -m qalign.fit {run.command_line} says what would fit"
        )
    return found


def rows_at_once(settings: Stage) -> int | Literal["auto"]:
    """The recipe's `micro_batch_size` in rows: of PPO in prompts, each with its answers."""
    size = settings.micro_batch_size
    return size // settings.samples_per_prompt if isinstance(settings, PPO) and size != "auto" else size


def micro_batch(settings: Stage, planned: Plan) -> MicroBatchLimit:
    """What goes through the model at once, for trainers that learn from pairs and from sampled answers."""
    size = rows_at_once(settings)
    return MicroBatchLimit(tokens=planned.tokens) if size == "auto" else MicroBatchLimit(pairs=size)


def micro_batch_size(settings: Stage, planned: Plan, longest: int) -> int:
    """Rows in one forward pass: the recipe's, or for `auto` the largest divisor of `batch_size` that stays within the
    plan when the longest rows meet."""
    if settings.micro_batch_size != "auto":
        return settings.micro_batch_size
    return max((size for size in divisors(settings.batch_size) if size * longest <= planned.tokens), default=1)


class PartialCheckpointing(TrainerCallback):
    """Leaves checkpointing to the first so many layers; `Trainer` switches it on for all."""

    def __init__(self, planned: Plan):
        self.layers = planned.checkpointed_layers

    def on_train_begin(self, args, state, control, model=None, **_):
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = number < self.layers


def divisors(batch_size: int) -> list[int]:
    """The micro-batch sizes that a batch size allows."""
    return [size for size in range(1, batch_size + 1) if batch_size % size == 0]


def print_header(
    run: RunFolder, base: Base, trainer: Trainer, at_once: str, checkpoint: Path | None, rows: dict, **more
) -> None:
    """What is about to be trained, on what, against what.

    Args:
        at_once: how much goes through the model at once, in words.
        checkpoint: where a resumed run goes on from.
        rows: counts, by what became of them.
        more: the stage's own lines.
    """
    model, settings, parent = run.recipe.model, run.settings, run.parent
    trainable, size = base.count_parameters()
    steps = planned_steps(settings, len(trainer.train_dataset))
    print_table(
        f"qalign {run.stage} → {run.path}",
        [
            ("model", f"{model.base} ({size / 1e6:,.0f} M parameters)"),
            ("held in", f"{model.quantization}, computing in {base.precision}"),
            ("chat template", base.template),
            ("trainable", f"{trainable:,} adapter parameters ({trainable / size:.2%} of the base), in float32"
             + (f", a copy of {parent}" if parent else "")),
            *more.items(),
            ("rows", ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in rows.items())),
            ("steps", f"{steps:,}, each of {settings.batch_size} {'rows' if run.stage == 'sft' else 'pairs'}"
             f", {at_once}"),
            *([("resuming", checkpoint or "from the beginning: no checkpoint was written")] if run.resume else []),
        ],
    )  # fmt: skip


def train_to_the_end(
    trainer: Trainer, run: RunFolder, journal: RunCallback, checkpoint: Path | None, at_once: str
) -> dict[str, float]:
    """Runs the loop, from a checkpoint if there is one.

    Args:
        at_once: how much goes through the model at once, in words.

    Returns:
        `steps` and `tokens` of the whole run; of this session `resumed_from`, `train_seconds`, `tokens_per_second`
        and `peak_bytes`.

    Raises:
        Stopped: the user or the system asked to stop; a checkpoint was written.
        UserError: the GPU's memory is too small, or the loss is not finite.
    """
    began, seen = time.monotonic(), journal.tokens_seen
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        smaller = "" if run.settings.micro_batch_size == 1 else f"{run.stage}.micro_batch_size=1, or else "
        raise UserError(
            f"out of GPU memory with {at_once} ({str(error).partition('. ')[0]}). "
            f"Try {smaller}model.max_length={run.recipe.model.max_length // 2}"
        ) from None
    if run.stop.number is not None and trainer.state.global_step < trainer.state.max_steps:
        print(f"stopped at step {trainer.state.global_step}; the checkpoint is {run.last_checkpoint()}")
        print(f"go on with: python -m qalign.{run.stage} {run.command_line} --resume", flush=True)
        raise Stopped(run.stop.number)
    seconds = time.monotonic() - began
    return {
        "steps": trainer.state.global_step,
        "resumed_from": str(checkpoint) if checkpoint else None,
        "train_seconds": round(seconds, 1),
        "tokens": journal.tokens_seen,
        "tokens_per_second": round((journal.tokens_seen - seen) / seconds, 1),
        "peak_bytes": peak_bytes(),
    }


def not_finite(trainer: Trainer, rows: list[str]) -> UserError:
    """What to say when the loss of these rows is not finite."""
    return UserError(
        f"step {trainer.state.global_step + 1}: the loss is not finite on {', '.join(dict.fromkeys(rows))}; the last "
        "checkpoint, if there is one, is kept. Try a lower learning_rate, or compute_dtype: bfloat16 or float32"
    )
