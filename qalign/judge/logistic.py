"""L1-penalised logistic regression on targets that are probabilities, as LIBLINEAR solves it. NumPy alone.

newGLMNET (Yuan, Ho and Lin 2012, "An Improved GLMNET for L1-regularized Logistic Regression", JMLR 13): Newton steps
whose quadratic model is minimised by coordinate descent, with line search. Length control in `alpaca_eval` is fitted
with LIBLINEAR through scikit-learn. Where lengths alone separate wins from losses, the minimum lies so far out that the
result is where the solver stops. So tolerances, the order of coordinates and its random numbers are LIBLINEAR's here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

TOLERANCE = 1e-4  # scikit-learn's default
NEWTON_STEPS, SWEEPS, HALVINGS = 100, 1000, 20
LONGEST_STEP = 10.0  # of a coefficient in a sweep
SUFFICIENT = 0.01  # share of the predicted decrease that a step must reach
DAMPING = 1e-12  # added to the diagonal of the Hessian
LARGEST_LOGIT = 709.78  # beyond it, exp overflows in float64


@dataclass(frozen=True)
class Problem:
    """Σ cost · cross-entropy(p, σ(x·w)) over the rows, plus |w|₁."""

    x: Floats  # (rows, coefficients)
    p: Floats  # (rows,) from 0 to 1
    cost: Floats  # (rows,) above 0

    @property
    def labels(self) -> int:
        """LIBLINEAR's number of rows: a probability between 0 and 1 is a row of each label."""
        return int((self.p > 0).sum() + (self.p < 1).sum())

    def loss(self, logits: Floats) -> float:
        return float((self.cost * (np.logaddexp(0, logits) - self.p * logits)).sum())

    def derivatives(self, logits: Floats) -> tuple[Floats, Floats]:
        """(gradient, Hessian) of the loss, by the coefficients."""
        predicted = sigmoid(logits)
        curvature = (self.x.T * (self.cost * predicted * (1 - predicted))) @ self.x
        return self.x.T @ (self.cost * (predicted - self.p)), curvature + DAMPING * np.eye(self.x.shape[1])


def fit(x: Floats, p: Floats, weights: Floats, strength: float, seed: int) -> Floats:
    """The coefficients `(coefficients,)` that minimise C · Σ weight · cross-entropy + |w|₁; C is the `strength`.

    Args:
        x: inputs `(rows, coefficients)`; a constant column is the intercept, which is penalised too.
        p: targets `(rows,)`, from 0 to 1; `weights` `(rows,)` are 0 or more.
        seed: of the order in which coordinates are visited.
    """
    has = weights > 0
    problem = Problem(x[has], p[has], strength * weights[has])
    fewer = min((problem.p > 0).sum(), (problem.p < 1).sum())
    tolerance, shrink = TOLERANCE * max(int(fewer), 1) / problem.labels, 1 / problem.labels
    order, numbers = [*range(x.shape[1])], _random_numbers(seed)
    w, logits = np.zeros(x.shape[1]), np.zeros(len(problem.p))
    first, largest, inner = 0.0, np.inf, 1.0
    for number in range(NEWTON_STEPS):
        gradient, hessian = problem.derivatives(logits)
        active, violations = _shrunk(w, gradient, order, largest * shrink)
        if number == 0:
            first = sum(violations)
        if sum(violations) <= tolerance * first:
            break
        target, sweeps = _minimum(w, gradient, hessian, order, active, inner * first, shrink, numbers)
        moved, logits = _line_search(problem, w, logits, target, gradient)
        if (moved == w).all():
            break
        w = moved
        inner, largest = inner / 4 if sweeps == 1 else inner, max(violations)
    return w


def _shrunk(w: Floats, gradient: Floats, order: list[int], margin: float) -> tuple[int, list[float]]:
    """Moves coefficients that are surely 0 to the end of the `order`: (the number of others, their violations)."""
    active, place, violations = len(order), 0, []
    while place < active:
        which = order[place]
        violation = _violation(float(gradient[which]), float(w[which]))
        if w[which] == 0 and abs(gradient[which]) < 1 - margin:
            active -= 1
            order[place], order[active] = order[active], order[place]
        else:
            violations.append(violation)
            place += 1
    return active, violations


def _minimum(
    w: Floats, gradient: Floats, hessian: Floats, order: list[int], active: int, enough: float, shrink: float,
    numbers: Iterator[int],
) -> tuple[Floats, int]:  # fmt: skip
    """The minimum of the quadratic model and the penalty, by coordinate descent until the violations' sum is at most
    `enough`: (it, the number of sweeps)."""
    target, left, largest = w.copy(), active, np.inf
    for sweep in range(1, SWEEPS + 1):
        for place in range(left):
            other = place + (next(numbers) * (left - place) >> 32)
            order[place], order[other] = order[other], order[place]
        violations, place = [0.0], 0
        while place < left:
            which = order[place]
            slope, at = float(gradient[which] + hessian[which] @ (target - w)), float(target[which])
            if at == 0 and abs(slope) < 1 - largest * shrink:
                left -= 1
                order[place], order[left] = order[left], order[place]
                continue
            violations.append(_violation(slope, at))
            target[which] += _step(slope, float(hessian[which, which]), at)
            place += 1
        if sum(violations) > enough:
            largest = max(violations)
        elif left == active:
            return target, sweep
        else:  # once more with those that were left out
            left, largest = active, np.inf
    return target, SWEEPS


def _step(slope: float, curvature: float, at: float) -> float:
    """How far one coefficient moves to the minimum of its quadratic model plus |w|."""
    if slope + 1 < curvature * at:
        step = -(slope + 1) / curvature
    elif slope - 1 > curvature * at:
        step = -(slope - 1) / curvature
    else:
        step = -at
    return 0.0 if abs(step) < 1e-12 else min(max(step, -LONGEST_STEP), LONGEST_STEP)


def _violation(slope: float, at: float) -> float:
    """How far a coefficient is from optimal: the least subgradient of loss plus |w| there."""
    return max(-slope - 1, slope - 1, 0.0) if at == 0 else abs(slope + (1 if at > 0 else -1))


def _line_search(
    problem: Problem, w: Floats, logits: Floats, target: Floats, gradient: Floats
) -> tuple[Floats, Floats]:
    """(coefficients, logits) after the longest of the steps 1, 1/2, 1/4 … that decreases the objective enough."""
    before, predicted = problem.loss(logits), gradient @ (target - w) + np.abs(target).sum() - np.abs(w).sum()
    for halvings in range(HALVINGS):
        there = w + (target - w) / 2**halvings
        new = problem.x @ there
        change = problem.loss(new) - before + np.abs(there).sum() - np.abs(w).sum()
        is_finite = max(new.max(), (new - logits).max()) < LARGEST_LOGIT
        if is_finite and change <= SUFFICIENT * predicted / 2**halvings:
            return there, new
    return w, logits


def _random_numbers(seed: int) -> Iterator[int]:
    """Numbers of 32 bits from MT19937."""
    generator = np.random.RandomState(seed)
    while True:
        yield from generator.randint(0, 2**32, size=64, dtype=np.uint32).tolist()


def sigmoid(x: ArrayLike) -> Floats:
    return np.exp(-np.logaddexp(0, np.negative(x)))
