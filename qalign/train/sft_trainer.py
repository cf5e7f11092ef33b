"""TRL's `SFTTrainer` on qalign's token ids."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import pairwise
from typing import Any, cast

import datasets
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from qalign.data.collate import Layout
from qalign.data.tokenize import IGNORED, TokenDialogue
from qalign.model.base import Base
from qalign.train.adapter_trainer import AdapterTrainer


class SupervisedTrainer(AdapterTrainer, SFTTrainer):
    """TRL's `SFTTrainer` on rows that are token ids already, with float32 adapters and plain adapter folders as
    checkpoints. `base` has a trainable policy; held-out rows are never packed."""

    def __init__(
        self,
        base: Base,
        args: SFTConfig,
        train_rows: list[TokenDialogue],
        eval_rows: list[TokenDialogue] | None,
        callbacks: tuple[TrainerCallback, ...] = (),
    ):
        self.base = base
        self._places = {tuple(row.ids): row.where for row in (*train_rows, *(eval_rows or ()))}
        with float32_kept(base.model):
            data: dict[str, Any] = {"train_dataset": _columns(train_rows), "eval_dataset": _columns(eval_rows)}
            super().__init__(base.model, args, **data, processing_class=base.tokenizer, callbacks=list(callbacks))
        self.remove_callback(PrinterCallback)  # RunCallback writes the logs

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """TRL's; packed dialogues are run like packed pairs, as transformers' masks don't keep them apart in every
        family, and mask what could be skipped."""
        with self.base.packed_attention() if cast(SFTConfig, self.args).packing else nullcontext():
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss_context_manager(self) -> ExitStack:
        found = super().compute_loss_context_manager()
        self.base.lm.get_input_embeddings().training = True  # NEFTune's hook asks for it
        return found

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss: the mean over all supervised tokens of the optimiser step."""
        if "attention_mask" not in inputs:
            inputs = packed_row(inputs)
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = found[0] if return_outputs else found
        if not torch.isfinite(loss):
            self.check_finite(loss, [self._places.get(ids, "a row") for ids in _sequences(inputs)])
        return found

    def evaluate(self, eval_dataset: Any = None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """The mean over all supervised tokens of the held-out rows. (`Trainer` takes the mean of its batches' means,
        which depends on the batch size.)"""
        self.base.model.eval()
        total, tokens = 0.0, 0
        with torch.no_grad(), self.accelerator.autocast():
            for inputs in self.get_eval_dataloader(eval_dataset):
                tokens += int((inputs["labels"][:, 1:] != IGNORED).sum())
                total += self.compute_loss(self.base.model, inputs, num_items_in_batch=1).item()
        return self.evaluated({f"{metric_key_prefix}_loss": total / max(1, tokens)})

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes none: the run folder has its own."""


@contextmanager
def float32_kept(model: nn.Module) -> Iterator[None]:
    """Keeps trainable weights as they are. (TRL casts the adapters of a quantised base to bfloat16, where small updates
    round away.)"""
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.data = weights[name]


def packed_row(inputs: dict[str, Any]) -> dict[str, Any]:
    """A row of dialogues that TRL has packed, as qalign's attention takes it: with a layout in place of what TRL gives
    to other attentions. Its position ids, int64 `(1, tokens)`, start again with each dialogue."""
    starts = (inputs["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    lengths = [end - start for start, end in pairwise([*starts, inputs["position_ids"].shape[1]])]
    layout = Layout(tuple((length, ()) for length in lengths))
    return {name: inputs[name] for name in ("input_ids", "labels", "position_ids")} | {"layout": layout}


def _columns(rows: list[TokenDialogue] | None) -> datasets.Dataset | None:
    if not rows:
        return None
    return datasets.Dataset.from_dict({"input_ids": [r.ids for r in rows], "labels": [r.labels for r in rows]})


def _sequences(inputs: dict[str, Any]) -> Iterator[tuple[int, ...]]:
    """The rows of a batch as ids, from padded rows or one packed row."""
    if "attention_mask" in inputs:
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            yield tuple(ids[mask.bool()].tolist())
    else:
        for (start, *_), (length, _) in zip(inputs["layout"].starts, inputs["layout"].groups, strict=True):
            yield tuple(inputs["input_ids"][0, start : start + length].tolist())
