"""What the user asked for: the recipe, typed and strict. Reading one from a file is `qalign.config.load`.

The docstring under each key is what editors show, through the JSON schema that `python -m qalign.config.recipe` prints.
"""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A part of the recipe: unknown keys and loose types are errors, and nothing changes once read."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        str_min_length=1,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    def conflicts(self) -> Iterator[str]:
        """Settings that contradict each other, as `key: what is wrong`."""
        yield from ()

    @model_validator(mode="after")
    def _no_clashes(self):
        if found := list(self.conflicts()):
            raise ValueError("\n".join(found))
        return self


class Model(Section):
    """The base model: loaded once, quantised, frozen; every role is an adapter on it."""

    base: str
    """A hub id, a local folder, a `.gguf` file, or `package:NAME/FILE` for a file of an installed Python package."""
    revision: str | None = None
    """The hub revision (branch, tag or commit). Pin a commit where a result must be repeatable."""
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """How the base is held in memory. `nf4` is the QLoRA choice; `none` needs four times its memory."""
    double_quant: bool = True
    """Quantise the scales of nf4 and fp4 too: saves about 0.4 bits a weight at no measurable cost."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What matrices are multiplied in. `auto` takes bfloat16 where the device is good at it, float16 on older GPUs."""
    max_length: int = Field(2048, ge=16)
    """Prompt and answer together, in tokens. Old turns are dropped to fit; an answer is never cut."""
    chat_template: str | None = None
    """A Jinja file to use instead of the model's own chat template. A model without one gets a plain one."""
    chat_template_kwargs: dict[str, Any] = {}
    """Passed on to the chat template, for example `{enable_thinking: false}` for Qwen3's thinking models."""


class Lora(Section):
    """The adapter that is trained: low-rank matrices beside the frozen weights (LoRA, arXiv:2106.09685)."""

    r: int = Field(16, ge=1)
    """The rank. More learns more and costs more memory; 8 to 64 are usual."""
    alpha: float = Field(32, gt=0)
    """The scale: the update is multiplied by alpha / r. Twice the rank is usual."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input while training. The reference never has any."""
    targets: str | list[str] = "all-linear"
    """Which layers get an adapter: `all-linear`, or a list of module names such as `[q_proj, v_proj]`."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r, for high ranks (rank-stabilised LoRA, arXiv:2312.03732)."""
    dora: bool = False
    """Learn each weight's size apart from its direction: slower, better at low ranks (DoRA, arXiv:2402.09353)."""
    init: Literal["default", "gaussian", "loftq", "pissa"] = "default"
    """How a new adapter begins. `default` and `gaussian` begin as no change; `loftq` begins by mending what 4-bit
    rounding did (arXiv:2310.08659); `pissa` needs unquantised weights of its own and is refused."""

    def conflicts(self):
        if self.init == "pissa":
            yield (
                "init: 'pissa' takes its start out of the base's own weights, which are 4-bit and shared by all roles "
                "here, and PEFT can't; 'loftq' is the start made for quantised bases"
            )
        if self.init == "loftq" and self.dora:
            yield "init: 'loftq' and dora can't be combined, PEFT sets DoRA's sizes before LoftQ moves the weights"
        if "lm_head" in ([self.targets] if isinstance(self.targets, str) else self.targets):
            yield "targets: 'lm_head' can't have an adapter, log-probs are computed from its frozen weight"


class Source(Section):
    """One set of rows, when `data` is a list."""

    path: str
    """A hub id, a folder, or a `.json`, `.jsonl`, `.jsonl.gz`, `.parquet` or `.csv` file."""
    split: str | None = None
    """The split of a hub data set; the stage's own `split` where it is left out."""
    skip: int = Field(0, ge=0)
    """Leave out the first so many rows: two runs can so share a file and no row."""
    limit: int | None = Field(None, ge=1)
    """Take only the first so many rows (after those that are skipped)."""
    weight: float = Field(1.0, gt=0)
    """How often these rows are seen: 2 takes each twice, 0.5 a random half."""


def _as_sources(value: Any) -> Any:
    items = value if isinstance(value, (list, tuple)) else [value]
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


Data = Annotated[
    tuple[Source, ...],
    Field(min_length=1),
    BeforeValidator(
        _as_sources, json_schema_input_type=str | Source | Annotated[list[str | Source], Field(min_length=1)]
    ),
]


STAGES = ("sft", "reward", "dpo", "ppo")
SFT_RUN = "sft"  # as `start_from`
REWARD_RUN = "reward"  # as a reward of PPO's


class Stage(Section):
    """The keys that every stage has."""

    data: Data
    """The training rows: a hub id, a file, or a list of these with `split`, `limit` and `weight`."""
    split: str = "train"
    """The split of a hub data set."""
    limit: int | None = Field(None, ge=1)
    """Take only the first so many rows of each source."""
    eval_data: Data | None = None
    """Held-out rows for `python -m qalign.evaluate`, and for `eval_every`."""
    epochs: float = Field(1.0, gt=0)
    """How often each row is seen. Preference training overfits fast: 1 to 3."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after so many optimiser steps, whatever `epochs` says."""
    batch_size: int = Field(16, ge=1)
    """Rows (pairs, for preferences) in one optimiser step."""
    micro_batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Rows in one forward pass; must divide `batch_size`. `auto`: as many as keep the device busy and fit its memory.
    Lower it when memory runs out: no number changes."""
    checkpointed_layers: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Layers that compute their activations again in the backward instead of keeping them: less memory, more time.
    `auto`: as few as fit (none on a CPU)."""
    learning_rate: float = Field(5e-6, gt=0)
    """The peak learning rate of the adapter."""
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """The share of all steps in which the learning rate climbs from zero."""
    eval_every: int | None = Field(None, ge=1)
    """Measure `eval_data` every so many steps while training; never where it is left out."""
    save_every: int | None = Field(None, ge=1)
    """Write a checkpoint every so many steps; ten times a run where it is left out."""
    start_from: str | None = None
    """`sft` for this recipe's own SFT run, or a PEFT adapter folder: a copy of that adapter is trained."""
    trainer: dict[str, Any] = {}
    """Anything else for TRL's config of this stage, such as `{optim: paged_adamw_8bit, weight_decay: 0.01}`."""

    def conflicts(self):
        if self.micro_batch_size != "auto" and self.batch_size % self.micro_batch_size:
            yield (
                f"micro_batch_size: {self.micro_batch_size} does not divide batch_size {self.batch_size}; "
                "take a divisor, or 'auto'"
            )
        if self.eval_every and not self.eval_data:
            yield "eval_every: has nothing to measure without eval_data; add it or remove this"


class SFT(Stage):
    """Supervised fine-tuning: learn to give the answers of example dialogues."""

    data: Data
    """The training rows: dialogues, prompts with completions, plain texts, or the chosen side of preferences."""
    learning_rate: float = Field(2e-4, gt=0)
    """The peak learning rate of the adapter."""
    batch_size: int = Field(16, ge=1)
    """Rows in one optimiser step; with `packing`, packs of `max_length` tokens."""
    packing: bool = False
    """Put several dialogues into one row of `max_length` tokens: no padding. They don't see each other."""
    neftune_alpha: float | None = Field(None, gt=0)
    """Noise on the embeddings while training; 5 is usual (NEFTune, arXiv:2310.05914)."""


class Reward(Stage):
    """A reward model: scores answers so that the chosen one of a pair scores higher (Bradley-Terry)."""

    learning_rate: float = Field(1e-4, gt=0)
    """The peak learning rate of the adapter and the score head."""
    margin: bool = False
    """Ask for a larger gap where raters saw one: `score_chosen - score_rejected` of each row (arXiv:2307.09288)."""
    centering: float = Field(0.0, ge=0)
    """Pulls the mean score of each pair to 0 with this weight; 0.01 is usual (arXiv:2312.09244)."""


DPO_LOSSES = Literal["sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "apo_zero", "simpo", "orpo"]
REFERENCE_FREE = frozenset({"simpo", "orpo"})


class DPO(Stage):
    """Direct preference optimisation and its family: learn from pairs of a chosen and a rejected answer."""

    loss: DPO_LOSSES = "sigmoid"
    """`sigmoid` is DPO itself; the others are in `qalign/losses.py`, each with its paper."""
    beta: float = Field(0.1, gt=0)
    """How strongly the policy is held to the reference (tau in IPO, the reward scale in SimPO, lambda in ORPO)."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """`robust` only: the share of pairs you believe to be labelled the wrong way round."""
    gamma: float | None = Field(None, ge=0)
    """`simpo` only: the margin by which the chosen answer should win (0.5 where it is left out)."""
    reference: Literal["cached", "in_step"] = "cached"
    """`cached` keeps the reference's log-probs of each pair in a file, for later epochs and later runs; `in_step`
    computes them in every step."""
    sft_weight: float = Field(0.0, ge=0)
    """Adds so much of the chosen answer's mean negative log-likelihood: keeps its probability from sinking."""

    def conflicts(self):
        yield from super().conflicts()
        if self.label_smoothing and self.loss != "robust":
            yield f"label_smoothing: has no effect with loss '{self.loss}'; use loss 'robust' or remove it"
        if self.loss == "robust" and not self.label_smoothing:
            yield "loss: 'robust' needs label_smoothing above 0, or it is 'sigmoid'"
        if self.gamma is not None and self.loss != "simpo":
            yield f"gamma: has no effect with loss '{self.loss}'; use loss 'simpo' or remove it"
        if self.loss in REFERENCE_FREE and self.reference != "cached":
            yield f"reference: has no effect with loss '{self.loss}', which needs none; remove it"


class RewardSource(Section):
    """What scores answers, when `reward` or `judge` is a list."""

    source: str
    """`reward` for this recipe's own reward run; the folder of another reward run or PEFT SEQ_CLS adapter on the same
    base; a sequence-classification model (hub id or folder); or a Python function, `module:function` or
    `FILE.py:function`."""
    weight: float = 1.0
    """What its scores are multiplied by before they are added up."""

    def conflicts(self):
        if self.weight == 0:
            yield "weight: a reward with weight 0 does nothing; remove it"


def _as_rewards(value: Any) -> Any:
    items = value if isinstance(value, (list, tuple)) else [value]
    return tuple({"source": item} if isinstance(item, str) else item for item in items)


Rewards = Annotated[
    tuple[RewardSource, ...],
    Field(min_length=1),
    BeforeValidator(
        _as_rewards,
        json_schema_input_type=str | RewardSource | Annotated[list[str | RewardSource], Field(min_length=1)],
    ),
]


class PPO(Stage):
    """Proximal policy optimisation: sample answers, score them, and make the better ones more likely."""

    data: Data
    """The prompts to answer: rows of any shape that the other stages read; the answers in them are left out."""
    eval_data: Data | None = None
    """Held-out prompts, answered every `eval_every` iterations, and at the start and the end."""
    epochs: float = Field(1.0, gt=0)
    """How often each prompt is answered, if `max_steps` doesn't say how many iterations there are."""
    max_steps: int | None = Field(None, ge=1)
    """Iterations: each samples `batch_size` answers, then learns from them."""
    batch_size: int = Field(64, ge=1)
    """Answers in one iteration; `batch_size / samples_per_prompt` prompts."""
    samples_per_prompt: int = Field(4, ge=1)
    """Answers to each prompt. The prompt is read once for all of them."""
    micro_batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Answers in one forward pass: a multiple of `samples_per_prompt` that divides a mini-batch. No number changes."""
    learning_rate: float = Field(1e-5, gt=0)
    """The peak learning rate of the policy's adapter and the value model."""
    reward: Rewards
    """What PPO makes rise: `reward` for this recipe's own reward run, another reward adapter, a sequence-classification
    model, a Python function `module:function(prompts, completions, **row)`, or a list of these with `weight`."""
    max_new_tokens: int = Field(256, ge=1)
    """Where an answer is cut at the latest, in tokens. Prompts must leave so much room in `model.max_length`."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling; log-probs are those of the distribution at this temperature."""
    mini_batches: int = Field(2, ge=1)
    """Optimiser steps in one pass over an iteration's answers."""
    update_epochs: int = Field(2, ge=1)
    """Passes over an iteration's answers."""
    kl_coefficient: float = Field(0.05, ge=0)
    """What a nat of KL from the reference costs, in units of the reward. Raise it if answers go strange."""
    kl_target: float | None = Field(None, gt=0)
    """Nats of KL an answer to aim at: the coefficient then adapts (Ziegler et al. 2019). Fixed where it is left out."""
    kl_stop: float | None = Field(0.1, gt=0)
    """Stops an iteration's updates once the policy is so many nats a token from the one that sampled."""
    clip: float = Field(0.2, gt=0)
    """How far the ratio of new to old probability may move from 1 to any profit."""
    value: Literal["adapter", "trunk"] = "adapter"
    """The value model: `adapter` begins as a copy of the reward model's adapter and head; `trunk` is only a head on
    the policy's own hidden states: leaner and faster."""
    value_coefficient: float = Field(0.1, gt=0)
    """The weight of the value loss beside the policy's."""
    value_clip: float = Field(0.2, gt=0)
    """How far a value may move from the old one to any profit."""
    gamma: float = Field(1.0, gt=0, le=1)
    """The discount of later rewards."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """Generalised advantage estimation: 1 trusts what was sampled, 0 the value model."""
    reward_scaling: Literal["prompt", "running", "none"] = "running"
    """`running` puts scores in standard deviations from their running mean, `prompt` from the mean of the answers to
    the same prompt (some prompts score higher than others, whatever the answer); `none` takes them as they are."""
    reward_clip: float = Field(5.0, gt=0)
    """Scores are held within so many standard deviations, unless they are taken as they are."""
    missing_eos_penalty: float = Field(1.0, ge=0)
    """Taken off the score of an answer that was cut before it ended."""
    judge: Rewards | None = None
    """What the policy never trains on and what tells whether it hacks the reward: of the same kinds as `reward`."""
    patience: int = Field(3, ge=2)
    """Evaluations in a row in which the judge falls while the reward rises, before the alarm."""
    on_alarm: Literal["warn", "slow", "stop"] = "warn"
    """`warn` says so and goes on, `slow` doubles the KL coefficient as well (up to 16-fold), `stop` ends the run."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples: `transformers` on the base in memory, or `vllm`, with a copy of its own on the same GPU."""
    trainer: dict[str, Any] = {}
    """More settings of the optimiser, under transformers' names: `{optim: paged_adamw_8bit, weight_decay: 0.01}`."""

    def conflicts(self):
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
        if self.eval_every and not self.eval_data:
            yield "eval_every: has nothing to measure without eval_data; add it or remove this"
        if self.judge and not self.eval_data:
            yield "judge: has nothing to judge without eval_data; add held-out prompts or remove this"
        if self.judge and {r.source for r in self.judge} & {r.source for r in self.reward}:
            yield "judge: must not be what the policy trains on; name another reward run, or a function"
        if self.kl_target and not self.kl_coefficient:
            yield "kl_target: has no effect with kl_coefficient 0, which can't adapt; raise that, or remove this"

    @property
    def sources(self) -> Iterator[tuple[str, RewardSource]]:
        """(key, what scores) of the reward and the judge."""
        for key in ("reward", "judge"):
            yield from ((key, source) for source in getattr(self, key) or ())


class Recipe(Section):
    """A qalign recipe: one model family, all its stages."""

    model: Model
    """The base model and how it is held in memory."""
    lora: Lora = Lora()
    """The adapter that is trained."""
    output: str
    """The folder for this recipe's runs: `<output>/dpo/` and so on."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Fixes the order of rows and the adapter's start: the same seed on the same machine gives the same run."""
    max_refused_share: float = Field(0.05, ge=0, le=1)
    """Stop when more than this share of rows is refused: the data is then not what you think it is."""
    sft: SFT | None = None
    """Settings of `python -m qalign.sft`."""
    reward: Reward | None = None
    """Settings of `python -m qalign.reward`."""
    dpo: DPO | None = None
    """Settings of `python -m qalign.dpo`."""
    ppo: PPO | None = None
    """Settings of `python -m qalign.ppo`."""

    def conflicts(self):
        if self.lora.init == "loftq":
            if self.model.quantization not in ("nf4", "fp4"):
                yield f"lora.init: 'loftq' mends 4-bit weights, and model.quantization is '{self.model.quantization}'"
            held = {"dpo": self.dpo if self.dpo and self.dpo.loss not in REFERENCE_FREE else None, "ppo": self.ppo}
            if moved := [name for name, stage in held.items() if stage and not stage.start_from]:
                yield (
                    "lora.init: 'loftq' would move the policy away from its reference before the first step of "
                    f"{' and '.join(moved)}; set {' and '.join(f'{name}.start_from: sft' for name in moved)}, or use "
                    "'default'"
                )
        if self.ppo and self.ppo.max_new_tokens >= self.model.max_length:
            yield (
                f"ppo.max_new_tokens: {self.ppo.max_new_tokens} leaves no room for a prompt in model.max_length "
                f"{self.model.max_length}; lower it, or raise model.max_length"
            )
        if self.sft and self.sft.start_from == SFT_RUN:
            yield "sft.start_from: an SFT run can't start from itself; name an adapter folder, or remove it"

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages it has a section for, in the order in which they run."""
        return tuple(name for name in STAGES if getattr(self, name))


def schema() -> str:
    """The recipe's JSON schema, for editors."""
    return (
        json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}, indent=1)
        + "\n"
    )


if __name__ == "__main__":
    print(schema(), end="")
