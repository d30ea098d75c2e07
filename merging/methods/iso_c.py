from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from merging.experts import Experts
from merging.merged import Merged


@dataclass(frozen=True)
class IsoC:
    """Iso-C: the summed task matrix with all its singular values set to their mean.

    Marczak et al., 2025, arXiv 2502.04959. What is not a matrix is averaged. Directions below the numerical rank stay
    out: with low-rank task matrices the published code fills them with arbitrary vectors.
    scale: 0 is the base; 1.3 to 1.5 is usual for eight tasks.
    """

    scale: float = 1.0
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts) -> Merged:
        def merge(key: str, tau: Tensor) -> Tensor:
            if tau.ndim != 3:
                return tau.mean(0)
            ((u, s, vh),) = experts.svd(tau.sum(0, keepdim=True))
            return (u * s.mean()) @ vh

        return experts.merged(experts.map(merge, heavy=True), self.scale)
