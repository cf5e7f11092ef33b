"""The trainers of the stages: TRL's for SFT and the reward model, and the preference step in `transformers.Trainer`.

Why not TRL's `DPOTrainer` itself: it casts the adapters of a quantised base to bfloat16, where updates at DPO's
learning rates round away; it expects an adapter named `default` and makes its own reference from it; and it replaces
the model's `forward`. This trainer takes the same `DPOConfig` and logs under the same names (docs/decisions.md).
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
import trl
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback

from qalign.base import Base, Role
from qalign.batch import PairCollator
from qalign.errors import UserError
from qalign.logps import pair_lengths, pair_logps
from qalign.losses import CHOSEN, REJECTED, preference_loss, rewards
from qalign.recipe import DPO, REFERENCE_FREE
from qalign.tokens import IGNORED, TokenDialogue, TokenPair


class PreferenceTrainer(Trainer):
    """Trains the policy of a `Base` on token pairs with any loss of `qalign.losses`.

    Args:
        base: with a policy that is trainable.
        settings: the recipe's `dpo` section: loss, beta and so on.
        args: TRL's config; batch sizes count pairs.
        train_pairs: `list[TokenPair]`.
        eval_pairs: the same, or None.
        callbacks: for `Trainer`.
    """

    # The loss of a micro-batch is divided by the pairs of the whole optimiser step (`num_items_in_batch`), so
    # 8 x 1 and 1 x 8 accumulation give one curve, the epoch's last short step included.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        base: Base,
        settings: DPO,
        args: trl.DPOConfig,
        train_pairs: list[TokenPair],
        eval_pairs: list[TokenPair] | None = None,
        callbacks: tuple[TrainerCallback, ...] = (),
    ):
        self.base, self.settings, self.tokens_seen = base, settings, 0
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
            raise _not_finite(self, [inputs["where"][number] for number in (~torch.isfinite(loss)).nonzero()[:, 0]])
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
        self.base.save_adapter(Role.POLICY, Path(output_dir or self.args.output_dir))


class SupervisedTrainer(trl.SFTTrainer):
    """TRL's `SFTTrainer` on ready-made ids, with float32 adapters and checkpoints that are plain adapter folders.

    Args:
        base: with a policy that is trainable.
        args: TRL's config.
        train_rows: `list[TokenDialogue]`.
        eval_rows: the same, or None; never packed.
        callbacks: for `Trainer`.
    """

    def __init__(
        self,
        base: Base,
        args: trl.SFTConfig,
        train_rows: list[TokenDialogue],
        eval_rows: list[TokenDialogue] | None,
        callbacks: tuple[TrainerCallback, ...] = (),
    ):
        self.base, self._places = base, {tuple(row.ids): row.where for row in train_rows}
        columns = lambda rows: {"input_ids": [r.ids for r in rows], "labels": [r.labels for r in rows]}  # noqa: E731
        with float32_kept(base.model):
            super().__init__(
                model=base.model,
                args=args,
                train_dataset=datasets.Dataset.from_dict(columns(train_rows)),
                eval_dataset=datasets.Dataset.from_dict(columns(eval_rows)) if eval_rows else None,
                processing_class=base.tokenizer,
                callbacks=list(callbacks),
            )
        self.remove_callback(PrinterCallback)  # the Journal writes every log down

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss: the mean over all supervised tokens of the optimiser step."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not torch.isfinite(found[0] if return_outputs else found):
            raise _not_finite(self, [self._places.get(ids, "a held-out row") for ids in _sequences(inputs)])
        return found

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The mean over all supervised tokens of the held-out rows. (`Trainer`'s is a mean of its batches' means, so it
        would depend on the batch size.)"""
        self.model.eval()
        total, tokens = 0.0, 0
        with torch.no_grad(), self.accelerator.autocast():
            for inputs in self.get_eval_dataloader(eval_dataset):
                tokens += int((inputs["labels"][:, 1:] != IGNORED).sum())
                total += self.compute_loss(self.model, inputs, num_items_in_batch=1).item()
        logs = {f"{metric_key_prefix}_loss": total / max(1, tokens)}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Checkpoints hold the adapter alone, as a plain adapter folder."""
        self.base.save_adapter(Role.POLICY, Path(output_dir or self.args.output_dir))

    def create_model_card(self, *args, **kwargs) -> None:
        """The run folder has its own."""


class RewardModelTrainer(trl.RewardTrainer):
    """TRL's `RewardTrainer` on ready-made ids, with a float32 adapter and head and plain checkpoints.

    Args:
        base: a classifier with a reward adapter that is trainable.
        args: TRL's config; batch sizes count pairs.
        train_pairs: `list[TokenPair]`.
        eval_pairs: the same, or None.
        margins: whether each pair's `margin` enters the loss.
        callbacks: for `Trainer`.
    """

    # As in PreferenceTrainer: a step's loss is the mean over its pairs, however they are split into micro-batches.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        base: Base,
        args: trl.RewardConfig,
        train_pairs: list[TokenPair],
        eval_pairs: list[TokenPair] | None,
        *,
        margins: bool,
        callbacks: tuple[TrainerCallback, ...] = (),
    ):
        self.base = base
        self._places = {
            tuple(pair.prompt_ids + ids): pair.where
            for pair in train_pairs
            for ids in (pair.chosen_ids, pair.rejected_ids)
        }

        def dataset(pairs: list[TokenPair]) -> datasets.Dataset:
            columns = {
                "chosen_ids": [pair.prompt_ids + pair.chosen_ids for pair in pairs],
                "rejected_ids": [pair.prompt_ids + pair.rejected_ids for pair in pairs],
            }
            return datasets.Dataset.from_dict(columns | ({"margin": [p.margin for p in pairs]} if margins else {}))

        with float32_kept(base.model):
            super().__init__(
                model=base.model,
                args=args,
                train_dataset=dataset(train_pairs),
                eval_dataset=dataset(eval_pairs) if eval_pairs else None,
                processing_class=base.tokenizer,
                callbacks=list(callbacks),
            )
        self.remove_callback(PrinterCallback)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimiser step, and its pairs."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(len(batch["input_ids"]) // 2 for batch in batches)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss, a mean over a micro-batch, weighted by the micro-batch's share of the step."""
        pairs = len(inputs["input_ids"]) // 2
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if not torch.isfinite(loss):
            raise _not_finite(self, [self._places.get(ids, "a held-out row") for ids in _sequences(inputs)])
        loss = loss * (pairs / num_items_in_batch if num_items_in_batch else 1)
        return (loss, outputs) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Checkpoints hold the adapter and its head alone, as a plain adapter folder."""
        self.base.save_adapter(Role.REWARD, Path(output_dir or self.args.output_dir))

    def create_model_card(self, *args, **kwargs) -> None:
        """The run folder has its own."""


@contextmanager
def float32_kept(model: nn.Module) -> Iterator[None]:
    """TRL's trainers cast the adapters of a quantised base to bfloat16, where small updates round away: gives each
    trainable weight back as it was."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.data = weights[name]


def _sequences(inputs: dict) -> Iterator[tuple[int, ...]]:
    """The rows of a batch as ids, from padded rows or one packed row."""
    if "attention_mask" in inputs:
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            yield tuple(ids[mask.bool()].tolist())
    else:
        starts = (inputs["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            yield tuple(inputs["input_ids"][0, start:end].tolist())


def _not_finite(trainer: Trainer, rows: list[str]) -> UserError:
    return UserError(
        f"step {trainer.state.global_step + 1}: the loss is not finite on {', '.join(dict.fromkeys(rows))}; the last "
        "checkpoint, if there is one, is kept. Try a lower learning_rate, or compute_dtype: bfloat16 or float32"
    )
