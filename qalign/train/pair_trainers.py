"""The trainers that learn from pairs: a policy from preferences, and a reward model from the same.

Both take the pairs of an optimiser step at once and run them in micro-batches of roughly equal token counts, packed so
that a shared prompt is computed once. They take TRL's configs and log under TRL's names; docs/decisions.md says why
they are not TRL's `DPOTrainer` and `RewardTrainer`.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from qalign.config.stages import DPO, REFERENCE_FREE, Reward
from qalign.data.collate import MicroBatchLimit
from qalign.data.tokenize import TokenPair
from qalign.losses.ensemble import member_seed, resample_counts
from qalign.losses.preference import CHOSEN, REJECTED, bradley_terry, margin, preference_loss, rewards, shares
from qalign.model.adapters.members import Ensemble, member_roles, places
from qalign.model.base import Base, Role
from qalign.model.logps import pair_logps
from qalign.model.reference import ReferenceLogps
from qalign.train.adapter_trainer import AdapterTrainer
from qalign.train.callbacks import ClipEach


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
        found = scores.detach()
        metrics = {"mean_reward": found.mean(dim=1), "accuracy": shares(margin(found)), "margin": margin(found)}
        return self.losses(scores, pairs), metrics

    def losses(self, scores: Tensor, pairs: Sequence[Any]) -> Tensor:
        """The loss `(pairs,)` of scores `(pairs, 2)`."""
        margins = torch.tensor([pair.margin for pair in pairs]).to(scores) if self.settings.margin else None
        return bradley_terry(scores, margins, centering=self.settings.centering)


class EnsembleTrainer(RewardModelTrainer):
    """Trains the members of an ensemble of reward models at once, each as it would be trained alone on its resample of
    the pairs: what is added up is the sum over members, and gradients are clipped member by member.

    Metrics are means over the members.
    """

    def __init__(self, base: Base, settings: Reward, args: TrainingArguments, micro: Any, pairs: list, *more: Any):
        self.ensemble, self._only = Ensemble(base, member_roles(settings)), slice(None)
        seeds = (member_seed(args.seed, number) for number in range(1, settings.members + 1))
        counts = torch.stack([resample_counts(len(pairs), seed) for seed in seeds], dim=1).tolist()
        pairs = [replace(pair, counts=tuple(own)) for pair, own in zip(pairs, counts, strict=True)]
        clip, args.max_grad_norm = args.max_grad_norm, 0.0
        super().__init__(base, settings, args, micro, pairs, *more)
        self.add_callback(ClipEach([[*base.trained_weights(role).values()] for role in self.ensemble.roles], clip))

    def train(self, *args, **kwargs):
        with self.ensemble.open():
            found = super().train(*args, **kwargs)
        if self.args.load_best_model_at_end and (best := self.state.best_model_checkpoint):
            for role, folder in places(self.ensemble.roles, Path(best)).items():  # `Trainer` looks for one adapter
                self.base.restore_adapter(role, folder)
        return found

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.base.train_again()  # a checkpoint that was loaded has left only the active adapter trainable
        return super().create_optimizer(model)

    def training_step(self, model, inputs: Any, num_items_in_batch=None) -> Tensor:
        roles, before = self.ensemble.roles, self.tokens_seen
        if not self.ensemble.reason:
            return super().training_step(model, inputs, num_items_in_batch) / len(roles)
        total = torch.zeros((), device=self.args.device)
        for number, role in enumerate(roles):
            self._only, self.tokens_seen = slice(number, number + 1), before
            with self.base.acting_as(role):  # the backward pass inside: checkpointed layers run again in this role
                total = total + super().training_step(model, inputs, num_items_in_batch) / len(roles)
        self._only = slice(None)
        return total

    def pair_losses(self, pairs: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        roles = self.ensemble.roles[self._only]
        if len(roles) == 1:
            scores = self.base.pair_scores(roles[0], pairs)[..., None]
        else:
            scores = self.ensemble.pair_scores(pairs)
        each = torch.stack([self.losses(own, pairs) for own in scores.unbind(dim=-1)], dim=1)
        found = scores.detach()
        gaps = found[:, CHOSEN] - found[:, REJECTED]
        metrics = {
            "mean_reward": found.mean(dim=(1, 2)),
            "accuracy": shares(gaps).mean(dim=1),
            "margin": gaps.mean(dim=1),
        }
        if not torch.is_grad_enabled():
            return each.mean(dim=1), metrics
        counts = torch.tensor([pair.counts[self._only] for pair in pairs]).to(each)
        return (counts * each).sum(dim=1), metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        for role, folder in places(self.ensemble.roles, Path(output_dir or self.args.output_dir or "")).items():
            self.base.save_adapter(role, folder)


def _tokens(pair: TokenPair) -> int:
    """Tokens of a pair as TRL counts them: the prompt once with each answer."""
    return 2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)
