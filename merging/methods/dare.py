from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from merging.experts import Experts
from merging.methods.method import InFront, Method
from merging.methods.task_arithmetic import TaskArithmetic
from merging.ops import BLOCK, generator
from merging.options import Options, Within


@dataclass(frozen=True)
class Dare(InFront, Options):
    """DARE: drop random entries of each task vector, rescale the rest, then merge. Yu et al., 2024, arXiv 2311.03099.

    drop: 0 changes nothing, 0.9 keeps a tenth, each multiplied by 10. seed: of the masks, which do not depend on the
    order of tasks or parameters; tied weights share one. then: the method that merges what is left.
    """

    drop: Annotated[float, Within(0.0, 0.999)] = 0.5
    seed: int = 0
    then: Method = field(default_factory=TaskArithmetic)
    needs: ClassVar[str] = "nothing"
    streams: ClassVar[bool] = True

    def sparsifier(self, experts: Experts) -> "Drop":
        return Drop(self.drop, self.seed, experts.tied)


@dataclass(frozen=True)
class Drop:
    """Drops random entries of task vectors; what every block of a parameter loses is drawn from a generator of its own.

    tied: further names of parameters -> the first.
    """

    share: float
    seed: int
    tied: Mapping[str, str]

    def __call__(self, key: str, task: str, tau: Tensor) -> Tensor:
        flat = tau.reshape(-1).split(BLOCK)
        dropped = [self.along(key, task, index * BLOCK)(block) for index, block in enumerate(flat)]
        return torch.cat(dropped).view(tau.shape)

    def along(self, key: str, task: str, first: int) -> Callable[[Tensor], Tensor]:
        """For pieces of a flattened task vector from `first` on, in order."""
        block = (first // BLOCK,) if first else ()
        rng = generator("dare", self.seed, self.tied.get(key, key), task, *block)
        return lambda piece: piece * (torch.rand(piece.shape, generator=rng) >= self.share) / (1 - self.share)
