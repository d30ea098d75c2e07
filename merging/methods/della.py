from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from merging.errors import UserError
from merging.experts import Experts, Sparsifier
from merging.methods.method import InFront, Method
from merging.methods.task_arithmetic import TaskArithmetic
from merging.ops import by_magnitude, generator
from merging.options import Fraction, Options, Within
from merging.sparsifiers import ByRow


@dataclass(frozen=True)
class Della(InFront, Options):
    """DELLA: DARE whose probability to keep an entry grows with its rank among the magnitudes of its row.

    Deep et al., 2024, arXiv 2406.11617. density: mean probability, 1 changes nothing. epsilon: it runs evenly from
    density - epsilon for the smallest entry of a row (along the last axis) to density + epsilon for the largest; 0 is
    DARE with drop = 1 - density, in other draws. rescale: kept entries are divided by their own "probability" (the
    authors', unbiased) or a whole parameter by one number that restores its L1 "norm" (mergekit, whose default epsilon
    is 0.15). seed: of the masks, as for DARE. then: the method that merges what is left; the paper's is TIES without a
    trim and with the mean. Variants by the rank in a layer or by raw magnitude are left out.
    """

    density: Fraction = 0.5
    epsilon: Annotated[float, Within(0.0, 0.5)] = 0.15
    rescale: Literal["probability", "norm"] = "probability"
    seed: int = 0
    then: Method = field(default_factory=TaskArithmetic)
    needs: ClassVar[str] = "nothing"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density < 1 and not self.epsilon < self.density < 1 - self.epsilon:
            raise UserError(
                f"della: epsilon={self.epsilon} around density={self.density} leaves what a probability may be. "
                f"Choose an epsilon below {min(self.density, 1 - self.density):g}."
            )

    def sparsifier(self, experts: Experts) -> Sparsifier:
        drop = DropByRank(self.density, self.epsilon, self.seed, experts.tied, self.rescale == "probability")
        return drop if self.rescale == "probability" else Restored(drop)


@dataclass(frozen=True)
class DropByRank(ByRow):
    """Drops random entries of every row, small ones more often. tied: further names of parameters -> the first."""

    density: float
    epsilon: float
    seed: int
    tied: Mapping[str, str]
    rescale: bool

    def rows(self, key: str, task: str, first: int, tau: Tensor) -> Tensor:
        if self.density == 1:
            return tau
        size = tau.shape[1]
        steps = torch.linspace(-self.epsilon, self.epsilon, size) if size > 1 else torch.zeros(1)
        share = torch.empty_like(tau).scatter_(1, by_magnitude(tau), (self.density + steps).expand_as(tau))
        rng = generator("della", self.seed, self.tied.get(key, key), task, first)
        kept = tau * (torch.rand(tau.shape, generator=rng) < share)
        return kept / share if self.rescale else kept


@dataclass(frozen=True)
class Restored:
    """A sparsifier whose results are scaled to the L1 norm that they had before; of zeros they stay zeros."""

    sparsifier: Sparsifier

    def __call__(self, key: str, task: str, tau: Tensor) -> Tensor:
        kept = self.sparsifier(key, task, tau)
        before, after = (float(changes.abs().sum(dtype=torch.float64)) for changes in (tau, kept))
        return kept * (before / after) if after > 0 else kept
