"""The trainers of a policy: from pairs, and from single answers with labels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qalign.config.stages import DPO, KTO
from qalign.data.store.sequences import TokenAnswers, TokenLabelled
from qalign.losses.kto import kl_estimate, label_loss
from qalign.losses.preference import CHOSEN, REJECTED, PreferenceLoss, margin, shares
from qalign.model.base import Base, Role
from qalign.model.logps import pair_logps
from qalign.model.reference import ReferenceLogps
from qalign.train.trainers.pairs import PairTrainer, probabilities

SHIFT = "rewards/shift"  # in the logs


class PolicyTrainer(PairTrainer):
    """Trains the policy; `settings` is the stage's section of the recipe, and `references` gives the reference's
    log-probs."""

    def __init__(self, base: Base, settings: Any, references: ReferenceLogps, *more: Any, **named: Any):
        self.settings, self.references = settings, references
        super().__init__(base, Role.POLICY, *more, **named)

    def training_step(self, model, inputs: Any, num_items_in_batch=None) -> Tensor:
        total = super().training_step(model, inputs, num_items_in_batch)
        for others in self.world.gathered(self.references.fresh()):  # in the next epoch they may be this process' rows
            self.references.add(others)
        return total

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        self.save_references()

    def save_references(self) -> None:
        """Keeps the reference's log-probs for later runs, if they are cached."""
        if self.world.is_first:
            self.references.save()


class PreferenceTrainer(PolicyTrainer):
    """Trains the policy with any preference loss of `qalign.losses`."""

    settings: DPO

    def __init__(self, base: Base, settings: DPO, *more: Any, **named: Any):
        self.loss = PreferenceLoss(**settings.loss_options)
        self.shift: float | None = None  # BCO's delta; None before it is known whether the run is resumed
        self._ahead: dict[int, tuple[Tensor, Tensor]] = {}
        super().__init__(base, settings, *more, **named)

    def look_ahead(self, rows: Sequence[Any], groups: Sequence[Any]) -> None:
        """Where a pair's loss depends on the other pairs of the step, finds it and its gradient by the log-probs in a
        pass of its own, so that micro-batches change no number. Evaluation compares the pairs of a batch."""
        self._ahead = {}
        if not self.settings.compares_pairs or len(groups) == 1:
            return
        with torch.no_grad():
            found = self.over_all(groups, self._logps)
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
        if self.settings.needs_reference:
            policy, reference = self.references.beside_policy(self.base, list(pairs), batch)
        else:
            with self.base.acting_as(Role.POLICY) as lm:
                policy, reference = pair_logps(lm, batch), None
        return policy, reference, batch.lengths, probabilities(pairs, policy)

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


class LabelTrainer(PolicyTrainer):
    """Trains the policy with a loss of `qalign.losses.kto`."""

    settings: KTO
    kl: Tensor | float = 0.0  # the estimate for the current step, in nats

    @torch.no_grad()
    def look_ahead(self, rows: Sequence[TokenLabelled], groups: Sequence[Any]) -> None:
        """Estimates the KL divergence over all rows of the step, before the loss of any: so micro-batches change no
        number. It takes one forward pass without gradients, of each prompt with another row's answer."""
        if self.settings.loss != "kto":
            return

        def logps(some: Sequence[TokenAnswers]) -> tuple[Tensor, Tensor]:
            batch = self.base.batch(some)
            policy, reference = self.references.beside_policy(self.base, some, batch)
            return policy[:, 0], reference[:, 0]

        found = self.over_all(self.micro_batches(mismatched(rows, self.base.max_length)), logps)
        policy, reference = zip(*found, strict=True)
        self.kl = kl_estimate(torch.cat(policy), torch.cat(reference))

    def pair_losses(self, pairs: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        settings, batch = self.settings, self.base.batch(pairs)
        policy, reference = (logps[:, 0] for logps in self.references.beside_policy(self.base, pairs, batch))
        desirable = torch.tensor([row.desirable for row in pairs], device=policy.device)
        loss = label_loss(
            settings.loss,
            policy,
            reference,
            desirable,
            torch.as_tensor(self.kl, device=policy.device),
            beta=settings.beta,
            desirable_weight=settings.desirable_weight,
            undesirable_weight=settings.undesirable_weight,
        )
        logps = policy.detach()
        reward, nothing = settings.beta * (logps - reference), torch.full_like(logps, torch.nan)
        found = {"kl": torch.zeros_like(logps) + self.kl} if settings.loss == "kto" else {}
        for name, values in (("rewards", reward), ("logps", logps)):
            found[f"{name}/chosen"] = torch.where(desirable, values, nothing)
            found[f"{name}/rejected"] = torch.where(desirable, nothing, values)
        return loss, found

    def _means(self, prefix: str = "") -> dict[str, float]:
        means = super()._means(prefix)
        chosen, rejected = (f"{prefix}rewards/{side}" for side in ("chosen", "rejected"))
        if chosen in means and rejected in means:
            means[f"{prefix}rewards/margins"] = means[chosen] - means[rejected]
        return means


def mismatched(rows: Sequence[TokenLabelled], max_length: int) -> list[TokenAnswers]:
    """Each prompt with the answer of the row before it, the first one with the last row's (as in TRL), cut to
    `max_length` tokens: unlike an answer to be learned, this one may be cut."""
    answers = [rows[number - 1].answer_ids for number in range(len(rows))]
    return [
        TokenAnswers(row.prompt_ids, (answer[: max_length - len(row.prompt_ids)],))
        for row, answer in zip(rows, answers, strict=True)
    ]
