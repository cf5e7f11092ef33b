"""TRL's `SFTTrainer` on qalign's token ids."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from qalign.data.tokenize import IGNORED, TokenDialogue
from qalign.errors import UserError
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

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss: the mean over all supervised tokens of the optimiser step."""
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


def check_packing(lm: PreTrainedModel) -> None:
    """Checks that dialogues packed into one row don't see each other: the logits of the second must not depend on the
    first. Some families ignore position ids that start again (gpt-oss, Falcon, OPT), others carry a state (Mamba). A
    `UserError` if they do, or this family can't take packed rows."""
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    found, family = [], type(lm).__name__
    for first in (range(8), range(8, 16)):
        batch = collate([{"input_ids": [*first, *range(16, 24)], "seq_lengths": [8, 8]}])
        inputs = {key: value.to(lm.device) if torch.is_tensor(value) else value for key, value in batch.items()}
        del inputs["labels"]
        try:
            with torch.no_grad():
                found.append(lm(**inputs, use_cache=False).logits[0, 8:].float())
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"sft.packing: {family} can't take packed rows; set it to false ({reason})") from None
    if (found[0] - found[1]).abs().max() > 0.01 * found[0].abs().max():  # exactly 0, but for experts and int8
        raise UserError(f"sft.packing: in {family} packed dialogues would see each other; set it to false")


def _columns(rows: list[TokenDialogue] | None) -> datasets.Dataset | None:
    if not rows:
        return None
    return datasets.Dataset.from_dict({"input_ids": [r.ids for r in rows], "labels": [r.labels for r in rows]})


def _sequences(inputs: dict[str, Tensor]) -> Iterator[tuple[int, ...]]:
    """The rows of a batch as ids, from padded rows or one packed row."""
    if "attention_mask" in inputs:
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            yield tuple(ids[mask.bool()].tolist())
    else:
        starts = (inputs["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            yield tuple(inputs["input_ids"][0, start:end].tolist())
