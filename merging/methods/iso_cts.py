from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from merging.applied import turned
from merging.decompose.svd import SVD
from merging.experts import Experts
from merging.merged import Merged
from merging.options import Options, Share


@dataclass(frozen=True)
class IsoCts(Options):
    """Iso-CTS: Iso-C whose weakest common directions give way to task-specific ones.

    Marczak et al., 2025, arXiv 2502.04959.
    common: share of the directions taken from the summed task matrix, 1 is Iso-C, 0 is made of task
    directions alone. What is not a matrix is averaged. scale: 0 is the base; 1.5 to 1.9 is usual for eight tasks.
    """

    common: Share = 0.8
    scale: float = 1.0
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts) -> Merged:
        def merge(key: str, tau: Tensor) -> Tensor:
            if tau.ndim != 3:
                return tau.mean(0)
            return turned(experts, key, isotropic(turned(experts, key, tau)))

        def isotropic(tau: Tensor) -> Tensor:
            tasks, full = len(tau), min(tau.shape[1:])
            specific = min(round((full - int(full * self.common)) / tasks), full // tasks)  # directions per task
            ((u, s, vh),) = experts.svd(tau.sum(0, keepdim=True))
            if not specific:
                return (u * s.mean()) @ vh
            kept = full - specific * tasks
            common = SVD(u[:, :kept], s[:kept], vh[:kept])
            parts = [*experts.svd(tau - common.u @ (common.u.T @ tau), specific, kept=False), common]
            u = experts.polar(torch.cat([part.u for part in parts], 1))
            vh = experts.polar(torch.cat([part.vh for part in parts], 0))
            return u @ vh * torch.cat([part.s for part in parts]).mean()

        return experts.merged(experts.map(merge, heavy=True), self.scale)
