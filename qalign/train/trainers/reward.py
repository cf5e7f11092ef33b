"""The trainers of a reward model, and of an ensemble of them, from pairs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from qalign.config.stages import Reward
from qalign.data.store.rows import OnDemand
from qalign.losses.ensemble import member_seed, resample_counts
from qalign.losses.preference import CHOSEN, REJECTED, bradley_terry, margin, shares
from qalign.model.adapters.members import Ensemble, member_roles, places
from qalign.model.base import Base, Role
from qalign.train.callbacks import ClipEach
from qalign.train.trainers.pairs import PairTrainer, probabilities


class RewardModelTrainer(PairTrainer):
    """Trains a reward model so that the chosen answer scores higher; `settings` is the recipe's `reward` section."""

    def __init__(self, base: Base, settings: Reward, *more: Any, **named: Any):
        self.settings = settings
        super().__init__(base, Role.REWARD, *more, **named)

    def pair_losses(self, pairs: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        scores = self.base.pair_scores(Role.REWARD, pairs)
        found = scores.detach()
        accuracy = shares(margin(found), probabilities(pairs, found))
        metrics = {"mean_reward": found.mean(dim=1), "accuracy": accuracy, "margin": margin(found)}
        return self.losses(scores, pairs), metrics

    def losses(self, scores: Tensor, pairs: Sequence[Any]) -> Tensor:
        """The loss `(pairs,)` of scores `(pairs, 2)`."""
        margins = torch.tensor([pair.margin for pair in pairs]).to(scores) if self.settings.margin else None
        return bradley_terry(scores, probabilities(pairs, scores), margins, centering=self.settings.centering)


class EnsembleTrainer(RewardModelTrainer):
    """Trains the members of an ensemble of reward models at once, each as it would be trained alone on its resample of
    the pairs: what is added up is the sum over members, and gradients are clipped member by member.

    Metrics are means over the members.
    """

    def __init__(
        self, base: Base, settings: Reward, args: TrainingArguments, micro: Any, pairs: Sequence[Any], *more: Any
    ):
        self.ensemble, self._only = Ensemble(base, member_roles(settings)), slice(None)
        seeds = (member_seed(args.seed, number) for number in range(1, settings.members + 1))
        counts = torch.stack([resample_counts(len(pairs), seed) for seed in seeds], dim=1).tolist()
        counted = OnDemand(len(pairs), lambda number: replace(pairs[number], counts=tuple(counts[number])))
        clip, args.max_grad_norm = args.max_grad_norm, 0.0
        super().__init__(base, settings, args, micro, counted, *more)
        self.add_callback(ClipEach([[*base.trained_weights(role).values()] for role in self.ensemble.roles], clip))

    def train(self, *args, **kwargs):
        with self.ensemble.open():
            found = super().train(*args, **kwargs)
        if self.args.load_best_model_at_end:
            self.world.first(self._restore_best)  # which knows its checkpoint; `Session.train` sends its weights
        return found

    def _restore_best(self) -> None:
        if best := self.state.best_model_checkpoint:
            for role, folder in places(self.ensemble.roles, Path(best)).items():  # `Trainer` looks for one adapter
                self.base.restore_adapter(role, folder)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.base.train_again()  # a checkpoint that was loaded has left only the active adapter trainable
        return super().create_optimizer(model)

    def run_step(self, model, inputs: Any, num_items_in_batch=None) -> Tensor:
        roles = self.ensemble.roles
        if not self.ensemble.reason:
            return super().run_step(model, inputs, num_items_in_batch) / len(roles)
        total = torch.zeros((), device=self.args.device)
        for number, role in enumerate(roles):
            self._only = slice(number, number + 1)
            with self.base.acting_as(role):  # the backward pass inside: checkpointed layers run again in this role
                total = total + super().run_step(model, inputs, num_items_in_batch) / len(roles)
                self._read()
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
            "accuracy": shares(gaps, probabilities(pairs, gaps)[:, None]).mean(dim=1),
            "margin": gaps.mean(dim=1),
        }
        if not torch.is_grad_enabled():
            return each.mean(dim=1), metrics
        counts = torch.tensor([pair.counts[self._only] for pair in pairs]).to(each)
        return (counts * each).sum(dim=1), metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        for role, folder in places(self.ensemble.roles, Path(output_dir or self.args.output_dir or "")).items():
            self.base.save_adapter(role, folder)
