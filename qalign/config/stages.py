"""The recipe's sections for data and for the stages SFT, reward, DPO and PPO; `qalign.config.recipe` has the rest.

The docstring under each key begins with the field's own term. Editors show it (`recipes/recipe.schema.json`), and
`docs/recipe.md` lists it: after a change run `make docs` (`python docs/make_recipe.py`).
"""

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

STAGES = ("sft", "reward", "dpo", "ppo")
SFT_RUN = "sft"  # as `start_from`
REWARD_RUN = "reward"  # as a reward of PPO


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
    have a prompt, a chosen and a rejected answer; most layouts are detected."""
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

    def _held_out_conflicts(self) -> Iterator[str]:
        if self.eval_every and not self.has_held_out:
            yield "eval_every: has nothing to measure without eval_data or holdout; add one or remove this"
        if self.eval_data and self.holdout:
            yield "holdout: there is eval_data already; remove one of them"


class SFT(Stage):
    """Supervised fine-tuning: the model learns to give the answers of example dialogues."""

    data: Data
    """Training data: dialogues, prompts with completions, plain texts, or the chosen side of preference pairs."""
    learning_rate: LearningRate = 2e-4
    """Peak learning rate: reached after the warm-up; higher than for DPO, because a raw base has much to learn. Use
    1e-4 for a model that can already chat; halve it if the held-out loss rises."""
    batch_size: Batch = 16
    """Batch size: rows in one optimiser step; with `packing`, packed rows of `max_length` tokens."""
    packing: bool = False
    """Sequence packing: puts several dialogues, which can't attend to each other, into one row of `max_length` tokens
    to avoid padding. Leave it off for a few hundred short dialogues, which fill very few rows."""
    neftune_alpha: Positive | None = None
    """NEFTune noise α (arXiv:2310.05914): adds noise to the embeddings during training; off when left out. 5 is usual.
    Try it with few dialogues; answers may get longer."""


class Reward(Stage):
    """A reward model: learns to give the chosen answer of each pair a higher score (Bradley-Terry)."""

    learning_rate: LearningRate = 1e-4
    """Peak learning rate: of adapter and score head. Halve it if the held-out loss rises; double it at accuracy 0.5."""
    margin: bool = False
    """Margin loss (Llama 2, arXiv:2307.09288): asks for a score gap as large as `score_chosen - score_rejected` of the
    row. Turn it on if your rows have ratings that you trust."""
    centering: NotNegative = 0.0
    """Reward centring coefficient (arXiv:2312.09244): pulls the mean score of each pair to 0 with this weight, so that
    scores don't drift in long runs. 0.01 is usual; raise it to 0.1 if they still drift."""


DPO_LOSSES = Literal["sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "apo_zero", "simpo", "orpo"]
REFERENCE_FREE = frozenset({"simpo", "orpo"})


class DPO(Stage):
    """Direct preference optimisation and related losses: learns from pairs of a chosen and a rejected answer."""

    loss: DPO_LOSSES = "sigmoid"
    """Preference loss: `sigmoid` is DPO; `qalign/losses.py` has the paper of each. Try `ipo` or `sigmoid_norm` if
    answers only get longer, `robust` if some labels are wrong, `simpo` or `orpo` to train without a reference."""
    beta: Positive = 0.1
    """KL coefficient β: how strongly the policy is held to the reference (IPO's τ, SimPO's reward scale, ORPO's λ).
    Take 0.01 if answers hardly change, 0.3 if they get worse; about 2 for simpo, 5 for sigmoid_norm."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Label smoothing ε: the share of pairs believed to be labelled the wrong way round, for `robust`; 0.1 is usual."""
    gamma: NotNegative | None = None
    """SimPO margin γ: by how much the chosen answer should win; 0.5 when left out. Only for the loss `simpo`."""
    reference: Literal["cached", "in_step"] = "cached"
    """Reference log-probs: `cached` computes them once per pair and keeps them in a file for later epochs and runs.
    `in_step` computes them in every step, which is slower; use it to check the cache."""
    sft_weight: NotNegative = 0.0
    """SFT loss weight: adds this much of the chosen answer's mean negative log-likelihood. Try 0.1 to 1.0 if
    `logps/chosen` in metrics.jsonl falls and answers fall apart."""

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.label_smoothing and self.loss != "robust":
            yield f"label_smoothing: has no effect with loss '{self.loss}'; use loss 'robust' or remove it"
        if self.loss == "robust" and not self.label_smoothing:
            yield "loss: 'robust' needs label_smoothing above 0, or it is 'sigmoid'"
        if self.gamma is not None and self.loss != "simpo":
            yield f"gamma: has no effect with loss '{self.loss}'; use loss 'simpo' or remove it"
        if self.loss in REFERENCE_FREE and self.reference != "cached":
            yield f"reference: has no effect with loss '{self.loss}', which needs none; remove it"


class PPO(Stage):
    """Proximal policy optimisation: samples answers, scores them and makes the better ones more likely."""

    data: Data
    """Training prompts: rows of any shape that the other stages read; answers in them are ignored."""
    eval_data: Data | None = None
    """Held-out prompts: answered at the start, every `eval_every` iterations and at the end. Never training rows."""
    epochs: Epochs = 1.0
    """Epochs: how often each prompt is answered, if `max_steps` doesn't set the number of iterations."""
    max_steps: Steps | None = None
    """Maximum iterations: each one samples `batch_size` answers, then learns from them. Set 1 to try out a recipe."""
    batch_size: Batch = 64
    """Rollout batch size: answers in one iteration, to `batch_size / samples_per_prompt` prompts. Must be a multiple of
    `samples_per_prompt` x `mini_batches`. A larger batch is steadier and slower."""
    samples_per_prompt: Count = 4
    """Samples per prompt: answers to each prompt, which is read once for all of them. Fewer give more prompts."""
    micro_batch_size: Literal["auto"] | Batch = "auto"
    """Micro-batch size: answers in one forward pass; a multiple of `samples_per_prompt` that divides a mini-batch.
    Lower it when memory runs out: no number changes."""
    learning_rate: LearningRate = 1e-5
    """Peak learning rate: for policy and value model, reached after the warm-up. Halve it if KL rises sharply or
    updates often stop early (`kl_stop`), double it if the reward hardly rises."""
    reward: Rewards
    """Reward: what PPO maximises. `reward` for this recipe's reward run, another reward adapter, a
    sequence-classification model, a Python function `module:function(prompts, completions, **row)`, or a list of these
    with `weight`."""
    max_new_tokens: int = Field(default=256, ge=1, le=MAX_TOKENS)
    """Maximum answer length: in tokens; longer answers are cut. Prompts must leave this much room in
    `model.max_length`. Raise it if few answers end by themselves (`eval_ended`); time and memory grow with it."""
    temperature: Positive = 1.0
    """Sampling temperature: log-probs are those of the scaled distribution. Leave it at 1: less explores less."""
    mini_batches: Count = 2
    """Mini-batches: optimiser steps in one pass over an iteration's answers. More give more, smaller updates."""
    update_epochs: Count = 2
    """PPO epochs: passes over an iteration's answers. Lower it if updates often stop early (`kl_stop`)."""
    kl_coefficient: NotNegative = 0.05
    """KL coefficient β: the price of one nat of KL from the reference, in units of the reward. Double it if answers get
    strange, halve it if the reward hardly rises."""
    kl_target: Positive | None = None
    """KL target, in nats per answer: the KL coefficient adapts to stay near it (Ziegler et al. 2019); 6 is usual. The
    coefficient is fixed when left out."""
    kl_stop: Positive | None = 0.1
    """KL early stopping, in nats per token: ends an iteration's updates when the policy is this far from the one that
    sampled. Lower it if the reward is unstable; null never stops."""
    clip: Positive = 0.2
    """PPO clip range ε: a token's probability ratio earns nothing beyond 1 ± ε. Try 0.1 if training is unstable."""
    value: Literal["adapter", "trunk"] = "adapter"
    """Value model: `adapter` is an adapter and head of its own, initialised from the reward model; `trunk` is only a
    head on the policy's hidden states. Take `trunk` to save memory and time."""
    value_coefficient: Positive = 0.1
    """Value loss coefficient: the weight of the value loss next to the policy loss. Raise it if `val/explained` in
    metrics.jsonl stays near 0."""
    value_clip: Positive = 0.2
    """Value clip range: a new value gains nothing beyond this distance from the old one. Rarely worth changing."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount factor γ: for later rewards. Leave it at 1, because the score comes at the end of an answer."""
    gae_lambda: Share = 0.95
    """GAE λ (generalised advantage estimation): 1 relies on the sampled rewards only, which is unbiased but noisy, 0 on
    the value model only. 0.9 to 1 are usual; take 1 for short runs, whose value model has learned little."""
    reward_scaling: Literal["prompt", "running", "none"] = "running"
    """Reward scaling: `running` standardises scores by their running mean and deviation; `prompt` then subtracts the
    mean of the answers to the same prompt, to learn faster from few prompts; `none` leaves scores as they are."""
    reward_clip: Positive = 5.0
    """Reward clip, in standard deviations: scaled scores are limited to ± this value (not with `reward_scaling: none`).
    Lower it if a few extreme scores dominate."""
    missing_eos_penalty: NotNegative = 1.0
    """Missing-EOS penalty: subtracted from the scaled score of an answer that was cut before it ended. Set 0 if
    `max_new_tokens` is short on purpose."""
    judge: Rewards | None = None
    """Judge: rewards that score the held-out answers and are never trained on, in the same forms as `reward`. Set one
    to detect reward hacking: the judge falls while the reward rises."""
    patience: int = Field(default=3, ge=2, le=1_000)
    """Alarm patience: evaluations in a row with falling judge and rising reward before the alarm. Larger is surer."""
    on_alarm: Literal["warn", "slow", "stop"] = "warn"
    """Alarm action: `warn` prints a warning, `slow` also doubles the KL coefficient (up to 16-fold), `stop` ends the
    run. The best adapter so far is kept in any case. Take `stop` for runs that nobody watches."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """Sampling engine: `transformers` uses the base in memory; `vllm` holds a second copy of it on the same GPU. Take
    `vllm` if it is installed and the memory allows it."""
    trainer: dict[str, Any] = {}
    """Optimiser arguments: under transformers' names, such as `{optim: paged_adamw_8bit, weight_decay: 0.01}`. Lower
    `max_grad_norm` to 0.3 if training is unstable."""

    def conflicts(self) -> Iterator[str]:
        if self.batch_size % (self.samples_per_prompt * self.mini_batches):
            yield (
                f"batch_size: {self.batch_size} answers don't divide into {self.mini_batches} mini-batches of whole "
                f"prompts with {self.samples_per_prompt} answers each"
            )
        elif self.micro_batch_size != "auto":
            mini = self.batch_size // self.mini_batches
            if self.micro_batch_size % self.samples_per_prompt or mini % self.micro_batch_size:
                yield (
                    f"micro_batch_size: {self.micro_batch_size} is no multiple of samples_per_prompt "
                    f"{self.samples_per_prompt} that divides a mini-batch of {mini}; take one, or 'auto'"
                )
        if self.reward_scaling == "prompt" and self.samples_per_prompt == 1:
            yield "reward_scaling: 'prompt' compares answers to one prompt, and samples_per_prompt is 1; use 'running'"
        yield from self._held_out_conflicts()
        if self.judge and not self.has_held_out:
            yield "judge: has nothing to judge without eval_data or holdout; add held-out prompts or remove this"
        if self.judge and {r.source for r in self.judge} & {r.source for r in self.reward}:
            yield "judge: must not be what the policy trains on; name another reward run, or a function"
        if self.kl_target and not self.kl_coefficient:
            yield "kl_target: has no effect with kl_coefficient 0, which can't adapt; raise that, or remove this"

    @property
    def sources(self) -> Iterator[tuple[str, RewardSource]]:
        """(key, source) of every reward and judge."""
        for key in ("reward", "judge"):
            yield from ((key, source) for source in getattr(self, key) or ())
