"""The trainers that learn from pairs: a policy's preferences, and a reward model's scores.

Both read an optimiser step's pairs at once and run them in micro-batches of like many tokens, packed so that what the
two answers share is computed once. Why not TRL's `DPOTrainer` and `RewardTrainer`: docs/decisions.md. These take the
same configs and log under the same names.
"""

from collections import defaultdict
from pathlib import Path

import torch
import trl
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback

from qalign.config.stages import DPO, REFERENCE_FREE, Reward
from qalign.data.collate import MicroBatchLimit
from qalign.data.tokenize import TokenPair
from qalign.losses import CHOSEN, REJECTED, bradley_terry, preference_loss, rewards
from qalign.model.base import Base, Role
from qalign.model.logps import pair_logps
from qalign.model.reference import ReferenceLogps
from qalign.train.loop import not_finite


class PairTrainer(Trainer):
    """The loop that both share: `pair_losses` is what they differ in.

    Args:
        base: with a trainable adapter for the role.
        role: the part that is trained.
        args: TRL's config. Its batch sizes count pairs of an optimiser step, its gradient accumulation is 1.
        micro: how much one forward pass takes; changes memory and speed, and no number.
        train_pairs: `list[TokenPair]`.
        eval_pairs: the same, or None.
        callbacks: for `Trainer`.
    """

    # The loss of a micro-batch is divided by the pairs of the whole optimiser step (`num_items_in_batch`), so
    # 8 x 1 and 1 x 8 give one curve, the epoch's last short step included.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        base: Base,
        role: Role,
        args,
        micro: MicroBatchLimit,
        train_pairs: list[TokenPair],
        eval_pairs: list[TokenPair] | None = None,
        callbacks: tuple[TrainerCallback, ...] = (),
    ):
        self.base, self.trained, self.micro, self.tokens_seen = base, role, micro, 0
        self._sums: dict[str, float] = defaultdict(float)
        super().__init__(
            model=base.model,
            args=args,
            data_collator=list,  # the pairs themselves; tensors are made of a micro-batch at a time
            train_dataset=train_pairs,
            eval_dataset=eval_pairs,
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)  # the RunCallback writes every log down

    def pair_losses(self, pairs: list[TokenPair]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss `(pairs,)`, metrics of `(pairs,)` each under TRL's names), inside `base.packed_attention()`."""
        raise NotImplementedError

    def train(self, *args, **kwargs):
        with self.base.packed_attention():  # to the end: backward may compute the forward again
            return super().train(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The pairs of one optimiser step, as one batch, and how many they are."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(map(len, batches))

    def training_step(self, model, inputs: list[TokenPair], num_items_in_batch=None) -> Tensor:
        """Forward and backward of one optimiser step, a micro-batch at a time."""
        total = 0.0
        for pairs in self.base.micro_batches(inputs, self.micro):
            total = total + super().training_step(model, pairs, num_items_in_batch)
        return total

    def compute_loss(self, model, inputs: list[TokenPair], return_outputs=False, num_items_in_batch=None) -> Tensor:
        """Loss of one micro-batch: the sum over its pairs divided by the pairs of the optimiser step."""
        loss, metrics = self.pair_losses(inputs)
        if not torch.isfinite(loss).all():
            raise not_finite(self, [inputs[number].where for number in (~torch.isfinite(loss)).nonzero()[:, 0]])
        self._count(metrics, len(loss))
        self.tokens_seen += sum(map(_tokens, inputs)) if loss.requires_grad else 0
        total = loss.sum() / (num_items_in_batch or len(loss))
        if total.requires_grad:
            switches = self.base.role_switches

            def same_role(grad: Tensor) -> None:  # recomputed checkpoints would run under the wrong role, silently
                assert self.base.role_switches == switches, "the role was changed between forward and backward"

            total.register_hook(same_role)
        return total

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
        with torch.no_grad(), self.base.packed_attention():
            for inputs in self.get_eval_dataloader(eval_dataset):
                for pairs in self.base.micro_batches(inputs, self.micro):
                    loss, metrics = self.pair_losses(pairs)
                    self._count({"loss": loss, **metrics}, len(loss))
        logs = self._means(f"{metric_key_prefix}_")
        self._sums = kept
        self.log(dict(logs))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def floating_point_ops(self, inputs) -> int:
        """Not counted: transformers' estimate knows no frozen weights."""
        return 0

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Checkpoints hold the trained adapter alone, as a plain adapter folder: the base never changes."""
        self.base.save_adapter(self.trained, Path(output_dir or self.args.output_dir))


class PreferenceTrainer(PairTrainer):
    """Trains the policy on pairs with any loss of `qalign.losses`.

    Args:
        settings: the recipe's `dpo` section: loss, beta and so on.
        references: where log-probs of the reference come from, for losses that need them.
        more: as `PairTrainer`.
    """

    def __init__(self, base: Base, settings: DPO, references: ReferenceLogps, args: trl.DPOConfig, *more, **named):
        self.settings, self.references = settings, references
        super().__init__(base, Role.POLICY, args, *more, **named)

    def pair_losses(self, pairs: list[TokenPair]) -> tuple[Tensor, dict[str, Tensor]]:
        settings, batch = self.settings, self.base.batch(pairs)
        reference = None if settings.loss in REFERENCE_FREE else self.references.logps(self.base, pairs, batch)
        with self.base.acting_as(Role.POLICY) as lm:
            policy = pair_logps(lm, batch)
        loss = preference_loss(
            settings.loss,
            policy,
            reference,
            batch.lengths,
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
            gamma=0.5 if settings.gamma is None else settings.gamma,
            sft_weight=settings.sft_weight,
        )
        reward = rewards(policy.detach(), reference, batch.lengths, settings.beta)
        return loss, {
            "rewards/chosen": reward[:, CHOSEN],
            "rewards/rejected": reward[:, REJECTED],
            "rewards/accuracies": (reward[:, CHOSEN] > reward[:, REJECTED]).float(),
            "rewards/margins": reward[:, CHOSEN] - reward[:, REJECTED],
            "logps/chosen": policy.detach()[:, CHOSEN],
            "logps/rejected": policy.detach()[:, REJECTED],
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        self.references.save()


class RewardModelTrainer(PairTrainer):
    """Trains a reward model so that the chosen answer of a pair scores higher.

    Args:
        settings: the recipe's `reward` section: margin, centering.
        more: as `PairTrainer`.
    """

    def __init__(self, base: Base, settings: Reward, args: trl.RewardConfig, *more, **named):
        self.settings = settings
        super().__init__(base, Role.REWARD, args, *more, **named)

    def pair_losses(self, pairs: list[TokenPair]) -> tuple[Tensor, dict[str, Tensor]]:
        scores = self.base.pair_scores(Role.REWARD, pairs)
        margins = torch.tensor([pair.margin for pair in pairs]).to(scores) if self.settings.margin else None
        loss = bradley_terry(scores, margins, centering=self.settings.centering)
        found = scores.detach()
        return loss, {
            "mean_reward": found.mean(dim=1),
            "accuracy": (found[:, CHOSEN] > found[:, REJECTED]).float(),
            "margin": found[:, CHOSEN] - found[:, REJECTED],
        }


def _tokens(pair: TokenPair) -> int:
    """A pair's tokens as TRL counts them, the prompt with each answer."""
    return 2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)
