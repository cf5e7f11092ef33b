"""TRL's `SFTTrainer` on qalign's token ids."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, cast

import datasets
import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback
from trl.data_utils import pack_dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from qalign.data.collate import Layout, MicroBatchLimit, micro_batches
from qalign.data.store.rows import OnDemand
from qalign.data.store.sequences import IGNORED, TokenDialogue
from qalign.data.store.tokens import outlines
from qalign.errors import UserError
from qalign.model.base import Base, Role
from qalign.model.logps import backbone, token_scores
from qalign.train.trainers.adapter import AdapterTrainer

PACKED_TOGETHER = 1000  # rows: the batch size of `datasets`, in which TRL packs


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
        train_rows: Sequence[TokenDialogue],
        eval_rows: Sequence[TokenDialogue] | None,
        callbacks: tuple[TrainerCallback, ...] = (),
    ):
        self.base = base
        self.take(micro)
        self._unread: list[tuple[dict[str, Any], Tensor]] = []  # inputs; loss, entropies, correct tokens, tokens
        self._rows = train_rows, eval_rows or ()
        with float32_kept(base.model):
            # TRL's constructor gets the first rows alone: it would copy all, though nothing is left to prepare.
            first = {"train_dataset": train_rows[:1], "eval_dataset": (eval_rows or ())[:1]}
            data: dict[str, Any] = {name: _columns(rows) for name, rows in first.items()}
            super().__init__(base.model, args, **data, processing_class=base.tokenizer, callbacks=list(callbacks))
        if self.aux_loss_enabled and self.world.size > 1:
            raise UserError("sft.trainer: router_aux_loss_coef: TRL adds up its figures in one process only")
        self.train_dataset: Any = packed(train_rows, args) if args.packing else _unpacked(train_rows)
        self.eval_dataset: Any = _unpacked(eval_rows) if eval_rows else None
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
        return micro_batches(rows, self.limit_for(rows), layout="packed" if self.without_padding else "padded")

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
        """Checks the losses of all micro-batches since the last call, in all processes, and keeps their metrics for
        `log`; returns the sum of the losses. Waits for the GPU once."""
        parts = self.world.gathered(self._own_figures())
        for wrong in (wrong for wrong, _ in parts if wrong):
            self.check_finite([math.nan], wrong)
        total, *others = map(sum, zip(*(figures for _, figures in parts if figures), strict=True))
        if others:
            entropy, correct, tokens = others
            metrics = self._metrics["train" if self.base.model.training else "eval"]
            metrics["entropy"].append(entropy / max(1, tokens))
            metrics["mean_token_accuracy"].append(correct / max(1, tokens))
            metrics["num_tokens"] = [self._total_train_tokens]
        return total

    def _own_figures(self) -> tuple[list[str], list[float]]:
        """(The rows of the first micro-batch whose loss isn't finite, the sums of the figures) of what this process has
        run since the last call."""
        if not self._unread:
            return [], []
        inputs, figures = zip(*self._unread, strict=True)
        self._unread = []
        read = torch.stack(figures).tolist()
        for (loss, *_), given in zip(read, inputs, strict=True):
            if not math.isfinite(loss):
                return self._places([*_sequences(given)]), []
        return [], [*map(sum, zip(*read, strict=True))]

    def _places(self, sequences: Sequence[tuple[int, ...]]) -> list[str]:
        """Where sequences of ids come from; looked for once a run fails, as all ids take long to compare."""
        places = {ids: row.where for rows in self._rows for row in rows if (ids := tuple(row.ids)) in sequences}
        return [places.get(ids, "a row") for ids in sequences]

    def evaluate(self, eval_dataset: Any = None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """The mean over all supervised tokens of the held-out rows. (`Trainer` takes the mean of its batches' means,
        which depends on the batch size.)"""
        self.base.model.eval()
        total, tokens = 0.0, 0
        with torch.no_grad(), self.accelerator.autocast(), self.packed_attention():
            for batch in self.get_eval_dataloader(eval_dataset):
                tokens += sum(row.supervised for row in batch)
                groups = self.micro_batches(batch)
                for _, rows in self.mine(groups):
                    self._measure(rows)
                with self.uncounted():
                    for rows in self.idle(groups):
                        self._measure(rows)
                total += self._read()
        return self.evaluated({f"{metric_key_prefix}_loss": total / max(1, tokens)})

    def _measure(self, rows: Sequence[Any]) -> None:
        inputs = send_to_device(self.inputs_of(rows), self.args.device)
        self.compute_loss(self.base.model, inputs, num_items_in_batch=1)

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


def _unpacked(rows: Sequence[TokenDialogue]) -> OnDemand[dict[str, list[int]]]:
    """The columns of TRL's data set, row by row."""

    def make(number: int) -> dict[str, list[int]]:
        row = rows[number]
        return {"input_ids": row.ids, "labels": row.labels}

    return OnDemand(len(rows), make)


def packed(rows: Sequence[TokenDialogue], args: SFTConfig) -> OnDemand[dict[str, list[int]]]:
    """The same as full rows, packed by TRL, in whose data set the places of the tokens stand for the tokens: the ids
    stay where they are, and a full row is put together when it is needed."""
    found = list[tuple[list[tuple[int, int, int]], list[int] | None]]()  # (row, start, end) …; lengths of the dialogues
    lengths, quiet = [*map(len, outlines(rows))], datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for start in range(0, len(rows), PACKED_TOGETHER):
        numbers = range(start, min(start + PACKED_TOGETHER, len(rows)))
        places = {"row": [np.full(lengths[n], n) for n in numbers], "place": [np.arange(lengths[n]) for n in numbers]}
        full = pack_dataset(datasets.Dataset.from_dict(places), args.max_length or 0, args.packing_strategy)
        for one in cast(Iterable[dict[str, np.ndarray]], full.with_format("numpy")):
            found.append(
                (_runs(one["row"], one["place"]), one["seq_lengths"].tolist() if "seq_lengths" in one else None)
            )
    if not quiet:
        datasets.enable_progress_bars()

    def make(number: int) -> dict[str, list[int]]:
        runs, of_dialogues = found[number]
        parts = [(rows[row], start, end) for row, start, end in runs]
        columns = {
            "input_ids": [*chain(*(row.ids[start:end] for row, start, end in parts))],
            "labels": [*chain(*(row.labels[start:end] for row, start, end in parts))],
        }
        return columns | ({"seq_lengths": of_dialogues} if of_dialogues else {})

    return OnDemand(len(found), make)


def _runs(rows: np.ndarray, places: np.ndarray) -> list[tuple[int, int, int]]:
    """The runs of neighbouring tokens of one row: (number of the row, first place, place after the last)."""
    breaks = np.flatnonzero((np.diff(rows) != 0) | (np.diff(places) != 1)) + 1
    firsts, lasts = [0, *breaks], [*(breaks - 1), len(rows) - 1]
    return [(int(rows[a]), int(places[a]), int(places[b]) + 1) for a, b in zip(firsts, lasts, strict=True)]


def _columns(rows: Sequence[TokenDialogue]) -> datasets.Dataset | None:
    if not rows:
        return None
    return datasets.Dataset.from_list([*_unpacked(rows)])


def _sequences(inputs: dict[str, Any]) -> Iterator[tuple[int, ...]]:
    """The rows of a batch as ids, from padded rows or one packed row."""
    if "attention_mask" in inputs:
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            yield tuple(ids[mask.bool()].tolist())
    else:
        for (start, *_), (length, _) in zip(inputs["layout"].starts, inputs["layout"].groups, strict=True):
            yield tuple(inputs["input_ids"][0, start : start + length].tolist())
