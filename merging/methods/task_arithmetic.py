from dataclasses import dataclass
from typing import ClassVar

from merging.experts import Experts
from merging.merged import Merged


@dataclass(frozen=True)
class TaskArithmetic:
    """Task Arithmetic: the base plus a multiple of the summed task vectors. Ilharco et al., 2023, arXiv 2212.04089.

    scale: 0 is the base, 1/T is plain averaging, 1 adds every task vector in full; 0.3 is published for eight tasks.
    """

    scale: float = 0.3
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts) -> Merged:
        return experts.merged(experts.map(lambda key, tau: tau.sum(0)), self.scale)
