"""How the task-specific part of a merge is stored: T changes of one weight, mixed by the weights of a gate."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Bank(Protocol):
    """own_t of W(x) = W_0 + shared + sum_t w_t(x) own_t for one parameter."""

    @property
    def bytes(self) -> int: ...

    def mix(self, weights: Tensor) -> Tensor:
        """sum_t weights[t] own_t as a dense fp32 tensor; weights [T] are any reals."""
        ...


@dataclass(frozen=True)
class OnDemand:
    """Dense parts that stay in their files: only those with a non-zero weight are read."""

    part: Callable[[int], Tensor]  # task index -> fp32 change
    shape: torch.Size
    tasks: int

    @property
    def bytes(self) -> int:
        return 4 * self.tasks * self.shape.numel()

    def mix(self, weights: Tensor) -> Tensor:
        total = torch.zeros(self.shape)
        for task in weights.nonzero().flatten().tolist():
            total.add_(self.part(task), alpha=float(weights[task]))
        return total
