from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from merging.context import ALONE, Context
from merging.experts import Experts
from merging.merged import Merged
from merging.methods.method import Method, call
from merging.methods.task_arithmetic import TaskArithmetic
from merging.ops import generator
from merging.options import Options, Within


@dataclass(frozen=True)
class Dare(Options):
    """DARE: drop random entries of each task vector, rescale the rest, then merge. Yu et al., 2024, arXiv 2311.03099.

    drop: 0 changes nothing, 0.9 keeps a tenth, each multiplied by 10. seed: of the masks, which do not depend on the
    order of tasks or parameters; tied weights share one. then: the method that merges what is left.
    """

    drop: Annotated[float, Within(0.0, 0.999)] = 0.5
    seed: int = 0
    then: Method = field(default_factory=TaskArithmetic)
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts, context: Context = ALONE) -> Merged:
        tied = experts.tied

        def drop(key: str, task: str, tau: Tensor) -> Tensor:
            rng = generator("dare", self.seed, tied.get(key, key), task)
            return tau * (torch.rand(tau.shape, generator=rng) >= self.drop) / (1 - self.drop)

        return call(self.then, experts.sparsified(drop), context)
