"""Ensembles of reward models: their resamples, and one score from the members' scores.

Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization" (arXiv:2310.02743). Tensors of scores
have the members in their last dimension.
"""

from typing import Literal

import torch
from torch import Tensor

Combine = Literal["mean", "min", "mean_minus_std"]


def resample_counts(rows: int, seed: int) -> Tensor:
    """How often each row is in a bootstrap resample, which draws as many rows as there are, with replacement (Efron
    1979): int64 `(rows,)`."""
    drawn = torch.randint(rows, (rows,), generator=torch.Generator().manual_seed(seed))
    return torch.bincount(drawn, minlength=rows)


def member_seed(seed: int, number: int) -> int:
    """The seed of a member, counted from 1; the first one has that of the recipe. (Ensembles of neighbouring seeds
    share no member.)"""
    return (seed + (number - 1) * 1_000_003) % 2**32


def aligned(scores: Tensor, zeros: Tensor) -> Tensor:
    """Scores `(…, members)` with one zero. Bradley-Terry learns differences alone, so each member's scores have an
    offset of their own; the smallest would otherwise be the same member's everywhere. `zeros` `(members,)` are the
    members' mean scores of the same answers. The mean over members stays what it was."""
    return scores - (zeros - zeros.mean())


def combined_scores(scores: Tensor, how: Combine, uncertainty: float = 1.0) -> Tensor:
    """One score `(…)` from the members' `(…, members)`: the `mean`; the `min` (worst-case optimisation, eq. 3); or the
    mean minus `uncertainty` times the spread (uncertainty-weighted optimisation, eq. 4, with the standard deviation in
    place of the variance, so that the coefficient has no unit)."""
    if how == "min":
        return scores.amin(dim=-1)
    mean = scores.mean(dim=-1)
    return mean if how == "mean" else mean - uncertainty * spread(scores)


def spread(scores: Tensor) -> Tensor:
    """The standard deviation of the members' scores, divided by their number: `(…)`."""
    return scores.std(dim=-1, correction=0)
