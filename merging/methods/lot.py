from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from merging.applied import as_stored
from merging.context import Context
from merging.experts import Experts
from merging.merged import Merged
from merging.methods.reg_mean import averaged
from merging.options import Count, Options, Share
from merging.regression import Equations, equations, matrices, of_experts


@dataclass(frozen=True)
class Lot(Options):
    """LOT Merging: the layers whose outputs are nearest to those of all experts on their own inputs, in closed form.

    Sun et al., 2025, arXiv 2505.23859. Of matrices and convolutions of patches tau = (sum_t tau_t X_t^T X_t) (sum_t
    X_t^T X_t)^+, which leaves the base as it is along directions in which no input lies; of the gains of norms, feature
    by feature, sum_t x_t^2 tau_t / sum_t x_t^2 with x_t what is normalised; the mean for all else, projections too.
    samples: per task, 16 to 64 published. cutoff: eigenvalues below this share of the largest count as zero; that of
    the paper is not known. scale: of the whole change, published as 1.2 for ViT-B/32 and 1.5 for ViT-L/14, found on
    validation; ours is 1. The authors' code could not be read: written from the paper.
    """

    samples: Count = 64
    cutoff: Share = 1e-5
    scale: float = 1.0
    needs: ClassVar[str] = "inputs"

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without inputs, and for names that no table has."""
        experts = replace(experts, separate_qkv=False)  # rows are solved one by one: it makes no difference
        keys = [*matrices(experts, ("ffn", "attention")), *convolutions(experts), *gains(experts)]
        measure = of_experts(experts, context.unlabelled(), self.samples)
        total = equations(experts, keys, measure, lambda gram, rows: gram)
        solutions = {key: as_stored(experts, key, solved(total.pop(key), self.cutoff)) for key in keys}
        return experts.merged(averaged(experts, keys) | solutions, self.scale)


def convolutions(experts: Experts) -> list[str]:
    """Those that make tokens of patches."""
    return [
        key for key, spec in experts.specs().items() if len(spec.shape) == 4 and experts.param(key).is_a("embedding")
    ]


def gains(experts: Experts) -> list[str]:
    """What norms multiply by."""
    return [key for key in experts.keys("norm") if key.endswith("weight")]


def solved(total: Equations, cutoff: float) -> Tensor:
    """x nearest to zero that solves them: of a matrix, or feature by feature."""
    if total.gram.ndim == 2:
        return total.around(torch.zeros_like(total.moved)).nearest(cutoff)
    return torch.where(total.gram > 0, total.moved / total.gram, 0.0)
