"""What the sections of a recipe are made of: number types, data sources, and the keys that every stage has."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# Every number has a bound, far beyond what anybody uses: a slip of the keyboard must not hang or fill the memory.
MAX_ROWS, MAX_STEPS, MAX_BATCH, MAX_LAYERS, MAX_TOKENS = 10**9, 10**7, 2**16, 10_000, 2**20
Rows = Annotated[int, Field(ge=1, le=MAX_ROWS)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Batch = Annotated[int, Field(ge=1, le=MAX_BATCH)]
Layers = Annotated[int, Field(ge=0, le=MAX_LAYERS)]
Count = Annotated[int, Field(ge=1, le=1_000)]
Epochs = Annotated[float, Field(gt=0, le=10_000)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1_000)]
NotNegative = Annotated[float, Field(ge=0, le=1_000)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the recipe: unknown keys and converted types are errors, and it is immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, str_min_length=1, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def conflicts(self) -> Iterator[str]:
        """Settings that contradict each other, as `key: what is wrong`."""
        yield from ()

    @model_validator(mode="after")
    def _has_no_conflicts(self):
        if found := list(self.conflicts()):
            raise ValueError("\n".join(found))
        return self


def _one_or_more(section: type[Section], key: str) -> BeforeValidator:
    """Accepts one item or a list of items; a text stands for an item with only this key."""

    def listed(value: Any) -> tuple[Any, ...]:
        items: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]  # pyright: ignore[reportUnknownArgumentType]
        return tuple({key: item} if isinstance(item, str) else item for item in items)

    item: Any = str | section
    return BeforeValidator(listed, json_schema_input_type=item | Annotated[list[item], Field(min_length=1)])


class Source(Section):
    """One set of rows, for a `data` or `eval_data` that needs more than a path."""

    path: str
    """Data source: a hub id, with its configuration `NAME:CONFIG` if it has several; a folder; or a `.json`, `.jsonl`,
    `.ndjson`, `.csv`, `.tsv` (each may end in `.gz`) or `.parquet` file."""
    split: str | None = None
    """Dataset split: the split of a hub dataset. The stage's own `split` when left out."""
    revision: str | None = None
    """Hub revision: a branch, tag or commit of a hub dataset. Pin a commit to get the same rows next year."""
    streaming: bool = False
    """Streaming: fetches rows of a hub dataset as they are taken, instead of the whole dataset first. With `limit`,
    nothing else is fetched."""
    skip: int = Field(default=0, ge=0, le=MAX_ROWS)
    """Skipped rows: leaves out this many rows at the start, so that two runs can share a file but no row."""
    limit: Rows | None = None
    """Row limit: takes at most this many rows, counted after the skipped ones."""
    weight: Positive = 1.0
    """Sampling weight: how often these rows are seen. 2 takes each row twice, 0.5 takes a random half."""


class RewardSource(Section):
    """One reward, for a `reward` or `judge` that combines several."""

    source: str
    """Reward source: `reward` for this recipe's own reward run; the folder of another reward run or of a PEFT SEQ_CLS
    adapter on the same base; a sequence-classification model (hub id or folder); or a Python function,
    `module:function` or `FILE.py:function`."""
    weight: float = Field(default=1.0, ge=-1_000_000, le=1_000_000)
    """Reward weight: multiplies the scores of this source before all sources are summed. May be negative."""

    def conflicts(self) -> Iterator[str]:
        if self.weight == 0:
            yield "weight: a reward with weight 0 does nothing; remove it"


Data = Annotated[tuple[Source, ...], Field(min_length=1), _one_or_more(Source, "path")]
Rewards = Annotated[tuple[RewardSource, ...], Field(min_length=1), _one_or_more(RewardSource, "source")]


class Stage(Section):
    """The keys that every stage has."""

    data: Data
    """Training data: a hub id, a file, a folder, or a list of these with `split`, `skip`, `limit` and `weight`. Rows
    have a prompt, a chosen and a rejected answer, for KTO an answer and a label; most layouts are detected."""
    split: str = "train"
    """Dataset split: the split of a hub dataset to train on; of a JSON object with several lists of rows, its key."""
    limit: Rows | None = None
    """Row limit: takes at most this many rows of each source. All rows when left out."""
    eval_data: Data | None = None
    """Held-out data: rows for `qalign.evaluate`, `eval_every` and the stage's report. Never put training rows here."""
    holdout: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Held-out share: keeps this share of `data`, such as 0.2, out of training and uses it as `eval_data`. Rows with
    the same first question stay together, in every stage that reads them."""
    epochs: Epochs = 1.0
    """Epochs: passes over the training rows. Preference training overfits fast: 1, or 2 to 3 for a few hundred rows."""
    max_steps: Steps | None = None
    """Maximum steps: stops after this many optimiser steps, whatever `epochs` says. Set 5 to try out a recipe."""
    batch_size: Batch = 16
    """Batch size: rows (pairs, for preferences) in one optimiser step. A larger batch gives steadier and fewer updates;
    it costs no memory, because it is processed in micro-batches."""
    micro_batch_size: Literal["auto"] | Batch = "auto"
    """Micro-batch size: rows in one forward pass; must divide `batch_size`. `auto` takes as many as keep the device
    busy and fit its memory. Lower it when memory runs out: no number changes."""
    checkpointed_layers: Literal["auto"] | Layers = "auto"
    """Gradient checkpointing: the number of layers that recompute their activations in the backward pass, which needs
    less memory and more time. `auto` takes as few as fit (none on a CPU). Raise it (1000: all) when memory runs out."""
    learning_rate: LearningRate = 5e-6
    """Peak learning rate: reached after the warm-up. Halve it if the held-out loss rises, double it if the margin
    between chosen and rejected answers hardly grows; small models take more (1e-5 for 1B to 2B)."""
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """Learning rate schedule: how the rate falls after the warm-up. Take a constant one if you stop runs by hand."""
    warmup_ratio: ShareBelowOne = 0.1
    """Warm-up ratio: the share of steps in which the rate rises from zero. Raise it if the loss jumps at the start."""
    eval_every: Steps | None = None
    """Evaluation interval, in optimiser steps: measures `eval_data` during training; never when left out."""
    save_every: Steps | None = None
    """Checkpoint interval, in optimiser steps: what `--resume` continues from; ten checkpoints a run when left out.
    Lower it where a session may end at any time."""
    start_from: str | None = None
    """Initial adapter: `sft` for this recipe's own SFT run, or a PEFT adapter folder; a copy of it is trained. A new
    adapter when left out, which suits a base that can already chat."""
    trainer: dict[str, Any] = {}
    """Trainer arguments: anything else for TRL's config of this stage, such as `{optim: paged_adamw_8bit, weight_decay:
    0.01}`. The 8-bit optimiser saves memory; lower `max_grad_norm` to 0.3 if the loss is unstable."""

    def conflicts(self) -> Iterator[str]:
        if self.micro_batch_size != "auto" and self.batch_size % self.micro_batch_size:
            yield (
                f"micro_batch_size: {self.micro_batch_size} does not divide batch_size {self.batch_size}; "
                "take a divisor, or 'auto'"
            )
        yield from self._held_out_conflicts()

    @property
    def has_held_out(self) -> bool:
        return bool(self.eval_data or self.holdout)

    @property
    def against_probabilities(self) -> str | None:
        """Why rows with a `chosen_probability` can't be used, after "which"; None if they can."""

    def _held_out_conflicts(self) -> Iterator[str]:
        if self.eval_every and not self.has_held_out:
            yield "eval_every: has nothing to measure without eval_data or holdout; add one or remove this"
        if self.eval_data and self.holdout:
            yield "holdout: there is eval_data already; remove one of them"
