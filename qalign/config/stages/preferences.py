"""The sections of the stages that learn from preferences."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from qalign.config.stages.section import LearningRate, NotNegative, Positive, Stage

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
    fool the others (`ppo.reward_combine`; Coste et al. 2023, arXiv:2310.02743). 4 is usual."""
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


DPO_LOSSES = Literal["sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "apo_zero", "simpo", "orpo"]
REFERENCE_FREE = frozenset({"simpo", "orpo"})


class DPO(Stage):
    """Direct preference optimisation and related losses: learns from pairs of a chosen and a rejected answer."""

    loss: DPO_LOSSES = "sigmoid"
    """Preference loss: `sigmoid` is DPO; `qalign/losses/preference.py` has the paper of each. Try `ipo` or
    `sigmoid_norm` if answers only get longer, `robust` if some labels are wrong, `simpo` or `orpo` to train without a
    reference."""
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
