"""The sections of the stages that learn from preferences."""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from qalign.config.stages.section import MAX_TOKENS, Batch, LearningRate, NotNegative, Positive, Stage, Steps

MEMBER_LAYERS = 0.2  # of an ensemble's adapters, when left out


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
    members: int = Field(default=1, ge=1, le=64)
    """Ensemble members: trains this many reward models in one pass over the pairs, each with an adapter and head of its
    own, from another seed and on another resample (bootstrap) of the pairs. A policy that exploits one of them doesn't
    fool the others (`ppo.reward_combine`; Coste et al. 2023, arXiv:2310.02743). 4 is usual; take two to five times the
    `learning_rate` of a single model, as fewer layers are trained."""
    member_layers: Annotated[float, Field(gt=0, le=1)] | None = None
    """Member depth: the share of the layers, from the last one, that the members' adapters are on; 0.2 when left out.
    The layers below run once for all members: with 0.2, four members score in at most 1.6 times the time of a single
    model, with 1 in four times. Raise it if the members are less accurate than a single model."""

    @property
    def share(self) -> float:
        """Of the layers, from the last one, that have adapters."""
        return 1.0 if self.members == 1 else self.member_layers or MEMBER_LAYERS

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.members == 1 and self.member_layers is not None:
            yield "member_layers: is for ensembles; members 1 has its adapter on all layers; set members or remove it"
        if self.members > 1 and self.start_from:
            yield (
                "start_from: members share the layers below their adapters, and an adapter to start from may be on all "
                "layers; remove it, or set members 1"
            )

    @property
    def against_probabilities(self) -> str | None:
        if not self.margin:
            return None
        return "margin: true can't use: both say how much better an answer is; remove margin, or leave that column out"


class PolicyStage(Stage):
    """The keys of the stages that train a policy on given answers. What it answers itself shows only when it is sampled
    from."""

    sample_prompts: Literal["auto"] | Annotated[int, Field(ge=0, le=1_000)] = "auto"
    """Sampled evaluation: number of held-out prompts that the policy answers before, during and after training, to warn
    of answers that loop, never end or only get longer. `auto` takes 24, or none if that costs over a tenth of the
    run; 0 takes none."""
    sample_every: Steps | None = None
    """Sampling interval, in optimiser steps: a fifth of the run when left out, or more where that costs over a tenth of
    it. Lower it to see earlier where a run goes wrong."""
    max_new_tokens: int = Field(default=256, ge=1, le=MAX_TOKENS)
    """Maximum answer length: of the sampled evaluation, in tokens; longer answers are cut. Set about three times what
    your chosen answers have."""

    @property
    def needs_reference(self) -> bool:
        return True

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        for key in ("sample_prompts", "sample_every"):
            if getattr(self, key) not in (None, 0, "auto") and not self.has_held_out:
                yield f"{key}: has nothing to answer without eval_data or holdout; add one or remove this"
        if self.sample_every and self.sample_prompts == 0:
            yield "sample_every: has no effect with sample_prompts 0; remove one of them"


# fmt: off
DPO_LOSSES = Literal[
    "sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "exo_pair", "discopop", "bco_pair", "nca_pair", "sppo_hard",
    "apo_zero", "apo_down", "aot", "aot_unpaired", "simpo", "orpo", "sft",
]
# fmt: on
REFERENCE_FREE = frozenset({"simpo", "orpo", "sft"})
OF_PROBABILITIES = ("sigmoid", "sigmoid_norm", "ipo", "exo_pair")  # of a row's chosen_probability; `sft` beside them
_SMOOTHED = (*OF_PROBABILITIES, "robust", "aot", "aot_unpaired")
_OF_THE_GAP = ("sigmoid", "hinge", "robust", "exo_pair", "discopop")  # of sums over tokens


def needs_reference(loss: str | Iterable[str]) -> bool:
    """Whether a preference loss, or any part of a sum of losses, compares the policy with a reference."""
    return not REFERENCE_FREE.issuperset([loss] if isinstance(loss, str) else loss)


class DPO(PolicyStage):
    """Direct preference optimisation and related losses: learns from pairs of a chosen and a rejected answer."""

    loss: DPO_LOSSES | Annotated[dict[DPO_LOSSES, Positive], Field(min_length=1)] = "sigmoid"
    """Preference loss: `sigmoid` is DPO; `qalign/losses/preference.py` has the paper of each. Try `ipo` or
    `sigmoid_norm` if answers only get longer, `robust` if some labels are wrong, `simpo` or `orpo` to train without a
    reference. `{sigmoid: 1.0, sft: 0.2}` is a weighted sum. `sft` is the chosen answer's negative log-likelihood, the
    mean over its own tokens (TRL: over all chosen tokens of the batch): add 0.1 to 1.0 of it if `logps/chosen` in
    metrics.jsonl falls and answers fall apart."""
    beta: Positive = 0.1
    """KL coefficient β: how strongly the policy is held to the reference (IPO's τ, SimPO's reward scale, ORPO's λ).
    Take 0.01 if answers hardly change, 0.3 if they get worse; about 2 for simpo, 5 for sigmoid_norm."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Label smoothing ε: the share of pairs believed to be labelled the wrong way round; 0.1 is usual. On `sigmoid` it
    is cDPO. `robust` needs it, and `exo_pair`, with 0.001. Rows may say how sure a label is: `chosen_probability`."""
    gamma: NotNegative | None = None
    """SimPO margin γ: by how much the chosen answer should win; 0.5 when left out. Only for the loss `simpo`."""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """Divergence: what holds the policy to the reference (f-DPO, arXiv:2309.16240): `reverse_kl` is DPO's. The others
    trade some of the effect for more diverse answers: `js` a little, `forward_kl` most; `alpha` lies between."""
    divergence_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """Divergence α: of the α-divergence; 0 is forward KL, 1 reverse KL, 0.5 when left out. For divergence `alpha`."""
    length_penalty: NotNegative = 0.0
    """R-DPO length penalty α: in nats per token (arXiv:2403.19159); a longer chosen answer has to win by less, and a
    shorter one by more, so that length isn't learned. Try 0.01 if answers only get longer."""
    discopop_tau: Positive | None = None
    """DiscoPOP temperature τ: how sharply its two losses change over; 0.05 when left out. Only for loss `discopop`."""
    reference: Literal["cached", "in_step"] = "cached"
    """Reference log-probs: `cached` computes them once per pair and keeps them in a file for later epochs and runs.
    `in_step` computes them in every step, which is slower; use it to check the cache."""

    @property
    def losses(self) -> dict[str, float]:
        """The weights of the sum of losses, by their names."""
        return {self.loss: 1.0} if isinstance(self.loss, str) else {**self.loss}

    @property
    def loss_options(self) -> dict[str, Any]:
        """The arguments of `qalign.losses.preference.PreferenceLoss`."""
        names = ("beta", "label_smoothing", "gamma", "divergence", "divergence_alpha", "length_penalty", "discopop_tau")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return {"weights": self.losses, **given}

    @property
    def loss_in_words(self) -> str:
        """The loss and what changes it, for the header."""
        weighted = [f"{weight:g} {name}" for name, weight in self.losses.items()]
        options = {name: value for name, value in self.loss_options.items() if name not in ("weights", "divergence")}
        changed = [name for name in options if name == "beta" or options[name] != DPO.model_fields[name].default]
        words = [self.loss if isinstance(self.loss, str) else " + ".join(weighted)]
        words += [f"{name.replace('_', ' ')} {options[name]:g}" for name in changed]
        return ", ".join(words + ([] if self.divergence == "reverse_kl" else [f"divergence {self.divergence}"]))

    @property
    def needs_reference(self) -> bool:
        return needs_reference(self.loss)

    @property
    def compares_pairs(self) -> bool:
        """Whether the loss of a pair depends on the other pairs of the optimiser step."""
        return not {"aot", "aot_unpaired"}.isdisjoint(self.losses)

    @property
    def against_probabilities(self) -> str | None:
        if set(self.losses) <= {*OF_PROBABILITIES, "sft"}:
            return None
        return f"loss {self._said} can't use; take {_any_of(OF_PROBABILITIES)}, or leave that column out"

    @property
    def _said(self) -> str:
        return " + ".join(f"'{name}'" for name in self.losses)

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        names = set(self.losses)
        for key, is_set, takers in (
            ("label_smoothing", self.label_smoothing, _SMOOTHED),
            ("gamma", self.gamma is not None, ("simpo",)),
            ("length_penalty", self.length_penalty, _OF_THE_GAP),
            ("discopop_tau", self.discopop_tau is not None, ("discopop",)),
        ):
            if is_set and names.isdisjoint(takers):
                yield f"{key}: has no effect with loss {self._said}; use loss {_any_of(takers)}, or remove it"
        if self.divergence != "reverse_kl" and (others := names - {*_OF_THE_GAP, "sigmoid_norm", "ipo", "sft"}):
            takers = _any_of((*_OF_THE_GAP, "sigmoid_norm", "ipo"))
            yield f"divergence: '{self.divergence}' isn't defined for loss '{min(others)}'; use {takers}, or remove it"
        if self.divergence_alpha is not None and self.divergence != "alpha":
            yield f"divergence_alpha: has no effect with divergence '{self.divergence}'; use 'alpha', or remove it"
        if "robust" in names and not self.label_smoothing:
            yield "loss: 'robust' needs label_smoothing above 0, or it is 'sigmoid'"
        if "exo_pair" in names and not self.label_smoothing:
            yield "loss: 'exo_pair' needs label_smoothing above 0; its paper takes 0.001"
        if names == {"sft"}:
            yield "loss: 'sft' alone learns no preference; write {sigmoid: 1.0, sft: 0.2}, or use the sft stage"
        if self.compares_pairs and self.batch_size == 1:
            yield f"batch_size: 1 leaves loss {self._said} nothing to compare; take 8 or more"
        if not self.needs_reference and self.reference != "cached":
            yield f"reference: has no effect with loss {self._said}, which needs none; remove it"


def _any_of(names: tuple[str, ...]) -> str:
    return " or ".join(", ".join(f"'{name}'" for name in names).rsplit(", ", 1))


class KTO(PolicyStage):
    """Kahneman-Tversky optimisation (arXiv:2402.01306): learns from single answers that are labelled good or bad."""

    batch_size: Batch = 16
    """Batch size: labelled answers in one optimiser step, at least 2. The KL estimate is a mean over the step, so take
    8 or more; it costs no memory, because it is processed in micro-batches."""
    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """Loss on labelled answers: `kto`, or `apo_zero_unpaired` (arXiv:2408.06266), which has no KL estimate and takes
    less time. Try it if the good answers are better than what the model says."""
    beta: Positive = 0.1
    """KL coefficient β: how strongly the policy is held to the reference. Take 0.01 if answers hardly change, 0.3 if
    they get worse."""
    desirable_weight: NotNegative = 1.0
    """Desirable weight λ_D: multiplies the loss of good answers. Where good and bad answers are not equally many, raise
    the weight of the rarer ones; the header says which values keep the balance between 1:1 and 4:3."""
    undesirable_weight: NotNegative = 1.0
    """Undesirable weight λ_U: multiplies the loss of bad answers."""
    reference: Literal["cached", "in_step"] = "cached"
    """Reference log-probs: `cached` computes them once per prompt and answer, those of the KL estimate too, and keeps
    them in a file for later epochs and runs. `in_step` computes them in every step; use it to check the cache."""

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.batch_size == 1 and self.loss == "kto":
            yield "batch_size: 1 leaves no other answer for the KL estimate; take 8 or more"
        if not self.desirable_weight + self.undesirable_weight:
            yield "desirable_weight: 0, as is undesirable_weight, so nothing is learned; set one of them to 1"

    @property
    def loss_options(self) -> dict[str, Any]:
        """The arguments of `PreferenceLoss` for the reward of an answer, which is DPO's."""
        return {"weights": {"sigmoid": 1.0}, "beta": self.beta}
