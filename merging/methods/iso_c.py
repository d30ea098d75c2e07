from dataclasses import dataclass
from typing import ClassVar

from merging.experts import Experts
from merging.merged import Merged
from merging.methods.iso_cts import IsoCts


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
        return IsoCts(common=1.0, scale=self.scale)(experts)
