from dataclasses import dataclass
from typing import ClassVar

from merging.entries import combined
from merging.experts import Experts
from merging.kinds import ByKind
from merging.merged import Merged


@dataclass(frozen=True)
class TaskArithmetic(ByKind, prefix="task_arithmetic: "):
    """Task Arithmetic: the base plus a multiple of the summed task vectors. Ilharco et al., 2023, arXiv 2212.04089.

    scale: 0 is the base, 1/T is plain averaging, 1 adds every task vector in full; 0.3 is published for eight tasks.
    kinds: coefficients by kind of parameter and depth, see ByKind.
    """

    scale: float = 0.3
    needs: ClassVar[str] = "nothing"
    additive: ClassVar[bool] = True
    streams: ClassVar[bool] = True

    def __call__(self, experts: Experts) -> Merged:
        return self.weighed(experts, combined(experts, lambda tau: tau.sum(0), 1.0), self.scale)
