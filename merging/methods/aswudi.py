import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from merging.interference import Filtered

RANKS: Mapping[str, Callable[[Tensor], Tensor]] = {  # how many of the eigenvalues [n] stand out, a real number
    "sqrt_participation": lambda values: values.sqrt().sum().square() / values.sum(),
    "participation": lambda values: values.sum().square() / values.square().sum(),
    "entropy": lambda values: torch.special.entr(values / values.sum()).sum().exp(),
    "stable": lambda values: values.square().sum() / values.max().square(),
}


@dataclass(frozen=True)
class Aswudi(Filtered, prefix="aswudi: "):
    """ASWUDI: WUDI's exact minimum along as many eigenvectors of its Gram matrix as its spectrum holds; no coefficient.

    Public code of the authors of OptMerge (WalkerWorldPeace/MLLMerging). As SWUDI with f = 1 on the leading ceil(rank)
    eigenvectors of every matrix; beyond them the sum of the task vectors stays. rank, of eigenvalues lambda:
    "sqrt_participation" (the authors' default), (sum sqrt lambda)^2 / sum lambda; "participation", (sum lambda)^2 / sum
    lambda^2; "entropy", its exponential; "stable", sum lambda^2 / max lambda^2. matrices, rest, scale: as SWUDI's.
    Solved in fp64 (theirs in fp32). Left out: their rules by loss and by threshold.
    """

    rank: Literal["sqrt_participation", "participation", "entropy", "stable"] = "sqrt_participation"

    def weigh(self, values: Tensor) -> Tensor:
        count = math.ceil(float(RANKS[self.rank](values)) - 1e-9)  # a whole number stays what it is
        return (torch.arange(len(values), device=values.device) < count).to(values)
