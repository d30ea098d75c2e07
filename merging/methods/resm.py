from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from merging.experts import Experts
from merging.merged import Merged
from merging.methods.tsv_m import orthogonal_sum
from merging.options import Options, Within


@dataclass(frozen=True)
class Resm(Options):
    """TSV-Merging with weights by outliers and ranks by density: what the abstract of RESM (R-TSVM) names. A guess.

    After Yang et al., 2025, arXiv 2502.06876, whose formulas are not public: both rules here are ours, no published
    number says anything about them. Per matrix: weights: "outliers", singular values of task t times T e_t / sum_s e_s,
    e_t the norm of those entries of its task vector that lie more than `sigmas` deviations from its mean; 1 for all
    where there are none, or "equal". ranks: "density", the min(m, n) triplets are shared out by how many entries are
    above the mean absolute entry of all task vectors, or "equal". Equal both it is TSV-Merging to the last bit. On
    mini8's validation data the weights cost five points and the ranks gain half a point. What is not a matrix, or has
    fewer rows than tasks, is averaged.
    """

    weights: Literal["outliers", "equal"] = "outliers"
    ranks: Literal["density", "equal"] = "density"
    sigmas: Annotated[float, Within(0.0, 100.0)] = 3.0
    scale: float = 1.0
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts) -> Merged:
        def merge(key: str, tau: Tensor) -> Tensor:
            rank = min(tau.shape[1:]) if tau.ndim == 3 else 0
            if rank < len(tau):
                return tau.mean(0)
            ranks = shared_out(tau, rank) if self.ranks == "density" else [rank // len(tau)] * len(tau)
            weights = outlier_weights(tau, self.sigmas) if self.weights == "outliers" else None
            return orthogonal_sum(experts, tau, ranks, weights)

        return experts.merged(experts.map(merge, heavy=True), self.scale)


def shared_out(tau: Tensor, rank: int) -> list[int]:
    """Ranks of matrices [T, m, n], together at most `rank`, as many entries of each are above the mean of all."""
    sizes = tau.abs()
    counts = (sizes > sizes.double().mean()).flatten(1).sum(1).tolist()
    return [rank * count // sum(counts) if sum(counts) else rank // len(tau) for count in counts]


def outlier_weights(tau: Tensor, sigmas: float) -> list[float]:
    """Weights of mean 1, as the norms of the outliers of matrices [T, m, n]."""
    flat = tau.flatten(1).double()
    far = (flat - flat.mean(1, keepdim=True)).abs() > sigmas * flat.std(1, correction=0, keepdim=True)
    norms = (flat * far).norm(dim=1)
    total = float(norms.sum())
    return [len(tau) * norm / total if total else 1.0 for norm in norms.tolist()]
