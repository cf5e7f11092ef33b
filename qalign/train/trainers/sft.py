"""TRL's `SFTTrainer` on qalign's token ids."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import datasets
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from qalign.data.collate import Layout, MicroBatchLimit, micro_batches
from qalign.data.tokenize import IGNORED, TokenDialogue
from qalign.model.base import Base, Role
from qalign.model.logps import backbone, token_scores
from qalign.train.trainers.adapter import AdapterTrainer


class SupervisedTrainer(AdapterTrainer, SFTTrainer):
    """TRL's `SFTTrainer` on rows that are token ids already, with float32 adapters and plain adapter folders as
    checkpoints. Its loop and options stay; four things are qalign's own. Micro-batches have roughly equal
    token counts. Their rows stand behind one another without padding, where the base can run packed rows. The head runs
    at supervised positions alone. (TRL's does so on CUDA only.) And losses and metrics are read once a step, as means
    over its tokens. (TRL's `compute_loss` waits for the GPU three times in each micro-batch, and runs only where it
    adds the loss of a router.) `base` has a trainable policy; held-out rows are never packed into full rows."""

    args: SFTConfig
    counters = ("_metrics", "_total_train_tokens", "_unread")  # the first two are TRL's

    def __init__(
        self,
        base: Base,
        args: SFTConfig,
        micro: MicroBatchLimit,
        train_rows: list[TokenDialogue],
        eval_rows: list[TokenDialogue] | None,
        callbacks: tuple[TrainerCallback, ...] = (),
    ):
        self.base = base
        self.take(micro)
        self._unread: list[tuple[dict[str, Any], Tensor]] = []  # inputs; loss, entropies, correct tokens, tokens
        self._places = {tuple(row.ids): row.where for row in (*train_rows, *(eval_rows or ()))}
        with float32_kept(base.model):
            data: dict[str, Any] = {"train_dataset": _columns(train_rows), "eval_dataset": _columns(eval_rows)}
            super().__init__(base.model, args, **data, processing_class=base.tokenizer, callbacks=list(callbacks))
        # NEFTune's noise depends on the length of a row, so there a row stays one dialogue unless `packing` is set.
        self.without_padding = args.packing or not (base.padding_reason or args.neftune_noise_alpha)
        self._padding: Any = self.data_collator
        self.data_collator = _as_rows
        self.remove_callback(PrinterCallback)  # RunCallback writes the logs

    def packed_attention(self) -> AbstractContextManager[None]:
        """The attention for what the collator makes; the backward belongs inside too."""
        return self.base.packed_attention() if self.without_padding else nullcontext()

    def train(self, *args, **kwargs):
        with self.packed_attention():
            return super().train(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """(the rows of one optimiser step as one batch, the number of their supervised tokens)."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(row.supervised for batch in batches for row in batch)

    def micro_batches(self, rows: Sequence[Any]) -> list[Any]:
        return micro_batches(rows, self.micro, layout="packed" if self.without_padding else "padded")

    def inputs_of(self, rows: Sequence[Any]) -> dict[str, Any]:
        found = packed_row(rows) if self.without_padding else self._padding([row.columns for row in rows])
        found["labels"][:, 0] = IGNORED  # no token before them predicts them
        # The places of the supervised tokens, from the CPU: the host would wait for those of a mask on the GPU.
        return found | {"learned": (found["labels"] != IGNORED).flatten().nonzero()[:, 0]}

    def training_step(self, model, inputs: Any, num_items_in_batch=None) -> Tensor:
        total = super().training_step(model, inputs, num_items_in_batch)
        self._total_train_tokens += 0 if self.aux_loss_enabled else sum(map(len, inputs))
        self._read()
        return total

    def compute_loss_context_manager(self) -> ExitStack:
        found = super().compute_loss_context_manager()
        self.base.lm.get_input_embeddings().training = True  # NEFTune's hook asks for it
        return found

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss: the mean over all supervised tokens of the optimiser step."""
        learned = inputs.pop("learned")
        if self.aux_loss_enabled:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            self._unread.append((inputs, loss.detach()[None]))
            return loss
        layers = {name: value for name, value in inputs.items() if name != "labels"}
        with self.base.acting_as(Role.POLICY) as lm:
            states = backbone(lm)(**layers, use_cache=False).last_hidden_state.flatten(0, 1)[learned - 1]
            logps, entropies, is_top = token_scores(lm, states, inputs["labels"].flatten()[learned])
        # DFT weighs each token by its probability (Wu et al. 2025, arXiv:2508.05629).
        losses = -logps * logps.exp().detach() if self.args.loss_type == "dft" else -logps
        loss = losses.sum() / max(1, len(learned) if num_items_in_batch is None else num_items_in_batch)
        figures = [loss.detach(), entropies.sum(), is_top.sum(), torch.full_like(loss, len(learned))]
        self._unread.append((inputs, torch.stack([each.to(loss) for each in figures])))
        return loss

    def _read(self) -> float:
        """Checks the losses of all micro-batches since the last call, and keeps their metrics for `log`; returns the
        sum of the losses. Waits for the GPU once."""
        inputs, figures = zip(*self._unread, strict=True)
        self._unread = []
        read = torch.stack(figures).tolist()
        for (loss, *_), given in zip(read, inputs, strict=True):
            if not math.isfinite(loss):
                self.check_finite([loss], [self._places.get(ids, "a row") for ids in _sequences(given)])
        total, *others = map(sum, zip(*read, strict=True))
        if others:
            entropy, correct, tokens = others
            metrics = self._metrics["train" if self.base.model.training else "eval"]
            metrics["entropy"].append(entropy / max(1, tokens))
            metrics["mean_token_accuracy"].append(correct / max(1, tokens))
            metrics["num_tokens"] = [self._total_train_tokens]
        return total

    def evaluate(self, eval_dataset: Any = None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """The mean over all supervised tokens of the held-out rows. (`Trainer` takes the mean of its batches' means,
        which depends on the batch size.)"""
        self.base.model.eval()
        total, tokens = 0.0, 0
        with torch.no_grad(), self.accelerator.autocast(), self.packed_attention():
            for batch in self.get_eval_dataloader(eval_dataset):
                tokens += sum(row.supervised for row in batch)
                for rows in self.micro_batches(batch):
                    inputs = send_to_device(self.inputs_of(rows), self.args.device)
                    self.compute_loss(self.base.model, inputs, num_items_in_batch=1)
                total += self._read()
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


@dataclass(frozen=True)
class SupervisedRow:
    """A row of TRL's data set: a dialogue, or the dialogues that TRL has packed into a row. For `micro_batches` it is
    an answer to an empty prompt."""

    columns: dict[str, list[int]]
    prompt_ids: tuple[()] = ()

    @property
    def answers(self) -> tuple[list[int]]:
        return (self.columns["input_ids"],)

    @property
    def dialogues(self) -> list[int]:
        """Their lengths; no token before its first one predicts it."""
        return self.columns.get("seq_lengths", [len(self)])

    @property
    def supervised(self) -> int:
        """The number of tokens that are predicted."""
        starts, labels = {0, *accumulate(self.dialogues)}, self.columns["labels"]
        return sum(label != IGNORED and place not in starts for place, label in enumerate(labels))

    def __len__(self) -> int:
        return len(self.columns["input_ids"])


def _as_rows(examples: list[dict[str, list[int]]]) -> list[SupervisedRow]:
    """Passes rows on as they are; tensors are made for one micro-batch at a time."""
    return [SupervisedRow(row) for row in examples]


def packed_row(rows: Sequence[SupervisedRow]) -> dict[str, Any]:
    """The rows of a micro-batch as one row without padding, with a layout that keeps its dialogues apart."""
    layout = Layout(tuple((length, ()) for row in rows for length in row.dialogues))
    ids, labels = (torch.tensor([[*chain(*(r.columns[name] for r in rows))]]) for name in ("input_ids", "labels"))
    labels[:, [start for (start,) in layout.starts]] = IGNORED  # no token before them predicts them
    return {"input_ids": ids, "labels": labels, "position_ids": layout.positions(), "layout": layout}


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
