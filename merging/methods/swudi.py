from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from merging.interference import Filtered
from merging.options import Count, Fraction, Share, Within

Positive = Annotated[float, Within(0.0, 1e9, open_low=True)]


@dataclass(frozen=True)
class Swudi(Filtered, prefix="swudi: "):
    """SWUDI: WUDI's minimum in closed form, a filter on the eigenvalues of its Gram matrix in the place of early stops.

    Public code of the authors of OptMerge (WalkerWorldPeace/MLLMerging). tau = sum_t tau_t plus the way to the minimum,
    weighed by f along the eigenvectors of C = sum_t tau_t^T tau_t / |tau_t|^2. filter: "exponential", f = 1 -
    exp(-lambda time), time 1300 published for ViT-B/32, 1800 for ViT-B/16 and, with kept=1, 300; "tikhonov", f = lambda
    / (lambda + ridge); "landweber", f = 1 - (1 - rate lambda / lambda_max)^steps, 150 steps at 0.9; "none", f = 1.
    kept: share of the leading eigenvectors, f = 0 for the others. matrices: "all" (the authors', but for the output
    layer of language models) or "linear". rest: "mean" (theirs) or "base". scale: 1 for vision, 0.1 or 0.2 for language
    models. Solved in fp64 (theirs in fp32). Left out: their further options, all off by default.
    """

    filter: Literal["exponential", "tikhonov", "landweber", "none"] = "exponential"
    time: Positive = 1300.0
    ridge: Positive = 0.01
    rate: Share = 0.9
    steps: Count = 150
    kept: Fraction = 0.65

    def weigh(self, values: Tensor) -> Tensor:
        count = int(len(values) * self.kept + 0.999)  # the authors' way to round up
        return self._smooth(values) * (torch.arange(len(values), device=values.device) < max(count, 1))

    def _smooth(self, values: Tensor) -> Tensor:
        if self.filter == "exponential":
            return 1 - torch.exp(-values * self.time)
        if self.filter == "tikhonov":
            return values / (values + self.ridge)
        if self.filter == "landweber":
            return 1 - (1 - self.rate * values / values[0]).pow(self.steps)
        return torch.ones_like(values)
