"""The sections of the stages that learn from sampled answers."""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, model_validator

from qalign.config.stages.section import (
    MAX_TOKENS,
    Batch,
    Count,
    Data,
    Epochs,
    LearningRate,
    NotNegative,
    Positive,
    Rewards,
    RewardSource,
    Share,
    Stage,
    Steps,
)

# Keys whose default follows from `advantage`, as in the paper of each.
OF_ADVANTAGE: dict[str, dict[str, str]] = {
    name: dict(zip(("value", "kl", "ratio", "loss_average", "reward_scaling"), values, strict=True))
    for name, values in {
        "gae": ("adapter", "in_reward", "token", "token", "running"),
        "rloo": ("none", "in_reward", "product", "answer", "none"),
        "grpo": ("none", "in_loss", "token", "answer", "none"),
        "dr_grpo": ("none", "in_loss", "token", "constant", "none"),
    }.items()
}
HOST = r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])"  # a name or an address; IPv6 in brackets
ServerUrl = Annotated[str, Field(pattern=rf"^https?://{HOST}(:\d{{1,5}})?(/v1)?/?$", max_length=300)]
OF_GAE = ("gamma", "gae_lambda", "value_coefficient", "value_clip")  # keys of the value model


class PPO(Stage):
    """Proximal policy optimisation: samples answers, scores them and makes the better ones more likely."""

    stage: ClassVar[str] = "ppo"

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
    reward_combine: Literal["mean", "min", "mean_minus_std"] = "mean"
    """Ensemble reward: how the scores of a reward run with `members` become one score: their `mean`; the `min`, which
    no answer raises that one member sees through; or `mean_minus_std`, which subtracts `uncertainty` times their
    standard deviation (Coste et al. 2023, arXiv:2310.02743). Take `min` if the judge falls while the reward rises."""
    uncertainty: NotNegative | None = None
    """Uncertainty coefficient: how many standard deviations of the members' scores `mean_minus_std` subtracts; 1.0 when
    left out. Raise it if `eval_spread` in metrics.jsonl rises."""
    advantage: Literal["gae", "rloo", "grpo", "dr_grpo"] = "gae"
    """Advantage estimator: `gae` learns a value model. The others need none, and compare the answers to a prompt:
    `rloo` with the mean of the others (arXiv:2402.14740), `grpo` in standard deviations from their mean
    (arXiv:2402.03300), `dr_grpo` without dividing by it (arXiv:2503.20783). They take less memory and time."""
    max_new_tokens: int = Field(default=256, ge=1, le=MAX_TOKENS)
    """Maximum answer length: in tokens; longer answers are cut. Prompts must leave this much room in
    `model.max_length`. Raise it if few answers end by themselves (`eval_ended`); time and memory grow with it."""
    temperature: Positive = 1.0
    """Sampling temperature: log-probs are those of the scaled distribution. Leave it at 1: less explores less."""
    mini_batches: Count = 2
    """Mini-batches: optimiser steps in one pass over an iteration's answers. More give more, smaller updates."""
    update_epochs: Count = 2
    """PPO epochs: passes over an iteration's answers. Lower it if updates often stop early (`kl_stop`)."""
    kl: Literal["in_reward", "in_loss", "none"] = "in_reward"
    """KL penalty: `in_reward` charges each token's log-ratio to the reference (k1) to its reward, as PPO and RLOO do;
    `in_loss` adds the k3 estimate to the loss, as GRPO does, and is its default; `none` lets the policy go where the
    reward leads, which suits verifiable rewards."""
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
    clip_high: Positive | None = None
    """Upper PPO clip range (DAPO's clip-higher, arXiv:2503.14476): the ratio is bounded by 1 + `clip_high`, and below
    by 1 - `clip`. Try 0.28 if the entropy collapses; `clip` when left out."""
    ratio_max: Annotated[float, Field(gt=1, le=1_000)] | None = None
    """Two-sided clipping (INTELLECT-2's δ, arXiv:2505.07291): the largest ratio that counts where the advantage is
    negative. Try 4 if the loss jumps; no bound when left out."""
    ratio: Literal["token", "sequence", "product"] = "token"
    """Probability ratio: `token` has one for each token; `sequence` one for each answer, the geometric mean of its
    tokens' (GSPO, arXiv:2507.18071), with a `clip` of about 3e-4; `product` that of the whole answer, as one action
    (the default of `rloo`)."""
    loss_average: Literal["token", "answer", "constant"] = "token"
    """Loss normalisation: `token` is the mean over all tokens of a mini-batch (PPO, DAPO); `answer` that over the means
    of its answers (default of `grpo`, `rloo`); `constant` divides by answers x `max_new_tokens` (default of
    `dr_grpo`)."""
    dynamic_sampling: bool = False
    """Dynamic sampling (DAPO, arXiv:2503.14476): updates leave out prompts whose answers all score alike, which teach
    nothing; no others are sampled for them. `dynamic_sampling/left_out` counts them. Not with `gae`."""
    value: Literal["adapter", "trunk", "none"] = "adapter"
    """Value model: `adapter` is an adapter and head of its own, initialised from the reward model; `trunk` is only a
    head on the policy's hidden states, which saves memory and time; `none` is what all but `gae` have."""
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
    to detect reward hacking: the judge falls while the reward rises. `reward/member_4` is one member of this recipe's
    reward run, which is then left out of the reward."""
    patience: int = Field(default=3, ge=2, le=1_000)
    """Alarm patience: evaluations in a row with falling judge and rising reward before the alarm. Larger is surer."""
    on_alarm: Literal["warn", "slow", "stop"] = "warn"
    """Alarm action: `warn` prints a warning, `slow` also doubles the KL coefficient (up to 16-fold), `stop` ends the
    run. The best adapter so far is kept in any case. Take `stop` for runs that nobody watches."""
    engine: Literal["transformers", "vllm"] | ServerUrl = "transformers"
    """Sampling engine: `transformers` uses the base in memory; `vllm` holds a second copy of it on the same GPU. Take
    `vllm` if it is installed and the memory allows it. The address of a vLLM server, such as `http://localhost:8000`,
    samples there; it must read this disk, as it is given the adapter before every iteration (docs/ppo.md)."""
    importance_cap: Annotated[float, Field(ge=1, le=1_000)] | None = 2.0
    """Truncated importance sampling cap C (Yao et al. 2025): answers from vLLM are weighted, token by token, by
    min(π / π_vllm, C), as vLLM's numbers differ from the training model's. `sampling/kl` in metrics.jsonl says by how
    much. null leaves them unweighted."""
    trainer: dict[str, Any] = {}
    """Optimiser arguments: under transformers' names, such as `{optim: paged_adamw_8bit, weight_decay: 0.01}`. Lower
    `max_grad_norm` to 0.3 if training is unstable."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_advantage(cls, given: Any) -> Any:
        """Fills in the defaults that follow from `advantage`."""
        if not isinstance(given, dict):
            return given
        keys = cast(dict[str, Any], given)
        advantage = keys.get("advantage", cls.model_fields["advantage"].default)
        return OF_ADVANTAGE.get(advantage if isinstance(advantage, str) else "", {}) | keys

    def conflicts(self) -> Iterator[str]:
        yield from self._batch_conflicts()
        yield from self._advantage_conflicts()
        yield from self._held_out_conflicts()
        if self.engine == "transformers":
            yield from self._without_effect(
                ("importance_cap",), "engine 'transformers', which is the model that learns"
            )
        if self.judge and not self.has_held_out:
            yield "judge: has nothing to judge without eval_data or holdout; add held-out prompts or remove this"
        if self.judge and {r.source for r in self.judge} & {r.source for r in self.reward}:
            yield "judge: must not be what the policy trains on; name another reward run, or a function"
        if self.uncertainty is not None and self.reward_combine != "mean_minus_std":
            yield f"uncertainty: has no effect with reward_combine '{self.reward_combine}'; remove it"
        if self.kl == "none":
            if self.kl_target:
                yield "kl_target: has no effect with kl 'none'; remove it, or set kl: in_reward"
            if self.on_alarm == "slow":
                yield "on_alarm: 'slow' raises the KL coefficient, which has no effect with kl 'none'; use 'stop'"
            yield from self._without_effect(("kl_coefficient",), "kl 'none'")
        elif self.kl_target and not self.kl_coefficient:
            yield "kl_target: has no effect with kl_coefficient 0, which can't adapt; raise that, or remove this"
        if self.ratio_max is not None and self.ratio_max < 1 + (self.clip_high or self.clip):
            yield f"ratio_max: {self.ratio_max:g} is below the upper clip bound; raise it, or lower clip_high"

    def _without_effect(self, keys: Iterable[str], setting: str) -> Iterator[str]:
        """A recipe that was written out in full has every key, so one with its default may stay."""
        for key in keys:
            if getattr(self, key) != type(self).model_fields[key].default:
                yield f"{key}: has no effect with {setting}; remove it"

    def _advantage_conflicts(self) -> Iterator[str]:
        if self.advantage == "gae":
            if self.value == "none":
                yield "value: advantage 'gae' needs a value model; take 'adapter' or 'trunk', or advantage: rloo"
            if self.dynamic_sampling:
                yield "dynamic_sampling: with advantage 'gae' the value model learns from all prompts; remove it"
            if self.reward_scaling == "prompt" and self.samples_per_prompt == 1:
                one = "and samples_per_prompt is 1; use 'running'"
                yield f"reward_scaling: 'prompt' compares answers to one prompt, {one}"
            return
        named = f"advantage '{self.advantage}'"
        if self.samples_per_prompt < 2:
            yield f"samples_per_prompt: {named} compares the answers to a prompt; set 2 or more, or advantage: gae"
        if self.value != "none":
            yield f"value: {named} has no value model; remove it, or set advantage: gae"
        if self.reward_scaling == "prompt":
            yield f"reward_scaling: {named} subtracts the mean of a prompt's answers itself; remove it"
        yield from self._without_effect(OF_GAE, f"{named}, which has no value model")

    def _batch_conflicts(self) -> Iterator[str]:
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

    @property
    def sources(self) -> Iterator[tuple[str, RewardSource]]:
        """(key, source) of every reward and judge."""
        for key in ("reward", "judge"):
            yield from ((key, source) for source in getattr(self, key) or ())


class GRPO(PPO):
    """Group relative policy optimisation: PPO without a value model, which compares the answers to each prompt. It has
    the keys of `ppo`, with the defaults that GRPO is run with."""

    stage: ClassVar[str] = "grpo"

    advantage: Literal["gae", "rloo", "grpo", "dr_grpo"] = "grpo"
    """Advantage estimator: `grpo` measures scores in standard deviations from the mean of the prompt's answers
    (arXiv:2402.03300), `dr_grpo` without dividing by it (arXiv:2503.20783), `rloo` from the mean of the others
    (arXiv:2402.14740). `gae` learns a value model, as PPO does."""
    samples_per_prompt: Count = 8
    """Samples per prompt: answers to each prompt, which is read once for all of them. More make a better baseline."""
    mini_batches: Count = 1
    """Mini-batches: optimiser steps in one pass over an iteration's answers. With 1, and one pass, each answer is
    learned from by the policy that gave it."""
    update_epochs: Count = 1
    """GRPO iterations μ: passes over an iteration's answers. 2 to 4 learn more from each; `policy/clipfrac_avg` shows
    how much of it is clipped."""
    kl: Literal["in_reward", "in_loss", "none"] = "in_loss"
    """KL penalty: `in_loss` adds the k3 estimate of KL to the loss; `in_reward` charges it to the rewards, as RLOO does
    and by default with it; `none` lets the policy go where the reward leads, which suits verifiable rewards."""
    kl_coefficient: NotNegative = 0.04
    """KL coefficient β: the weight of the KL penalty. 0.04 is the paper's; with verifiable rewards many set 0.001, or
    `kl: none`. Double it if answers get strange."""
    loss_average: Literal["token", "answer", "constant"] = "answer"
    """Loss normalisation: `answer` is the mean over the means of the answers (GRPO); `token` that over all tokens of a
    mini-batch (DAPO, TRL's default), in which long answers count more; `constant` divides by answers x
    `max_new_tokens` (default of `dr_grpo`)."""
    value: Literal["adapter", "trunk", "none"] = "none"
    """Value model: `none`, but with `gae`."""
    reward_scaling: Literal["prompt", "running", "none"] = "none"
    """Reward scaling: `running` standardises scores by their running mean and deviation, which matters to `rloo` and
    `dr_grpo` alone; `none` leaves them as they are."""
