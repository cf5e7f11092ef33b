"""A stage's settings as a memory plan, a micro-batch and TRL's config."""

import math
from typing import Any, Literal

import torch
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.reward_config import RewardConfig
from trl.trainer.sft_config import SFTConfig

from qalign.config.stages import PPO, SFT, Stage
from qalign.data.collate import MicroBatchLimit
from qalign.errors import UserError
from qalign.model.base import Base
from qalign.model.memory import Forecast, Plan, usable_memory
from qalign.train.run_folder import RunFolder

CONFIGS = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig}


def training_config(run: RunFolder, base: Base, rows: int, checkpointed: int, **special: Any) -> Any:
    """The recipe as TRL's config of the stage; values under `trainer:` override all others.

    Args:
        rows: rows that the trainer takes at once. (Trainers of pairs take a whole step's, and split it themselves.)
        checkpointed: number of layers with gradient checkpointing.
        special: arguments that only this stage's config has.

    Raises:
        UserError: TRL refuses a value under `trainer:`.
    """
    settings, on_gpu = run.settings, base.lm.device.type == "cuda"
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
        "disable_tqdm": True,  # RunCallback has its own bar
        "report_to": "none",
        "max_length": run.recipe.model.max_length,
    }
    try:
        return CONFIGS[run.stage](**values | special | settings.trainer)
    except (TypeError, ValueError) as error:
        raise UserError(f"{run.stage}.trainer: {' '.join(str(error).split())}") from None


def planned_steps(settings: Stage, rows: int) -> int:
    """Steps of the whole run: optimiser steps, counted as `Trainer` counts them; for PPO iterations."""
    if isinstance(settings, PPO):
        batches = rows * settings.epochs * settings.samples_per_prompt / settings.batch_size
    else:
        batches = math.ceil(rows / settings.batch_size) * settings.epochs
    return settings.max_steps or math.ceil(batches)


def plan(run: RunFolder, base: Base, longest: int, other_bytes: int = 0) -> Plan:
    """Resolves the `auto` settings of a stage for this base and this device.

    Args:
        longest: tokens of the longest row; of a pair, both answers with the prompt once.
        other_bytes: memory of models next to the base.

    Raises:
        UserError: not even the longest row fits.
    """
    settings, device = run.settings, base.lm.device.type
    size, layers = rows_at_once(settings), settings.checkpointed_layers
    if size != "auto" and (device == "cpu" or layers != "auto"):  # nothing to find out
        return Plan(size * longest, 0 if layers == "auto" else layers)
    forecast = Forecast(run.recipe, run.stage, base.lm.config, device, base.dtype)
    memory = usable_memory(device) - (other_bytes if device == "cuda" else 0)  # on a CPU it leaves them out already
    found = forecast.plan(memory, longest if size == "auto" else size * longest)
    if found is None and size != "auto":  # the user's choice: it may fit in spite of the forecast
        found = Plan(size * longest, forecast.layers)
    if found is None:
        needed = forecast.total(longest, forecast.layers) / 2**30
        raise UserError(
            f"{run.stage}: the longest row ({longest:,} tokens) would take {needed:.1f} GiB of the "
            f"{memory / 2**30:.1f} GiB there are; python -m qalign.fit {run.command_line} says what would fit"
        )
    return found


def rows_at_once(settings: Stage) -> int | Literal["auto"]:
    """The recipe's `micro_batch_size` in rows; PPO counts answers there, and its rows are prompts."""
    size = settings.micro_batch_size
    return size // settings.samples_per_prompt if isinstance(settings, PPO) and size != "auto" else size


def micro_batch(settings: Stage, planned: Plan, longest: int) -> MicroBatchLimit:
    """How much one forward pass takes. SFT's rows are padded to the longest one, so for `auto` it takes the largest
    divisor of `batch_size` with which a micro-batch of the longest rows stays within the plan."""
    size = rows_at_once(settings)
    if size == "auto" and not isinstance(settings, SFT):
        return MicroBatchLimit(tokens=planned.tokens)
    if size == "auto":
        sizes = [size for size in range(1, settings.batch_size + 1) if settings.batch_size % size == 0]
        size = max((size for size in sizes if size * longest <= planned.tokens), default=1)
    return MicroBatchLimit(pairs=size)
