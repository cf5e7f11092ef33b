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

from qalign.config.stages import DPO, Reward
from qalign.data.collate import MicroBatchLimit
from qalign.data.tokenize import TokenPair
from qalign.losses.ensemble import member_seed, resample_counts
from qalign.losses.preference import CHOSEN, REJECTED, PreferenceLoss, bradley_terry, margin, shares
from qalign.model.adapters.members import Ensemble, member_roles, places
from qalign.model.base import Base, Role
from qalign.model.logps import pair_logps
from qalign.model.reference import ReferenceLogps
from qalign.train.adapter_trainer import AdapterTrainer
from qalign.train.callbacks import ClipEach

SHIFT = "rewards/shift"  # in the logs


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
        self.after_step(self._read())
        return total

    def after_step(self, sums: dict[str, float]) -> None:
        """Called with the sums of the step's metrics over its `pairs`."""

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

    def _read(self) -> dict[str, float]:
        """Checks the losses of all micro-batches since the last call, and adds up their metrics, whose sums
        it returns. Waits for the GPU once a step: a wait in each micro-batch would leave it idle until the next one."""
        if not self._unread:
            return {}
        rows, losses, metrics = zip(*self._unread, strict=True)
        self._unread = []
        sums = [torch.cat([each[name] for each in metrics]).double().sum(dim=0, keepdim=True) for name in metrics[0]]
        found = torch.cat([*losses, *sums]).tolist()
        pairs = len(found) - len(sums)
        self.check_finite(found[:pairs], [*chain(*rows)])
        read: dict[str, float] = {"pairs": pairs, **dict(zip(metrics[0], found[pairs:], strict=True))}
        for name, total in read.items():
            self._sums[name] += total
        return read

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
                groups = self.micro_batches(inputs)
                self.look_ahead(groups)
                for pairs in groups:
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
        self.loss = PreferenceLoss(**settings.loss_options)
        self.shift: float | None = None  # BCO's delta; None before it is known whether the run is resumed
        self._ahead: dict[int, tuple[Tensor, Tensor]] = {}
        super().__init__(base, Role.POLICY, *more, **named)

    def look_ahead(self, groups: Sequence[Any]) -> None:
        """Where a pair's loss depends on the other pairs of the step, finds it and its gradient by the log-probs in a
        pass of its own, so that micro-batches change no number. Evaluation compares the pairs of a batch."""
        self._ahead = {}
        if not self.settings.compares_pairs or len(groups) == 1:
            return
        with torch.no_grad():
            found = [self._logps(group) for group in groups]
        policy, reference, lengths, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        with torch.enable_grad():
            loss = self.loss(policy.requires_grad_(), reference, lengths, labels)
            (slopes,) = torch.autograd.grad(loss.sum(), policy)
        sizes = [len(group) for group in groups]
        for group, values, slope in zip(groups, loss.detach().split(sizes), slopes.split(sizes), strict=True):
            self._ahead[id(group[0])] = values, slope

    def pair_losses(self, pairs: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        policy, reference, lengths, labels = self._logps(pairs)
        logps = policy.detach()
        if ahead := self._ahead.get(id(pairs[0])):
            values, slopes = ahead
            loss = values + (slopes * (policy - logps)).sum(dim=1)
        else:
            loss = self.loss(policy, reference, lengths, labels, self.shift or 0.0)
        reward = self.loss.rewards(logps, reference, lengths)
        return loss, {
            "rewards/chosen": reward[:, CHOSEN],
            "rewards/rejected": reward[:, REJECTED],
            "rewards/accuracies": shares(margin(reward), labels),
            "rewards/margins": margin(reward),
            "logps/chosen": logps[:, CHOSEN],
            "logps/rejected": logps[:, REJECTED],
        }

    def _logps(self, pairs: Sequence[Any]) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """(log-probs of the policy and the reference, lengths of the answers, probabilities that chosen is better)."""
        batch = self.base.batch(pairs)
        needed = self.settings.needs_reference
        reference = self.references.logps(self.base, list(pairs), batch) if needed else None
        with self.base.acting_as(Role.POLICY) as lm:
            policy = pair_logps(lm, batch)
        return policy, reference, batch.lengths, _probabilities(pairs, policy)

    def training_step(self, model, inputs: Any, num_items_in_batch=None) -> Tensor:
        if self.shift is None:
            logged = [entry[SHIFT] for entry in self.state.log_history if SHIFT in entry]
            self.shift = logged[-1] if logged else 0.0
        return super().training_step(model, inputs, num_items_in_batch)

    def after_step(self, sums: dict[str, float]) -> None:
        """BCO's shift is the mean reward of all answers so far, each step counting alike. A step is trained with the
        shift of those before it, so micro-batches change nothing; a checkpoint's log has it."""
        reward, before = (sums["rewards/chosen"] + sums["rewards/rejected"]) / (2 * sums["pairs"]), self.shift or 0.0
        self.shift = before + (reward - before) / (self.state.global_step + 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and "bco_pair" in self.loss.weights:
            logs[SHIFT] = self.shift or 0.0
        super().log(logs, start_time)

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
        accuracy = shares(margin(found), _probabilities(pairs, found))
        metrics = {"mean_reward": found.mean(dim=1), "accuracy": accuracy, "margin": margin(found)}
        return self.losses(scores, pairs), metrics

    def losses(self, scores: Tensor, pairs: Sequence[Any]) -> Tensor:
        """The loss `(pairs,)` of scores `(pairs, 2)`."""
        margins = torch.tensor([pair.margin for pair in pairs]).to(scores) if self.settings.margin else None
        return bradley_terry(scores, _probabilities(pairs, scores), margins, centering=self.settings.centering)


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
            "accuracy": shares(gaps, _probabilities(pairs, gaps)[:, None]).mean(dim=1),
            "margin": gaps.mean(dim=1),
        }
        if not torch.is_grad_enabled():
            return each.mean(dim=1), metrics
        counts = torch.tensor([pair.counts[self._only] for pair in pairs]).to(each)
        return (counts * each).sum(dim=1), metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        for role, folder in places(self.ensemble.roles, Path(output_dir or self.args.output_dir or "")).items():
            self.base.save_adapter(role, folder)


def _probabilities(pairs: Sequence[TokenPair], like: Tensor) -> Tensor:
    """The probability `(pairs,)` that each chosen answer is the better one."""
    return torch.tensor([pair.chosen_probability for pair in pairs]).to(like)


def _tokens(pair: TokenPair) -> int:
    """Tokens of a pair as TRL counts them: the prompt once with each answer."""
    return 2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)
