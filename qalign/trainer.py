"""The preference step inside `transformers.Trainer`: reference first, then the policy, then the loss.

Why not TRL's `DPOTrainer` itself: it casts the adapters of a quantised base to bfloat16, where updates at DPO's
learning rates round away; it expects an adapter named `default` and makes its own reference from it; and it replaces
the model's `forward`. This trainer takes the same `DPOConfig` and logs under the same names (docs/decisions.md).
"""

import math
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback
from trl import DPOConfig

from qalign.base import Base, Role
from qalign.batch import PairCollator
from qalign.errors import UserError
from qalign.journal import peak_bytes
from qalign.logps import pair_lengths, pair_logps
from qalign.losses import CHOSEN, REJECTED, preference_loss, rewards
from qalign.recipe import DPO, REFERENCE_FREE, Recipe
from qalign.run import TOKENS_SEEN, RunFolder, Stopped
from qalign.tokens import TokenPair


class PreferenceTrainer(Trainer):
    """Trains the policy of a `Base` on token pairs with any loss of `qalign.losses`.

    Args:
        base: with a policy that is trainable.
        settings: the recipe's `dpo` section: loss, beta and so on.
        args: TRL's config; batch sizes count pairs.
        train_pairs: `list[TokenPair]`.
        eval_pairs: the same, or None.
        tokens_seen: what the run that is resumed had seen.
    """

    # The loss of a micro-batch is divided by the pairs of the whole optimiser step (`num_items_in_batch`), so
    # 8 x 1 and 1 x 8 accumulation give one curve, the epoch's last short step included.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        base: Base,
        settings: DPO,
        args: DPOConfig,
        train_pairs: list[TokenPair],
        eval_pairs: list[TokenPair] | None = None,
        tokens_seen: int = 0,
        callbacks: tuple[TrainerCallback, ...] = (),
    ):
        self.base, self.settings, self.tokens_seen = base, settings, tokens_seen
        self._sums: dict[str, float] = defaultdict(float)
        super().__init__(
            model=base.model,
            args=args,
            data_collator=PairCollator(base.tokenizer.pad_token_id),
            train_dataset=train_pairs,
            eval_dataset=eval_pairs,
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)  # the Journal writes every log down

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimiser step, and its pairs."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(len(batch["where"]) for batch in batches)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Tensor:
        """Loss of one micro-batch: the sum over its pairs divided by the pairs of the optimiser step."""
        loss, metrics = self.pair_losses(inputs)
        if not torch.isfinite(loss).all():
            bad = [inputs["where"][number] for number in (~torch.isfinite(loss)).nonzero()[:, 0]]
            raise UserError(
                f"step {self.state.global_step + 1}: the loss is not finite on {', '.join(bad)}; the last checkpoint, "
                "if there is one, is kept. Try a lower learning_rate, or compute_dtype: bfloat16 or float32"
            )
        self._count(metrics, len(loss))
        self.tokens_seen += int(inputs["attention_mask"].sum()) if loss.requires_grad else 0
        total = loss.sum() / (num_items_in_batch or len(loss))
        if total.requires_grad:
            switches = self.base.switches

            def same_role(grad: Tensor) -> None:  # recomputed checkpoints would run under the wrong role, silently
                assert self.base.switches == switches, "the role was changed between forward and backward"

            total.register_hook(same_role)
        return total

    def pair_losses(self, inputs: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss `(pairs,)`, metrics of `(pairs,)` each under TRL's names) of a batch made by `PairCollator`."""
        settings, reference = self.settings, None
        lengths = pair_lengths(inputs)
        if settings.loss not in REFERENCE_FREE:
            with torch.no_grad(), self.base.acting_as(Role.REFERENCE) as lm:
                reference = pair_logps(lm, inputs)
        with self.base.acting_as(Role.POLICY) as lm:
            policy = pair_logps(lm, inputs)
        loss = preference_loss(
            settings.loss,
            policy,
            reference,
            lengths,
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
            gamma=0.5 if settings.gamma is None else settings.gamma,
            sft_weight=settings.sft_weight,
        )
        reward = rewards(policy.detach(), reference, lengths, settings.beta)
        return loss, {
            "rewards/chosen": reward[:, CHOSEN],
            "rewards/rejected": reward[:, REJECTED],
            "rewards/accuracies": (reward[:, CHOSEN] > reward[:, REJECTED]).float(),
            "rewards/margins": reward[:, CHOSEN] - reward[:, REJECTED],
            "logps/chosen": policy.detach()[:, CHOSEN],
            "logps/rejected": policy.detach()[:, REJECTED],
        }

    def _count(self, metrics: dict[str, Tensor], pairs: int) -> None:
        totals = torch.stack([values.double().sum() for values in metrics.values()]).tolist()  # one wait for the GPU
        for name, total in zip(metrics, totals, strict=True):
            self._sums[name] += total
        self._sums["pairs"] += pairs

    def _means(self, prefix: str = "") -> dict[str, float]:
        """Means over the pairs counted since the last call."""
        pairs = self._sums.pop("pairs", 0.0)
        means = {prefix + name: total / pairs for name, total in self._sums.items()}
        self._sums.clear()
        return means

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._means() | {"num_tokens": self.tokens_seen}
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Means over all pairs of the held-out rows, each pair counted once whatever its batch."""
        kept, self._sums = self._sums, defaultdict(float)
        self.model.eval()
        with torch.no_grad():
            for inputs in self.get_eval_dataloader(eval_dataset):
                loss, metrics = self.pair_losses(inputs)
                self._count({"loss": loss, **metrics}, len(loss))
        logs = self._means(f"{metric_key_prefix}_")
        self._sums = kept
        self.log(dict(logs))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Checkpoints hold the policy alone, as a plain adapter folder: base and reference never change."""
        folder = Path(output_dir or self.args.output_dir)
        self.base.save_policy(folder)
        (folder / TOKENS_SEEN).write_text(str(self.tokens_seen))


# --- settings --------------------------------------------------------------------------------------------------------


def training_config(recipe: Recipe, run: RunFolder, base: Base, pairs: list[TokenPair]) -> DPOConfig:
    """The recipe as TRL's config, in which `trainer:` has the last word.

    Raises:
        UserError: a value under `trainer:` that TRL refuses.
    """
    settings = getattr(recipe, run.stage)
    micro = micro_batch_size(settings, pairs)
    on_gpu = base.lm.device.type == "cuda"
    values = {
        "output_dir": str(run.checkpoints),
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": settings.batch_size // micro,
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
        "save_strategy": "steps",
        "save_steps": settings.save_every or max(1, planned_steps(settings, len(pairs)) // 10),
        "save_total_limit": 2,
        "seed": recipe.seed,
        "bf16": base.dtype == torch.bfloat16,
        "fp16": base.dtype == torch.float16,
        "use_cpu": not on_gpu,
        "activation_checkpointing": on_gpu,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "dataloader_pin_memory": on_gpu,
        "remove_unused_columns": False,
        "disable_tqdm": True,  # the Journal has its own bar
        "report_to": "none",
    }
    try:
        return DPOConfig(**values | settings.trainer)
    except (TypeError, ValueError) as error:
        raise UserError(f"{run.stage}.trainer: {' '.join(str(error).split())}") from None


def planned_steps(settings: DPO, pairs: int) -> int:
    """Optimiser steps of the whole run, as `Trainer` counts them."""
    return settings.max_steps or math.ceil(math.ceil(pairs / settings.batch_size) * settings.epochs)


def micro_batch_size(settings: DPO, pairs: list[TokenPair]) -> int:
    """Pairs in one forward pass: the recipe's, or for `auto` the largest divisor of `batch_size` whose padded rows
    stay under 4,096 tokens when the longest pairs meet."""
    if settings.micro_batch_size != "auto":
        return settings.micro_batch_size
    longest = max(len(pair) for pair in pairs)
    return max((size for size in divisors(settings.batch_size) if 2 * size * longest <= 4096), default=1)


def divisors(batch_size: int) -> list[int]:
    """The micro-batch sizes that a batch size allows."""
    return [size for size in range(1, batch_size + 1) if batch_size % size == 0]


# --- the loop --------------------------------------------------------------------------------------------------------


def train_to_the_end(trainer: PreferenceTrainer, run: RunFolder, checkpoint: Path | None) -> dict[str, float]:
    """Runs the loop, from a checkpoint if there is one.

    Returns:
        `steps` and `tokens` of the whole run; of this session `resumed_from`, `train_seconds`, `tokens_per_second`
        and `peak_bytes`.

    Raises:
        Stopped: the user or the system asked to stop; a checkpoint was written.
        UserError: the GPU's memory is too small, or the loss is not finite.
    """
    began, seen = time.monotonic(), trainer.tokens_seen
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        micro, longest = trainer.args.per_device_train_batch_size, max(map(len, trainer.train_dataset))
        fewer = [size for size in divisors(trainer.settings.batch_size) if size < micro]
        smaller = f"{run.stage}.micro_batch_size={fewer[-1]}" if fewer else f"model.max_length={longest // 2}"
        raise UserError(
            f"out of GPU memory with {micro} pairs of up to {longest} tokens at a time "
            f"({str(error).partition('. ')[0]}). Try {smaller}"
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
        "tokens": trainer.tokens_seen,
        "tokens_per_second": round((trainer.tokens_seen - seen) / seconds, 1),
        "peak_bytes": peak_bytes(),
    }
