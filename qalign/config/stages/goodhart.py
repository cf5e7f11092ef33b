"""The section of `qalign.goodhart`."""

from collections.abc import Iterator
from typing import Annotated, Literal, cast

from pydantic import BeforeValidator, Field

from qalign.config.stages.section import Epochs, LearningRate, Rows, Section

GOLD_PAIRS = "pairs"  # as `gold`


def _as_tuple(value: object) -> object:
    return (
        (value,) if isinstance(value, int) else tuple(cast(list[object], value)) if isinstance(value, list) else value
    )


Seed = Annotated[int, Field(ge=0, lt=2**32)]
Sizes = Annotated[tuple[Rows, ...], Field(min_length=1), BeforeValidator(_as_tuple, Rows | list[Rows])]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), BeforeValidator(_as_tuple, Seed | list[Seed])]


class Goodhart(Section):
    """Reward over-optimisation (Gao et al. 2023, arXiv:2210.10760): proxies of a gold reward are optimised by best-of-n
    and by PPO without a KL price, to see where the gold reward falls while the proxy still rises. `reward` says how
    reward models are trained and on which pairs, `ppo` how answers are sampled and the policy is trained."""

    gold: str = GOLD_PAIRS
    """Gold reward: what answers are truly worth. `pairs` trains a reward model on all of `reward.data`; or a Python
    function `FILE.py:function`, which is exact and costs nothing. It labels the proxies' pairs, so they can only be
    wrong by being few and flipped."""
    pairs: Sizes = (32,)
    """Proxy sizes: how many pairs each proxy reward model learns from, such as `[32, 128]`. Fewer pairs make a proxy
    that is gamed sooner."""
    flipped: Annotated[float, Field(ge=0, lt=0.5)] = 0.25
    """Label noise: the share of the proxies' pairs whose labels are turned round. People disagree on about a quarter of
    real pairs."""
    members: int = Field(default=4, ge=1, le=64)
    """Ensemble members: each proxy is trained as an ensemble of this size (`reward.members`). Its first member alone is
    the single proxy, so that both have learned from the same pairs. 1 compares with no ensemble."""
    combine: Literal["mean", "min", "mean_minus_std"] = "min"
    """Ensemble reward: how the members' scores become one, as `ppo.reward_combine`."""
    epochs: Epochs | None = None
    """Proxy epochs: passes over a proxy's pairs; `reward.epochs` when left out. Raise it for few pairs, or the proxy
    learns next to nothing."""
    learning_rate: LearningRate | None = None
    """Proxy learning rate: `reward.learning_rate` when left out. Members have adapters on fewer layers, so take two to
    five times that of a single model."""
    best_of: int = Field(default=64, ge=2, le=1024)
    """Largest n of best-of-n: answers to each held-out prompt, sampled once and scored by all proxies. The KL grows
    with log n only: 3.2 nats at 64, 5.9 at 1024."""
    seeds: Seeds = (1, 2, 3)
    """Seeds: each one chooses pairs and flips, trains proxies, samples and runs PPO anew. The gold reward is the same
    for all."""

    def conflicts(self) -> Iterator[str]:
        for key in ("pairs", "seeds"):
            values: tuple[int, ...] = getattr(self, key)
            if len(set(values)) < len(values):
                yield f"{key}: {min(v for v in values if values.count(v) > 1)} is there more than once; keep one"
        if self.members == 1 and self.combine != "min":
            yield f"combine: '{self.combine}' has no effect with members 1; remove it, or set members: 4"
