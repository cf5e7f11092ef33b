"""What the trainers of all stages share: a schedule that counts from 1, the check for NaN, adapters as checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainingArguments, get_scheduler

from qalign.errors import not_finite
from qalign.model.base import Base, Role


class AdapterTrainer(Trainer):
    """A `Trainer` of one adapter on a base that never changes.

    Attributes:
        base: the base with the adapter on it.
        trained: the role of the adapter.
    """

    base: Base
    trained: Role = Role.POLICY

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """The recipe's schedule, counted from 1."""
        if self.lr_scheduler is None:
            used, kind = cast(Optimizer, optimizer or self.optimizer), cast(str, self.args.lr_scheduler_type)
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = schedule_from_one(kind, used, warmup, num_training_steps, self.args)
        return self.lr_scheduler

    def check_finite(self, losses: Tensor, rows: Sequence[str]) -> None:
        """Raises a `UserError` that names the rows whose loss `(rows,)` is not finite; one loss blames all rows."""
        wrong = (~torch.isfinite(losses.detach())).flatten().tolist()
        if any(wrong):
            blamed = rows if len(wrong) == 1 else [row for row, bad in zip(rows, wrong, strict=True) if bad]
            step, what = self.state.global_step, "the held-out loss is"
            if torch.is_grad_enabled():
                step, what = step + 1, "the loss is"
            raise not_finite(f"step {step}", what, blamed)

    def evaluated(self, logs: dict[str, float]) -> dict[str, float]:
        """Logs the figures of the held-out rows, and tells the callbacks; returns the figures."""
        self.log(dict(logs))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Checkpoints hold the trained adapter alone, as a plain adapter folder: the base never changes."""
        self.base.save_adapter(self.trained, Path(output_dir or self.args.output_dir or ""))


def schedule_from_one(kind: str, optimizer: Optimizer, warmup: int, steps: int, args: TrainingArguments) -> LRScheduler:
    """A schedule of transformers in which the first step is number 1, and not number 0.

    transformers counts from 0, so a warm-up begins with a learning rate of 0: the rows of that step teach nothing, and
    a run of one step leaves the adapter as it was. Here the rate of step k of N is transformers' rate at step k of
    N + 1: no step has the rate 0, the last one included.

    Args:
        kind: `linear`, `cosine` and so on.
        warmup: number of the step that has the peak learning rate; 0 for the first.
        steps: number of all steps.
        args: with `lr_scheduler_kwargs`, further arguments of the schedule.

    Raises:
        TypeError: the schedule doesn't take such an argument.
        ValueError: an argument has a value that it can't take.
    """
    options: Any = args.lr_scheduler_kwargs
    schedule = get_scheduler(kind, optimizer, warmup, steps + 1, scheduler_specific_kwargs=options)
    if not isinstance(schedule, LambdaLR):  # it follows the held-out loss, from the peak learning rate
        return schedule
    shares = [lambda step, share=share: share(step + 1) for share in schedule.lr_lambdas]
    return LambdaLR(schedule.optimizer, shares)
