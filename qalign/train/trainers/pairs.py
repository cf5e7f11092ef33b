"""The loop of the trainers that learn from rows of answers.

They take the rows of an optimiser step at once and run them in micro-batches of roughly equal token counts, packed so
that a shared prompt is computed once. They take TRL's configs and log under TRL's names; docs/decisions.md says why
they are not TRL's `DPOTrainer` and `RewardTrainer`.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from qalign.data.collate import AnsweredPrompt, MicroBatchLimit
from qalign.data.store.sequences import TokenPair
from qalign.model.base import Base, Role
from qalign.train.processes.world import ALONE
from qalign.train.trainers.adapter import AdapterTrainer


class Figures(NamedTuple):
    """What the micro-batches of a process have given."""

    rows: list[str]  # where they come from
    losses: list[float]  # of each row
    sums: dict[str, tuple[float, float]]  # by metric: its sum, and the number of rows that have it


class PairTrainer(AdapterTrainer):
    """The loop of all that learn from rows of answers: pairs here, single answers in KTO. A subclass defines
    `pair_losses`."""

    counters = ("_sums", "_counts", "_unread")

    def __init__(
        self,
        base: Base,
        role: Role,
        args: TrainingArguments,
        micro: MicroBatchLimit,
        train_pairs: Sequence[AnsweredPrompt],
        eval_pairs: Sequence[AnsweredPrompt] | None = None,
        callbacks: tuple[TrainerCallback, ...] = (),
    ):
        self.base, self.trained, self.tokens_seen = base, role, 0
        self.take(micro)
        self._sums, self._counts = defaultdict[str, float](float), defaultdict[str, float](float)
        self._unread: list[tuple[list[str], Tensor, dict[str, Tensor]]] = []  # where pairs come from, losses, metrics
        # `list` as the collator passes pairs on as they are; tensors are made for one micro-batch at a time.
        data: dict[str, Any] = {"data_collator": list, "train_dataset": train_pairs, "eval_dataset": eval_pairs}
        super().__init__(base.model, args, **data, callbacks=list(callbacks))
        self.remove_callback(PrinterCallback)  # RunCallback writes the logs

    def pair_losses(self, pairs: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss `(pairs,)`, metrics `(pairs,)` by TRL's names), within `base.packed_attention()`. A metric is NaN where
        a row has none; its mean is over the others."""
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
        self.tokens_seen += sum(map(_tokens, inputs))
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
            switches = self.base.role_switches

            def check_role(grad: Tensor) -> None:
                if self.base.role_switches != switches:  # recomputed layers would silently use another adapter
                    raise RuntimeError("the role was changed between forward and backward")

            total.register_hook(check_role)
        return total

    def _read(self) -> dict[str, float]:
        """Checks the losses of all micro-batches since the last call, in all processes, and adds up their metrics,
        whose sums it returns. Waits for the GPU once a step: a wait in each micro-batch would leave it idle until the
        next one."""
        parts = self.world.gathered(self._own_figures())
        losses = [loss for part in parts for loss in part.losses]
        self.check_finite(losses, [row for part in parts for row in part.rows])
        read: dict[str, float] = defaultdict(float)
        for part in parts:
            for name, (total, counted) in part.sums.items():
                read[name] += total
                self._counts[name] += counted
        for name, total in read.items():
            self._sums[name] += total
        return {**read, "pairs": len(losses)} if losses else {}

    def _own_figures(self) -> "Figures":
        """Those of the micro-batches that this process has run since the last call."""
        if not self._unread:
            return Figures([], [], {})
        rows, losses, metrics = zip(*self._unread, strict=True)
        self._unread = []
        values = torch.stack([torch.cat([each[name] for each in metrics]).double() for name in metrics[0]])
        sums, counts = values.nansum(dim=1), (~values.isnan()).sum(dim=1)
        found = torch.cat([*losses, sums, counts]).tolist()
        count, names = len(found) - 2 * len(sums), list(metrics[0])
        both = zip(found[count : count + len(names)], found[count + len(names) :], strict=True)
        return Figures([*chain(*rows)], found[:count], dict(zip(names, both, strict=True)))

    def _means(self, prefix: str = "") -> dict[str, float]:
        """Means over the pairs counted since the last call."""
        if self._unread:
            self._read()
        means = {prefix + name: total / self._counts[name] for name, total in self._sums.items() if self._counts[name]}
        self._sums.clear()
        self._counts.clear()
        return means

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._means() | {"num_tokens": self.tokens_seen}
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Means over all held-out pairs."""
        return self.evaluated(self.measure(self.get_eval_dataloader(eval_dataset), f"{metric_key_prefix}_"))

    def measure_alone(self, batches: Iterable[Any]) -> dict[str, float]:
        """`measure` in this process, while others do something else."""
        together, self.world = self.world, ALONE
        try:
            return self.measure(batches)
        finally:
            self.world = together

    def measure(self, batches: Iterable[Any], prefix: str = "") -> dict[str, float]:
        """Means over the pairs of all batches, by TRL's names; each pair counts once, whatever its batch. Draws no
        random number, and leaves the means over training pairs as they were."""
        kept, self._sums, self._counts = (self._sums, self._counts), defaultdict(float), defaultdict(float)
        self.base.model.eval()
        with torch.no_grad(), self.base.packed_attention():
            for inputs in batches:
                groups = self.micro_batches(inputs)
                self.look_ahead(inputs, groups)
                for _, pairs in self.mine(groups):
                    loss, metrics = self.pair_losses(pairs)
                    self._unread.append(([pair.where for pair in pairs], loss, {"loss": loss, **metrics}))
                for pairs in self.idle(groups):
                    self.pair_losses(pairs)
                self._read()
        means = self._means(prefix)
        self._sums, self._counts = kept
        return means

    def floating_point_ops(self, inputs) -> int:
        """Not counted: transformers' estimate ignores that weights are frozen."""
        return 0


def probabilities(pairs: Sequence[TokenPair], like: Tensor) -> Tensor:
    """The probability `(pairs,)` that each chosen answer is the better one."""
    return torch.tensor([pair.chosen_probability for pair in pairs]).to(like)


def _tokens(row: AnsweredPrompt) -> int:
    """Tokens of a row as TRL counts them: the prompt once with each answer."""
    return sum(len(row.prompt_ids) + len(answer) for answer in row.answers)
