from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from merging.combined import Combined, Mix, terms
from merging.deltas import LowRank
from merging.entries import by_factors, entrywise
from merging.errors import UserError
from merging.experts import Experts
from merging.merged import Merged
from merging.options import Options


@dataclass(frozen=True)
class Cat(Options):
    """LoRA Soups with fixed weights: LoRA experts side by side (CAT), or their factors summed one by one ("linear").

    Prabhakar et al., 2024, arXiv 2410.13025. mode: "cat", sum_t w_t s_t B_t A_t, of rank sum_t r_t; "linear", (sum_t
    w_t s_t B_t) (sum_t A_t), of rank r with all cross terms, as in the authors' code, where weights multiply one factor
    alone (of matrices stored [in, out], A). s_t is alpha / r, or that of rsLoRA. weights: one per task, in their order;
    null is 1 / T each, where the authors' softmax of learned weights starts on average; learned_cat learns them.
    Whole experts have no factors: "cat" is their weighted sum, "linear" is refused. scale multiplies all of it.
    """

    mode: Literal["cat", "linear"] = "cat"
    weights: Sequence[float] | None = None
    scale: float = 1.0
    needs: ClassVar[str] = "nothing"
    additive: ClassVar[bool] = True  # factors in, factors out

    def __call__(self, experts: Experts) -> Merged:
        """Raises UserError for another number of weights than tasks, and for factors that cannot be summed."""
        tasks = len(experts.tasks)
        if self.weights is not None and len(self.weights) != tasks:
            raise UserError(f"cat: there are {len(self.weights)} weights for {tasks} tasks. Give one per task.")
        weights = torch.full((tasks,), 1 / tasks) if self.weights is None else torch.tensor([*self.weights]).float()
        if self.mode == "cat":
            return experts.merged(side_by_side(experts, lambda _: weights), self.scale)
        factors, rest = by_factors(experts)
        if rest:
            raise UserError(
                f"cat: mode=linear sums factors, and {rest[0]} of these experts has none: they are no adapters, or "
                f"were sparsified. Take mode=cat."
            )
        summed = {key: self._summed(key, low_rank, weights) for key, low_rank in factors.items() if low_rank.rank}
        return experts.merged(Combined(summed), self.scale)

    def _summed(self, key: str, low_rank: LowRank, weights: Tensor) -> Mix:
        if len(ranks := {rank for rank in low_rank.ranks if rank}) > 1:
            raise UserError(f"cat: mode=linear needs equal ranks, and {key} has {sorted(ranks)}. Take mode=cat.")
        pairs = [(task, *low_rank.factors(task)) for task in range(low_rank.parts) if low_rank.ranks[task]]
        up = torch.stack([weights[task] * up for task, up, _ in pairs]).sum(0)
        down = torch.stack([down for *_, down in pairs]).sum(0)
        return Mix(LowRank.of([up], [down], low_rank.shape), torch.ones(1))


def side_by_side(experts: Experts, weights: Callable[[str], Tensor]) -> Combined:
    """sum_t weights(key)_t tau_t of every parameter, of adapters as factors of rank sum_t r_t."""
    factors, rest = by_factors(experts)
    mixes = {key: Mix(low_rank, weights(key)) for key, low_rank in factors.items() if low_rank.rank}
    return Combined({**mixes, **terms(entrywise(experts, lambda entry, tau: weights(entry.key) @ tau, rest))})
