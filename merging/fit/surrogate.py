"""Quadratics that stand for scores as functions of coefficients, and their Pareto front."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
from scipy.optimize import least_squares, minimize

STARTS = 3  # points from which a maximum is looked for


def unknowns(size: int) -> int:
    """Of a quadratic in `size` numbers."""
    return (size + 1) * (size + 2) // 2


def monomials(points: np.ndarray) -> np.ndarray:
    """Of points [n, T] all products of two coordinates, the coordinates and 1, [n, unknowns]."""
    pairs = combinations_with_replacement(range(points.shape[1]), 2)
    squares = [points[:, first] * points[:, second] for first, second in pairs]
    return np.stack([*squares, *points.T, np.ones(len(points))], 1)


@dataclass(frozen=True)
class Quadratic:
    """q(c), or its logistic function where scores lie between 0 and 1."""

    factors: np.ndarray  # [unknowns]
    bounded: bool

    @classmethod
    def fitted(cls, points: np.ndarray, values: np.ndarray) -> "Quadratic":
        """By least squares of the values [n] at points [n, T]; exact where a quadratic gives them."""
        terms = monomials(points)
        bounded = bool((values >= 0).all() and (values <= 1).all())
        inside = values.clip(0.01, 0.99)
        start = np.linalg.lstsq(terms, np.log(inside / (1 - inside)) if bounded else values, rcond=None)[0]
        if not bounded:
            return cls(start, False)

        def slopes(factors: np.ndarray) -> np.ndarray:
            scores = _logistic(terms @ factors)
            return (scores * (1 - scores))[:, None] * terms

        gaps = lambda factors: _logistic(terms @ factors) - values  # noqa: E731
        found = least_squares(gaps, start, jac=slopes, method="lm")  # type: ignore[arg-type]  # scipy's stubs know names
        return cls(found.x, True)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Of points [n, T], [n]."""
        values = monomials(points) @ self.factors
        return _logistic(values) if self.bounded else values

    def gradient(self, point: np.ndarray) -> np.ndarray:
        """At one point [T]."""
        size = len(point)
        matrix = np.zeros((size, size))
        for factor, (first, second) in zip(self.factors, combinations_with_replacement(range(size), 2), strict=False):
            matrix[first, second] += factor
            matrix[second, first] += factor
        slope = matrix @ point + self.factors[-1 - size : -1]
        value = self(point[None])[0]
        return slope * value * (1 - value) if self.bounded else slope


def _logistic(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values.clip(-500, 500)))


def highest(scores: Sequence[Quadratic], weights: np.ndarray, tried: np.ndarray, ends: tuple[float, float]):
    """The point [T] within the ends at which the weighted sum of scores is highest, looked for from the best of those
    `tried` [n, T]."""

    def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
        value = sum(weight * score(point[None])[0] for weight, score in zip(weights, scores, strict=True))
        slope = sum(weight * score.gradient(point) for weight, score in zip(weights, scores, strict=True))
        return -float(value), -np.asarray(slope)

    known = sum(weight * score(tried) for weight, score in zip(weights, scores, strict=True))
    starts = tried[np.argsort(-np.asarray(known), kind="stable")[:STARTS]]
    runs = [minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[ends] * len(start)) for start in starts]
    return min(runs, key=lambda run: run.fun).x


def undominated(values: np.ndarray) -> list[int]:
    """The rows of values [n, T] that no other reaches in every column and exceeds in one; of equal rows the first."""
    reached = (values[None] >= values[:, None]).all(2)  # [n, n]: whether the second reaches the first
    better = reached & ((values[None] > values[:, None]).any(2) | np.tri(len(values), k=-1, dtype=bool))
    return [row for row in range(len(values)) if not better[row].any()]
