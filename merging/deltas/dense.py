"""Whole changes in memory or in their files, and how a file holds them where most of their numbers are zero."""

from collections.abc import Callable

import torch
from torch import Tensor

from merging.deltas.base import Delta, Whole
from merging.deltas.masked import packed, unpacked
from merging.deltas.products import alike


class Dense(Whole):
    """Full changes [G, *shape], of matrices (a layer then builds one private matrix per sample) and of vectors."""

    def __init__(self, changes: Tensor, shape: torch.Size | None = None):
        super().__init__()
        self.register_buffer("changes", changes)
        self.changes: Tensor
        self.parts, self.shape = len(changes), torch.Size(changes.shape[1:] if shape is None else shape)

    def part(self, index: int) -> Tensor:
        return self.changes[index].view(self.shape)

    def mix(self, weights: Tensor) -> Tensor:
        weights, flat = alike(weights, self.changes.reshape(self.parts, self.shape.numel()))
        return (weights @ flat).view((*weights.shape[:-1], *self.shape))

    mixes = Delta.mixes  # there is nothing to unpack

    def transposed(self) -> "Dense":
        return Dense(self.changes.view(self.parts, *self.shape).mT.contiguous())

    def stored(self) -> "Delta":
        """As it is, or compressed where most numbers are zero."""
        return Sparse.of(self.changes, self.shape) if self.bytes < self.changes.nbytes else self

    @property
    def params(self) -> int:
        """Numbers, or where most are zero the others, and 32 bits of the mask counted as one."""
        whole, kept = self.changes.numel(), int(self.changes.count_nonzero())
        return min(whole, kept + -(-whole // 32))

    @property
    def bytes(self) -> int:
        """Values, or where most are zero the other values and one bit for each."""
        whole, kept = self.changes.nbytes, int(self.changes.count_nonzero())
        return min(whole, kept * self.changes.element_size() + -(-self.changes.numel() // 8))


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


class Sparse(Delta):
    """Dense changes where most are zero, for a file alone: the other `values` [K], one after the other, and `bits`."""

    def __init__(self, values: Tensor, bits: Tensor, parts: int, shape: torch.Size):
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("bits", bits)
        self.values: Tensor
        self.bits: Tensor
        self.parts, self.shape = parts, shape

    @classmethod
    def of(cls, changes: Tensor, shape: torch.Size) -> "Sparse":
        """From changes [G, *shape]."""
        flat = changes.reshape(-1)
        kept = flat != 0
        return cls(flat[kept], packed(kept[None])[0], len(changes), shape)

    def opened(self) -> Dense:
        """Equal in every number (a zero that was negative is positive)."""
        size = self.parts * self.shape.numel()
        changes = self.values.new_zeros(size).masked_scatter_(unpacked(self.bits, size), self.values)
        return Dense(changes.view(self.parts, *self.shape))
