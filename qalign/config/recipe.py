"""The recipe: a typed and strict model of the YAML file. `qalign.config.load` reads one from a file."""

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, ValidationError

from qalign.config.stages import (
    CONSTITUTION,
    DPO,
    GRPO,
    KTO,
    MAX_TOKENS,
    OTHERS,
    PPO,
    RL_STAGES,
    SFT,
    SFT_RUN,
    STAGES,
    Constitution,
    Goodhart,
    Reward,
    Section,
    Share,
    ShareBelowOne,
    Stage,
)

NOT_SHARED = (
    "only sft, reward, dpo and kto share a base among processes, as each sampled token would need all layers from all "
    "of them; set it to false: layers that don't fit are then streamed (model.stream)"
)


class Model(Section):
    """The base model: loaded once, quantised and frozen; every role is an adapter on it."""

    base: str
    """Base model: a hub id, a local folder, a `.gguf` file, or `package:NAME/FILE`, a file of an installed package."""
    revision: str | None = None
    """Hub revision: a branch, tag or commit. Pin a commit to get the same weights next year."""
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """Weight quantisation: `nf4` is QLoRA's 4-bit format; `fp4` is as small but less exact; `int8` needs twice, `none`
    four times the memory. Take `none` only for a small model."""
    double_quant: bool = True
    """Double quantisation: quantises the scales of nf4 and fp4 too; saves 0.4 bits per weight at no measurable cost."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute dtype: the dtype of matrix products. `auto` is bfloat16 where the device is fast at it, else float16 on
    GPUs and float32 on CPUs. Take float32 if the loss is not finite."""
    fused_kernels: bool = True
    """Fused kernels: on a GPU, runs norms, rotary embeddings and MLPs with liger-kernel where it is installed and gives
    the same numbers to the rounding of the compute dtype. The header says what it runs. It has no effect on a CPU."""
    stream: Literal["auto", "always", "never"] = "auto"
    """Layer streaming: the weights of the base's layers stay in the computer's memory and are copied to the GPU for
    each pass, for a base that is larger than the GPU's memory. It changes no number and takes time. `auto` streams only
    where the base doesn't fit."""
    shard: bool = False
    """Base sharding: every process holds a part of each weight of the base, and layers are gathered for each pass
    (FSDP2), for a base that is larger than each of several cards. It changes no number and takes time. For `sft`,
    `reward`, `dpo` and `kto` in several processes (`torchrun`)."""
    max_length: int = Field(default=2048, ge=16, le=MAX_TOKENS)
    """Maximum sequence length, in tokens: prompt and answer together. The oldest turns are dropped to fit; an answer is
    never cut. Lower it when memory runs out."""
    chat_template: str | None = None
    """Chat template: a Jinja file to use instead of the model's own. A model without a template gets a plain one."""
    chat_template_kwargs: dict[str, Any] = {}
    """Chat template arguments: passed to the template, such as `{enable_thinking: false}` for Qwen3."""
    system_turn: Literal["keep", "into_user", "refuse"] = "keep"
    """System turns: `keep` leaves them to the template, and refuses a row whose system turn it has no place for;
    `into_user` puts each before the next user turn, with a blank line between, for templates such as Gemma's and
    Mistral's; `refuse` refuses rows with a system turn."""

    def conflicts(self) -> Iterator[str]:
        if self.stream == "always" and self.quantization == "int8":
            yield "stream: 'always' can't be used with quantization int8, which bitsandbytes moves by itself; use nf4"
        if self.shard and self.stream == "always":
            yield "shard: can't be used with stream 'always': layers come from other cards or from memory; remove one"
        if self.shard and self.quantization == "int8":
            yield "shard: can't be used with quantization int8, which bitsandbytes moves by itself; use nf4"


# PEFT takes a text as a regular expression, some of which never end; names say all that is needed.
ModuleName = Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$")]
Tracker = Literal["tensorboard", "trackio", "wandb"]


def _one_or_more(name: Any) -> BeforeValidator:
    """Takes one name in the place of a list of names."""

    def in_list(value: object) -> object:
        return [value] if isinstance(value, str) else value

    return BeforeValidator(in_list, json_schema_input_type=name | list[name])


class Lora(Section):
    """The trained adapter: low-rank matrices next to the frozen weights (LoRA, arXiv:2106.09685)."""

    r: int = Field(default=16, ge=1, le=4096)
    """LoRA rank r: of the trained matrices. 8 saves memory; take 32 or 64 if the style is far from the model's."""
    alpha: float = Field(default=32.0, gt=0, le=100_000)
    """LoRA scale α: the update is multiplied by alpha / r. Keep it at twice the rank."""
    dropout: ShareBelowOne = 0.0
    """LoRA dropout: the share of the adapter's inputs set to zero during training, never for the reference. Try 0.05 if
    the held-out loss rises while the training loss falls."""
    targets: Literal["all-linear"] | Annotated[list[ModuleName], Field(min_length=1), _one_or_more(ModuleName)] = (
        "all-linear"
    )
    """LoRA target modules: `all-linear` (every linear layer of the language model but the output layer, and in mixtures
    of experts but routers and routed experts), or a list of module names such as `[q_proj, v_proj]`, which is smaller
    and learns less, or `layers.0.mlp.up_proj`, of layer 0."""
    rslora: bool = False
    """Rank-stabilised LoRA (arXiv:2312.03732): scales by alpha / sqrt(r), not alpha / r. For ranks of 64 and more."""
    dora: bool = False
    """DoRA (arXiv:2402.09353): learns the magnitude of each weight apart from its direction; slower, with more memory.
    Try it if r 4 or 8 learns too little and a higher rank doesn't fit."""
    init: Literal["default", "gaussian", "loftq", "pissa"] = "default"
    """LoRA initialisation: `default` and `gaussian` leave the model unchanged at first; `loftq` (arXiv:2310.08659)
    reduces the 4-bit rounding error and needs `start_from: sft` under dpo, kto, ppo and grpo. `pissa` is refused."""

    def conflicts(self) -> Iterator[str]:
        if self.init == "pissa":
            yield (
                "init: 'pissa' is computed from the base's unquantised weights, and all roles here share one 4-bit "
                "base; use 'loftq', which is made for quantised bases"
            )
        if self.init == "loftq" and self.dora:
            yield "init: 'loftq' and dora can't be combined: PEFT sets the magnitudes before LoftQ moves the weights"
        if self.targets != "all-linear" and "lm_head" in [target.rpartition(".")[2] for target in self.targets]:
            yield "targets: 'lm_head' can't have an adapter: log-probs are computed from its frozen weight; remove it"


class Recipe(Section):
    """A qalign recipe: one base model and the stages that align it."""

    model: Model
    """Base model: which model is aligned, and how it is held in memory."""
    lora: Lora = Lora()
    """LoRA adapter: the trained matrices; every stage has an adapter of its own with these settings."""
    output: str
    """Output folder, relative to the current one: each stage writes into `<output>/<stage>/`. Choose one per try."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Random seed: fixes the order of rows and the adapter's initial weights; the same seed on the same machine gives
    the same run. Change it to see how much of a result is chance."""
    max_refused_share: Share = 0.05
    """Maximum share of refused rows: a stage stops before training if more rows than this are too long, empty or
    broken. Raise it if you lower `model.max_length`."""
    log_to: Annotated[list[Tracker], _one_or_more(Tracker)] = []
    """Trackers: where each stage logs as well as to `metrics.jsonl`, under the same names, with pictures and sample
    answers: `tensorboard` writes event files into the run folder, `trackio` and `wandb` a run of the project `qalign`.
    Each needs its package. `python -m qalign.watch RUN` needs none."""
    constitution: Constitution | None = None
    """Constitutional AI: settings of `python -m qalign.constitution`, which makes data for the other stages."""
    sft: SFT | None = None
    """SFT stage: settings of `python -m qalign.sft`."""
    reward: Reward | None = None
    """Reward stage: settings of `python -m qalign.reward`. Only PPO and GRPO need a reward model."""
    dpo: DPO | None = None
    """DPO stage: settings of `python -m qalign.dpo`."""
    kto: KTO | None = None
    """KTO stage: settings of `python -m qalign.kto`."""
    ppo: PPO | None = None
    """PPO stage: settings of `python -m qalign.ppo`."""
    grpo: GRPO | None = None
    """GRPO stage: settings of `python -m qalign.grpo`, PPO without a value model."""
    goodhart: Goodhart | None = None
    """Reward over-optimisation: settings of `python -m qalign.goodhart`, which reads `reward` and `ppo` too."""

    def conflicts(self) -> Iterator[str]:
        if self.lora.init == "loftq":
            if self.model.quantization not in ("nf4", "fp4"):
                yield f"lora.init: 'loftq' needs 4-bit weights, and model.quantization is '{self.model.quantization}'"
            held: dict[str, Stage | None] = {name: getattr(self, name) for name in ("dpo", "kto", *RL_STAGES)}
            if self.dpo and not self.dpo.needs_reference:
                held["dpo"] = None
            if moved := [name for name, stage in held.items() if stage and not stage.start_from]:
                yield (
                    f"lora.init: 'loftq' would move the policy away from its reference before the first step of "
                    f"{' and '.join(moved)}; set {' and '.join(f'{name}.start_from: sft' for name in moved)}, or use "
                    "'default'"
                )
        apart = {"stream: always": self.model.stream == "always", "shard": self.model.shard}
        for key in (key for key, is_set in apart.items() if is_set and (self.lora.dora or self.lora.init == "loftq")):
            which = "dora" if self.lora.dora else "init"
            yield f"lora.{which}: starts from all weights of the base, which model.{key} doesn't hold; remove it"
        for name in ("dpo", "kto") if self.model.shard else ():
            learner: DPO | KTO | None = getattr(self, name)
            if learner and learner.sample_prompts not in ("auto", 0):
                yield f"{name}.sample_prompts: with model.shard no answers can be sampled; set it to 0"
        if self.dpo and self.dpo.compares_pairs and self.lora.dropout:
            yield (
                "lora.dropout: can't be used with this dpo.loss, which compares the pairs of a step in a pass without "
                "dropout; set it to 0, or use another loss"
            )
        for name in RL_STAGES:
            settings: PPO | None = getattr(self, name)
            if settings and settings.max_new_tokens >= self.model.max_length:
                yield (
                    f"{name}.max_new_tokens: {settings.max_new_tokens} leaves no room for a prompt in model.max_length "
                    f"{self.model.max_length}; lower it, or raise model.max_length"
                )
        if self.sft and self.sft.start_from == SFT_RUN:
            yield "sft.start_from: an SFT run can't start from itself; name an adapter folder, or remove it"
        yield from self._constitution_conflicts()

    def _constitution_conflicts(self) -> Iterator[str]:
        if not (settings := self.constitution):
            return
        if settings.max_new_tokens >= self.model.max_length:
            yield (
                f"constitution.max_new_tokens: {settings.max_new_tokens} leaves no room for a prompt in "
                f"model.max_length {self.model.max_length}; lower it, or raise model.max_length"
            )
        if settings.uses_sft and self.sft and any(source.path == CONSTITUTION for source in self.sft.data):
            yield (
                f"constitution.{settings.uses_sft}: 'sft' is trained on this very run's revisions; use the base, or "
                "the adapter of another run"
            )

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that it has a section for, in the order in which they run."""
        return tuple(name for name in STAGES if getattr(self, name))

    @property
    def runs(self) -> tuple[str, ...]:
        """The stages, and the run that makes data for them: first, or after the SFT run that it takes a model from."""
        if not self.constitution:
            return self.stages
        first = (SFT_RUN,) if self.sft and self.constitution.uses_sft else ()
        return (*first, CONSTITUTION, *(name for name in self.stages if name not in first))


def differences(kept: dict[str, Any], recipe: Recipe, stage: str, output: str) -> dict[str, tuple[object, object]]:
    """The dotted keys that differ between the recipe that a run of `stage` began with and this one, each with (value
    then, value now). `output`, where the run lies now, `log_to`, where the base is held (`model.stream`, `model.shard`)
    and the sections of other stages and commands don't count."""
    was = str(kept.get("output", "")) or "."
    with suppress(ValidationError):  # if it has a key that no longer exists, which is reported below
        kept = Recipe.model_validate(kept).model_dump(mode="json")  # with defaults for keys that are newer than it
    given = recipe.model_dump(mode="json")
    others = {*STAGES, *OTHERS, "output", "log_to"} - {stage}
    old, new = (dict(flat({key: r[key] for key in r if key not in others})) for r in (kept, given))
    return {
        key: (old.get(key, "not there"), new.get(key, "gone"))
        for key in {**old, **new}
        if key not in ("model.stream", "model.shard") and not _same(old.get(key), new.get(key), (was, output))
    }


def flat(section: dict[str, Any], above: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys of a recipe, or of a summary, with their values."""
    for key, value in section.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in cast(list[Any], value)):
            value = dict(enumerate(cast(list[Any], value)))
        if isinstance(value, dict) and value:
            yield from flat(cast(dict[str, Any], value), f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _same(old: object, new: object, outputs: tuple[str, str]) -> bool:
    """Whether two values of a recipe are equal. Two paths are equal if they lead to the same file, or, where a project
    was moved together with its runs, if they are the same relative to the recipe's output then and now."""
    if old == new or SFT_RUN in (old, new) or not (isinstance(old, str) and isinstance(new, str)):
        return old == new
    if all(value.startswith(("http://", "https://")) for value in (old, new)):  # a server that was started elsewhere
        return True
    if os.path.realpath(old) == os.path.realpath(new):
        return True
    try:
        return os.path.relpath(old, outputs[0]) == os.path.relpath(new, outputs[1])
    except ValueError:  # two drives of Windows
        return False
