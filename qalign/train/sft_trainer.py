"""TRL's `SFTTrainer` on ids of qalign's."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
import trl
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from qalign.data.tokenize import IGNORED, TokenDialogue
from qalign.model.base import Base, Role
from qalign.train.loop import not_finite


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
        self.remove_callback(PrinterCallback)  # the RunCallback writes every log down

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss: the mean over all supervised tokens of the optimiser step."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not torch.isfinite(found[0] if return_outputs else found):
            raise not_finite(self, [self._places.get(ids, "a held-out row") for ids in _sequences(inputs)])
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
