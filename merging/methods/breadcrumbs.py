from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from merging.experts import Experts
from merging.methods.method import InFront, Method
from merging.methods.task_arithmetic import TaskArithmetic
from merging.ops import by_magnitude
from merging.options import Fraction, Options, Share
from merging.sparsifiers import ByRow


@dataclass(frozen=True)
class Breadcrumbs(InFront, Options):
    """Model Breadcrumbs: drops the largest and the small entries of every row of a task vector, then merges.

    Davari and Belilovsky, 2024, arXiv 2312.06795. A row lies along the last axis; of its n entries int(n * outliers)
    largest go first, then all but the int(n * density) largest of the rest; a single number stays. density, outliers:
    0.15 and 0.006 are where the authors' search begins (boxes 0.05 to 0.2, 0.001 to 0.01), before Task Arithmetic at
    0.2 (ours is 0.3). then: the method that merges what is left. Of equal magnitudes the earlier counts as larger;
    the published order, which prunes after removing, is the only one here, and thresholds are not per tensor as in
    mergekit.
    """

    density: Fraction = 0.15
    outliers: Share = 0.006
    then: Method = field(default_factory=TaskArithmetic)
    needs: ClassVar[str] = "nothing"

    def sparsifier(self, experts: Experts) -> "Middle":
        return Middle(self.density, self.outliers)


@dataclass(frozen=True)
class Middle(ByRow):
    """Keeps of each row int(n * density) entries, the largest but for int(n * outliers) still larger ones."""

    density: float
    outliers: float

    def rows(self, key: str, task: str, first: int, tau: Tensor) -> Tensor:
        size = tau.shape[1]
        last = size - int(size * self.outliers)
        kept = by_magnitude(tau)[:, max(0, last - int(size * self.density)) : last]
        return torch.zeros_like(tau).scatter_(1, kept, tau.gather(1, kept))
