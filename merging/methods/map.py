from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import torch

from merging.context import Context
from merging.entries import combined
from merging.errors import UserError
from merging.experts import Experts
from merging.fit.black_box import Point, Validation, mean
from merging.fit.surrogate import Quadratic, highest, undominated, unknowns
from merging.merged import Merged
from merging.ops import generator
from merging.options import Count, Options, Within


@dataclass(frozen=True)
class Map(Options):
    """MAP: every task's validation score as a quadratic in the coefficients, and a merge from their Pareto front.

    Li et al., 2024, arXiv 2406.07529 and its public code. W_0 + sum_t c_t tau_t is scored at `merges` points of c
    within [0, high], every task alone among them; null takes as many as a quadratic has unknowns, and two for every
    task. Scores between 0 and 1 are fitted through the logistic function, as in the code, others (ours) as they are.
    preference: weights of the tasks, null the same for all; taken is the point of the front where the weighted sum of
    predicted scores is highest. verify: where a scored merge has a higher sum than that point turns out to have, it is
    taken instead, ours (false: as published); few points leave a surrogate that promises too much, at eight tasks above
    all. The front, of predicted scores, is kept with a saved merge and drawn. Ours: points are drawn uniformly (theirs
    on a grid, which has two values at eight tasks), the fit starts from the logits (theirs from ones), the front is of
    `front` weighted sums, so that of a concave part nothing is seen (theirs by NSGA-III), and what is not scored is not
    looked at (theirs searches within [-3, 3]). Left out: nested MAP, which merges pair by pair, and Bayesian sampling.
    """

    merges: Count | None = None
    high: Annotated[float, Within(0.0, 10.0, open_low=True)] = 1.0
    preference: Mapping[str, float] | None = None
    front: Count = 40
    verify: bool = True
    needs: ClassVar[str] = "labels"
    splits: ClassVar[tuple[str, ...]] = ("val",)
    additive: ClassVar[bool] = True

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without validation scores, for fewer merges than a quadratic needs, and for a preference
        that is not one of these tasks."""
        names = sorted(experts.tasks)  # so that the order of tasks decides nothing
        weights = self._weights(names)
        validation = Validation(lambda point: made(experts, point), self, context)
        tried = self._points(names, context.seed)
        seen = [validation(dict(zip(names, point, strict=True))) for point in tried.tolist()]
        fits = [Quadratic.fitted(tried, np.array([scores[task] for scores in seen])) for task in names]
        chosen = highest(fits, weights, tried, (0.0, self.high))
        others = [highest(fits, some, tried, (0.0, self.high)) for some in self._directions(len(names), context.seed)]
        points = np.stack([chosen, *others])
        predicted = np.stack([fit(points) for fit in fits], 1)
        on_front = undominated(predicted.round(9))
        front = [{"coefficients": told(names, points[row]), "scores": told(names, predicted[row])}
                 for row in on_front]  # fmt: skip
        point, scored = dict(zip(names, chosen.tolist(), strict=True)), [*zip(tried.tolist(), seen, strict=True)]
        worth = lambda scores: float(weights @ [scores[task] for task in names])  # noqa: E731
        best, scores = max(scored, key=lambda pair: worth(pair[1]))
        remark = (
            f"mean validation score {mean(validation(point)):.4f} where {predicted[0].mean():.4f} was predicted, and "
            f"{mean(scores):.4f} of the preferred one of {len(seen)} scored merges; the front has {len(front)} points"
        )
        if self.verify and worth(scores) > worth(validation(point)):
            point, remark = dict(zip(names, best, strict=True)), f"a scored merge was taken: {remark}"
        return replace(made(experts, point), remarks=(remark,), provenance={"front": front})

    def _weights(self, names: list[str]) -> np.ndarray:
        if self.preference is None:
            return np.full(len(names), 1 / len(names))
        if {*self.preference} != {*names} or min(self.preference.values()) < 0 or not any(self.preference.values()):
            raise UserError(
                f"map: preference={dict(self.preference)} gives no weights of {', '.join(names)}. Give each a "
                f"number of at least 0, not all of them 0."
            )
        weights = np.array([self.preference[name] for name in names], dtype=float)
        return weights / weights.sum()

    def _points(self, names: list[str], seed: int) -> np.ndarray:
        """[n, T]: the experts alone, then uniform draws."""
        least, size = unknowns(len(names)), len(names)
        count = least + 2 * size if self.merges is None else self.merges
        if count < least:
            raise UserError(
                f"map: merges={count} leaves a quadratic in {size} coefficients open. Give {least} or more."
            )
        drawn = torch.rand(count - size, size, generator=generator("map", seed), dtype=torch.float64)
        return self.high * np.concatenate([np.eye(size), drawn.numpy()])

    def _directions(self, size: int, seed: int) -> np.ndarray:
        """[front, T]: every task alone, then weights drawn uniformly from the simplex."""
        drawn = torch.rand(self.front, size, generator=generator("front", seed), dtype=torch.float64).numpy()
        drawn = -np.log(drawn.clip(1e-12, 1.0))
        return np.concatenate([np.eye(size), drawn / drawn.sum(1, keepdims=True)])[: max(self.front, size)]


def made(experts: Experts, point: Point) -> Merged:
    """W_0 + sum_t c_t tau_t."""
    weights = torch.tensor([point[task] for task in experts.tasks])
    return experts.merged(combined(experts, lambda tau: weights @ tau, weights))


def told(names: list[str], values: np.ndarray) -> dict[str, Any]:
    return {name: round(float(value), 6) for name, value in zip(names, values, strict=True)}
