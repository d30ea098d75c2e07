from dataclasses import dataclass
from typing import ClassVar

from merging.entries import combined
from merging.experts import Experts
from merging.kinds import ByKind
from merging.merged import Merged


@dataclass(frozen=True)
class Average(ByKind, prefix="average: "):
    """Weight averaging: the mean of the experts. Wortsman et al., 2022, arXiv 2203.05482.

    kinds: what the mean change is multiplied by, by kind of parameter and depth, see ByKind; None is 1.
    """

    needs: ClassVar[str] = "nothing"
    additive: ClassVar[bool] = True
    streams: ClassVar[bool] = True

    def __call__(self, experts: Experts) -> Merged:
        return self.weighed(experts, combined(experts, lambda tau: tau.mean(0), 1 / len(experts.tasks)))
