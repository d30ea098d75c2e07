from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from merging.experts import Experts
from merging.merged import Merged


@dataclass(frozen=True)
class TsvM:
    """TSV-Merging: leading singular triplets of every task, made orthogonal to each other's.

    Gargiulo et al., 2025, arXiv 2412.00081. Each matrix keeps min(m, n) // T triplets per task; what is not a matrix,
    or has fewer rows than tasks, is averaged. scale: 0 is the base, 1 is the published data-free setting.
    """

    scale: float = 1.0
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts) -> Merged:
        def merge(key: str, tau: Tensor) -> Tensor:
            rank = min(tau.shape[1:]) // len(tau) if tau.ndim == 3 else 0
            if rank == 0:
                return tau.mean(0)
            parts = experts.svd(tau, rank)
            u = experts.polar(torch.cat([part.u for part in parts], 1))
            vh = experts.polar(torch.cat([part.vh for part in parts], 0))
            return (u * torch.cat([part.s for part in parts])) @ vh

        return experts.merged(experts.map(merge, heavy=True), self.scale)
