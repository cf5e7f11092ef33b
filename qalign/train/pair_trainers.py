"""The trainers that learn from pairs: a policy from preferences, and a reward model from the same.

Both take the pairs of an optimiser step at once and run them in micro-batches of roughly equal token counts, packed so
that a shared prompt is computed once. They take TRL's configs and log under TRL's names; docs/decisions.md says why
they are not TRL's `DPOTrainer` and `RewardTrainer`.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from qalign.config.stages import DPO, REFERENCE_FREE, Reward
from qalign.data.collate import MicroBatchLimit
from qalign.data.tokenize import TokenPair
from qalign.losses.preference import CHOSEN, REJECTED, bradley_terry, margin, preference_loss, rewards, shares
from qalign.model.base import Base, Role
from qalign.model.logps import pair_logps
from qalign.model.reference import ReferenceLogps
from qalign.train.adapter_trainer import AdapterTrainer


class PairTrainer(AdapterTrainer):
    """The loop that both share; a subclass defines `pair_losses`."""

    counters = ("tokens_seen", "_sums", "_unread")

    def __init__(
        self,
        base: Base,
        role: Role,
        args: TrainingArguments,
        micro: MicroBatchLimit,
        train_pairs: list[TokenPair],
        eval_pairs: list[TokenPair] | None = None,
        callbacks: tuple[TrainerCallback, ...] = (),
    ):
        self.base, self.trained, self.tokens_seen = base, role, 0
        self.take(micro)
        self._sums: dict[str, float] = defaultdict(float)
        self._unread: list[tuple[list[str], Tensor, dict[str, Tensor]]] = []  # where pairs come from, losses, metrics
        # `list` as the collator passes pairs on as they are; tensors are made for one micro-batch at a time.
        data: dict[str, Any] = {"data_collator": list, "train_dataset": train_pairs, "eval_dataset": eval_pairs}
        super().__init__(base.model, args, **data, callbacks=list(callbacks))
        self.remove_callback(PrinterCallback)  # RunCallback writes the logs

    def pair_losses(self, pairs: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss `(pairs,)`, metrics `(pairs,)` by TRL's names), within `base.packed_attention()`."""
        raise NotImplementedError

    def train(self, *args, **kwargs):
        with self.base.packed_attention():  # to the end: the backward pass may recompute the forward pass
            return super().train(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """(the pairs of one optimiser step as one batch, their number)."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(map(len, batches))

    def training_step(self, model, inputs: Any, num_items_in_batch=None) -> Tensor:
        total = super().training_step(model, inputs, num_items_in_batch)
        self._read()
        return total

    def compute_loss(self, model, inputs: Any, return_outputs=False, num_items_in_batch=None) -> Tensor:
        """The loss of one micro-batch: the sum over its pairs, divided by the pairs of the optimiser step."""
        loss, metrics = self.pair_losses(inputs)
        self._unread.append(([pair.where for pair in inputs], loss.detach(), metrics))
        total = loss.sum() / (num_items_in_batch or len(loss))
        if total.requires_grad:
            self.tokens_seen += sum(map(_tokens, inputs))
            switches = self.base.role_switches

            def check_role(grad: Tensor) -> None:
                if self.base.role_switches != switches:  # recomputed layers would silently use another adapter
                    raise RuntimeError("the role was changed between forward and backward")

            total.register_hook(check_role)
        return total

    def _read(self) -> None:
        """Checks the losses of all micro-batches since the last call, and adds up their metrics. Waits for the GPU once
        a step: a wait in each micro-batch would leave it idle until the next one is launched."""
        if not self._unread:
            return
        rows, losses, metrics = zip(*self._unread, strict=True)
        self._unread = []
        sums = [torch.cat([each[name] for each in metrics]).double().sum(dim=0, keepdim=True) for name in metrics[0]]
        found = torch.cat([*losses, *sums]).tolist()
        pairs = len(found) - len(sums)
        self.check_finite(found[:pairs], [*chain(*rows)])
        for name, total in zip(metrics[0], found[pairs:], strict=True):
            self._sums[name] += total
        self._sums["pairs"] += pairs

    def _means(self, prefix: str = "") -> dict[str, float]:
        """Means over the pairs counted since the last call."""
        self._read()
        pairs = self._sums.pop("pairs", 0.0)
        means = {prefix + name: total / pairs for name, total in self._sums.items()}
        self._sums.clear()
        return means

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._means() | {"num_tokens": self.tokens_seen}
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Means over all held-out pairs; each pair counts once, whatever its batch."""
        kept, self._sums = self._sums, defaultdict(float)
        self.base.model.eval()
        with torch.no_grad(), self.base.packed_attention():
            for inputs in self.get_eval_dataloader(eval_dataset):
                for pairs in self.micro_batches(inputs):
                    loss, metrics = self.pair_losses(pairs)
                    self._unread.append(([pair.where for pair in pairs], loss, {"loss": loss, **metrics}))
                self._read()
        logs = self._means(f"{metric_key_prefix}_")
        self._sums = kept
        return self.evaluated(logs)

    def floating_point_ops(self, inputs) -> int:
        """Not counted: transformers' estimate ignores that weights are frozen."""
        return 0


class PreferenceTrainer(PairTrainer):
    """Trains the policy with any preference loss of `qalign.losses`; `settings` is the recipe's `dpo` section, and
    `references` gives the reference's log-probs."""

    def __init__(self, base: Base, settings: DPO, references: ReferenceLogps, *more: Any, **named: Any):
        self.settings, self.references = settings, references
        super().__init__(base, Role.POLICY, *more, **named)

    def pair_losses(self, pairs: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        settings, batch = self.settings, self.base.batch(pairs)
        reference = None if settings.loss in REFERENCE_FREE else self.references.logps(self.base, list(pairs), batch)
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
        logps = policy.detach()
        reward = rewards(settings.loss, logps, reference, batch.lengths, settings.beta)
        return loss, {
            "rewards/chosen": reward[:, CHOSEN],
            "rewards/rejected": reward[:, REJECTED],
            "rewards/accuracies": shares(margin(reward)),
            "rewards/margins": margin(reward),
            "logps/chosen": logps[:, CHOSEN],
            "logps/rejected": logps[:, REJECTED],
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        self.references.save()


class RewardModelTrainer(PairTrainer):
    """Trains a reward model so that the chosen answer scores higher; `settings` is the recipe's `reward` section."""

    def __init__(self, base: Base, settings: Reward, *more: Any, **named: Any):
        self.settings = settings
        super().__init__(base, Role.REWARD, *more, **named)

    def pair_losses(self, pairs: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        scores = self.base.pair_scores(Role.REWARD, pairs)
        margins = torch.tensor([pair.margin for pair in pairs]).to(scores) if self.settings.margin else None
        loss = bradley_terry(scores, margins, centering=self.settings.centering)
        found = scores.detach()
        return loss, {"mean_reward": found.mean(dim=1), "accuracy": shares(margin(found)), "margin": margin(found)}


def _tokens(pair: TokenPair) -> int:
    """Tokens of a pair as TRL counts them: the prompt once with each answer."""
    return 2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)
