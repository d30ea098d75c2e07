from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from merging.applied import as_stored
from merging.context import Context
from merging.entries import entrywise
from merging.experts import Experts
from merging.merged import Merged
from merging.options import Count, Options, Share
from merging.regression import Equations, Measure, by_block, equations, matrices, mean, of_experts

RIDGE = 1e-7  # of the mean diagonal: where hardly any input lies the mean stays, instead of a number without bound
KINDS = ("ffn", "attention", "projection")


@dataclass(frozen=True)
class RegMean(Options):
    """Regression mean: the matrices whose outputs are nearest to those of all experts on their own inputs.

    Jin et al., 2023, arXiv 2212.09849. W = sum_t W_t G_t (sum_t G_t)^-1 with G_t = X_t^T X_t / rows over all tokens
    that go into the matrix in expert t; vectors, embeddings and patches are averaged. rho: scale of the off-diagonal
    entries of G_t, against a singular sum; 0 weighs inputs one by one. samples: per task. by_block: measure one
    block's matrices at a time, which takes a forward pass for every block and the memory of one.
    """

    rho: Share = 0.95
    samples: Count = 256
    by_block: bool = False
    needs: ClassVar[str] = "inputs"

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without inputs, and for names that no table has."""
        experts = replace(experts, separate_qkv=False)  # rows are solved one by one: it makes no difference
        keys, measure = matrices(experts, KINDS), of_experts(experts, context.unlabelled(), self.samples)
        changes = averaged(experts, keys)
        for group in by_block(experts, keys) if self.by_block else [keys]:
            changes |= regression_means(experts, group, measure, self.rho)
        return experts.merged(changes)


def averaged(experts: Experts, others: Sequence[str]) -> dict[str, Tensor]:
    """The mean task vectors of all parameters but `others`."""
    rest = [key for key in experts.specs() if key not in set(others)]
    return {**entrywise(experts, lambda _, tau: tau.mean(0), rest)}


def regression_means(experts: Experts, keys: Sequence[str], measure: Measure, rho: float) -> dict[str, Tensor]:
    """The change of every matrix, tau = (sum_t tau_t G_t) (sum_t G_t)^-1, as stored."""
    total = equations(experts, keys, measure, lambda gram, rows: shrunk(gram / rows, rho))
    return {key: as_stored(experts, key, solved(total.pop(key), mean(experts, key))) for key in keys}


def shrunk(gram: Tensor, rho: float) -> Tensor:
    """[n, n] with its off-diagonal entries times rho."""
    return rho * gram + (1 - rho) * gram.diagonal().diag()


def solved(total: Equations, anchor: Tensor) -> Tensor:
    """x [m, n] that solves them, and `anchor` along directions in which hardly any input lies."""
    diagonal = total.gram.diagonal().mean().clamp_min(torch.finfo(total.gram.dtype).tiny)
    return total.around(anchor).regularised(RIDGE * diagonal)
