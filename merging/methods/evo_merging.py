from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from merging.combined import Combined, Mix, Term, terms
from merging.context import Context
from merging.deltas import LowRank
from merging.entries import by_factors, entrywise
from merging.errors import UserError
from merging.experts import Experts
from merging.fit.black_box import Axis, Best, BlackBox, Point, Validation, mean
from merging.merged import Merged
from merging.options import Options, Within


@dataclass(frozen=True)
class EvoMerging(Options):
    """Evo-Merging: how sparse each expert is made, then what it weighs, negative too, by CMA-ES on validation scores.

    arXiv 2509.12951 and its public code, for LoRA experts of one rank. Of every factor A_t the share keep_t of largest
    magnitudes stays; A = sum_t w_t A_t, B = sum_t w_t B_t: one adapter of that rank, with all cross terms. Whole
    experts have no factors: the sum of w_t tau_t, task vectors made sparse tensor by tensor, is ours. keeping: the
    search for keep_t in [0, 1], from 1, with w_t = 1 / T; weighing: that for w_t in [-bound, bound]. Published are 400
    and 800 trials at deviations of 0.05; here 60 and 120, in generations as large as Optuna makes them (theirs 20).
    penalty: times the mean magnitude of what is searched for. Ours: the mean validation score is the value, theirs is
    a cross-entropy; and the second search is judged by its own penalty from its start on.
    """

    keeping: BlackBox = field(default_factory=partial(BlackBox, 60, "cma_es", 0.05))
    weighing: BlackBox = field(default_factory=partial(BlackBox, 120, "cma_es", 0.017))  # 0.05 of 3
    bound: Annotated[float, Within(1.0, 100.0)] = 1.5
    penalty: Annotated[float, Within(0.0, 10.0)] = 0.05
    needs: ClassVar[str] = "labels"
    splits: ClassVar[tuple[str, ...]] = ("val",)
    additive: ClassVar[bool] = True  # factors in, factors out

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without validation scores or Optuna, and for adapters of unequal ranks."""
        tasks = experts.tasks
        scores = Validation(partial(self.made, experts), self, context)
        equal = {f"weight.{task}": 1 / len(tasks) for task in tasks}
        ends = {f"keep.{task}": Axis(0.0, 1.0, 1.0) for task in tasks}
        kept = self._found(self.keeping, scores, equal, ends, "keeping")
        axes = {name: Axis(-self.bound, self.bound, start) for name, start in equal.items()}
        weighed = self._found(self.weighing, scores, kept.point, axes, "weighing")
        point = {**kept.point, **weighed.point}
        found = ", ".join(f"{task} {point[f'keep.{task}']:.2f} * {point[f'weight.{task}']:.3f}" for task in tasks)
        values = [mean(scores({**equal, **{name: 1.0 for name in kept.point}})), mean(scores(point))]
        remark = f"mean validation score {values[0]:.4f} of equal weights, {values[1]:.4f} of those found: {found}"
        return replace(self.made(experts, point), remarks=(remark,))

    def _found(self, search: BlackBox, scores: Validation, fixed: Point, axes: dict[str, Axis], name: str) -> Best:
        def value(point: Point) -> float:
            return mean(scores({**fixed, **point})) - self.penalty * mean({name: abs(at) for name, at in point.items()})

        return search.best(value, axes, scores.context, name)

    def made(self, experts: Experts, point: Point) -> Merged:
        """The merge at shares and weights, keep.<task> and weight.<task>."""
        keep, weights = ([point[f"{name}.{task}"] for task in experts.tasks] for name in ("keep", "weight"))
        factors, rest = by_factors(experts)
        changes: dict[str, Term] = {key: _adapter(experts, key, low_rank, keep, weights)
                                    for key, low_rank in factors.items() if low_rank.rank}  # fmt: skip
        shares = dict(zip(experts.tasks, keep, strict=True))
        sparse = experts.sparsified(lambda key, task, tau: _largest(tau, shares[task]))
        mixed = torch.tensor(weights)
        changes |= terms(entrywise(sparse, lambda _, tau: mixed @ tau, rest))
        return experts.merged(Combined(changes))


def _adapter(experts: Experts, key: str, low_rank: LowRank, keep: list[float], weights: list[float]) -> Mix:
    """Both factors summed one by one; A is the one on the side of the input."""
    if len({rank for rank in low_rank.ranks if rank}) > 1:
        ranks = sorted(set(low_rank.ranks))
        raise UserError(f"evo_merging sums factors, and those of {key} have ranks {ranks}. Take experts of one rank.")
    left, ups, downs = experts.param(key).transposed, [], []  # stored [in, out] the left factor is A
    for task in (task for task, rank in enumerate(low_rank.ranks) if rank):
        up, down = low_rank.factors(task)
        sparse = _largest(up if left else down, keep[task])
        ups.append(weights[task] * (sparse if left else up))
        downs.append(weights[task] * (down if left else sparse))
    return Mix(LowRank.of([torch.stack(ups).sum(0)], [torch.stack(downs).sum(0)], low_rank.shape), torch.ones(1))


def _largest(tensor: Tensor, share: float) -> Tensor:
    """The tensor with that share of its largest magnitudes, at least one entry and all that equal the last; else 0."""
    if share >= 1 or not tensor.numel():
        return tensor
    if share <= 0:
        return torch.zeros_like(tensor)
    count = max(1, round(tensor.numel() * share))
    least = tensor.abs().flatten().topk(count).values[-1]
    return torch.where(tensor.abs() < least, 0.0, tensor)
