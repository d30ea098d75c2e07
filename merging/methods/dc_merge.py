from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from merging.experts import Experts
from merging.merged import Merged
from merging.options import Count, Fraction, Options, Within


@dataclass(frozen=True)
class DcMerge(Options):
    """DC-Merge: leading singular triplets of every task, compared by sign in a basis that all of them share.

    Public code (Tobeginwith/DC-Merge). Every matrix keeps min(m, n) // T triplets per task; their directions, made
    orthogonal as in TSV-Merging, are the basis U, V. Of every core U^T tau_t V the `kept` share of largest entries
    stays; they are merged as in TIES (those of the elected sign, their mean), and only the blocks of each task's own
    directions are used. smoothing of the singular values, at the same sum: "none" (published for full fine-tuning),
    "average", all equal, or "linear", falling by at most `ratio` (published for LoRA, with rank=16). rank: triplets per
    task instead. What is not a matrix, or has fewer rows than tasks, is averaged. scale: searched in 0.1 to 3.
    """

    smoothing: Literal["none", "average", "linear"] = "none"
    ratio: Annotated[float, Within(1.0, 1e6)] = 5.0
    rank: Count | None = None
    kept: Fraction = 0.001
    scale: float = 1.0
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts) -> Merged:
        def merge(key: str, tau: Tensor) -> Tensor:
            side = min(tau.shape[1:]) if tau.ndim == 3 else 0
            rank = min(side // len(tau), self.rank or side)
            if rank == 0:
                return tau.mean(0)
            parts = experts.svd(tau, rank)
            u = experts.polar(torch.cat([part.u for part in parts], 1))
            vh = experts.polar(torch.cat([part.vh for part in parts], 0))
            cores = torch.stack([(u.T @ part.u * self.smoothed(part.s)) @ (part.vh @ vh.T) for part in parts])
            size = (rank * len(tau) if self.rank else side) ** 2  # of the authors' cores, some of whose slots are empty
            core = agreed(largest(cores, max(1, int(self.kept * size))))
            return u @ (core * torch.block_diag(*torch.ones(len(tau), rank, rank))) @ vh

        return experts.merged(experts.map(merge, heavy=True), self.scale)

    def smoothed(self, values: Tensor) -> Tensor:
        """Singular values [k], descending, with those above zero spread anew."""
        present = values[values > 0]
        if self.smoothing == "none" or not len(present):
            return values
        ratio = 1.0 if self.smoothing == "average" else min(self.ratio, float(present[0] / present[-1]))
        shares = torch.linspace(ratio, 1.0, len(present))
        return torch.cat([present.sum() * shares / shares.sum(), values[len(present) :]])


def largest(cores: Tensor, count: int) -> Tensor:
    """Cores [T, k, k] with all but the `count` largest magnitudes of each set to zero; equals at the threshold stay."""
    sizes = cores.abs().flatten(1)
    thresholds = sizes.topk(min(count, sizes.shape[1])).values[:, -1]
    return cores * (cores.abs() >= thresholds[:, None, None])


def agreed(cores: Tensor) -> Tensor:
    """Per entry of [T, k, k] the mean of those whose sign is that of the sum; zero where the sum is."""
    total = cores.sum(0)
    agreeing = (cores.sign() == total.sign()) & (total != 0)
    return (cores * agreeing).sum(0) / agreeing.sum(0).clamp_min(1)
