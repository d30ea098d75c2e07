"""Whole changes that stay in their files."""

from collections.abc import Callable

import torch
from torch import Tensor

from merging.deltas.base import Whole
from merging.deltas.dense import Dense


class OnDemand(Whole):
    """Dense changes that stay in their files: only those with a non-zero weight are read. For the oracle router."""

    def __init__(self, part: Callable[[int], Tensor], shape: torch.Size, parts: int):
        super().__init__()
        self._part, self.shape, self.parts = part, shape, parts

    def part(self, index: int) -> Tensor:
        return self._part(index)

    def transposed(self) -> "OnDemand":
        return OnDemand(lambda index: self.part(index).T.contiguous(), self.shape[::-1], self.parts)

    def stored(self) -> Dense:
        return Dense(torch.stack([self.part(index) for index in range(self.parts)]))

    @property
    def params(self) -> int:
        return self.parts * self.shape.numel()

    @property
    def bytes(self) -> int:
        return 4 * self.params
