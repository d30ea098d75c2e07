"""Changes made of boolean masks, which are stored as bits."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from merging.deltas.base import Whole


class Bitwise(Whole):
    """Changes of `bits` [K, ceil(size / 8)], masks of the parameter's shape, each change times one of `scales` [G]."""

    def __init__(self, bits: Tensor, scales: Tensor, shape: torch.Size):
        super().__init__()
        self.register_buffer("bits", bits)
        self.register_buffer("scales", scales)
        self.bits: Tensor
        self.scales: Tensor
        self.parts, self.shape = len(scales), torch.Size(shape)

    def mask(self, index: int) -> Tensor:
        """Boolean [*shape]."""
        return unpacked(self.bits[index], self.shape.numel()).view(self.shape)

    def mask_rows(self, index: int, ids: Tensor) -> Tensor:
        """Rows `ids` of a mask of shape [V, d], 0 or 1, uint8 [*ids.shape, d]."""
        width = self.shape[1]
        entries = ids[..., None] * width + torch.arange(width, device=ids.device)
        return (self.bits[index][entries // 8] >> (entries % 8).to(torch.uint8)) & 1

    def turned(self) -> Tensor:
        """The masks of a matrix transposed, boolean [K, n, m]."""
        return torch.stack([self.mask(index).T for index in range(len(self.bits))])

    @property
    def params(self) -> int:
        """Stored numbers, 32 bits counted as one."""
        return super().params - self.bits.numel() + -(-self.bits.numel() // 4)


class Masked(Bitwise):
    """delta_g = scale_g (mask_g * vector): one `vector` of the parameter's shape, masked for each task."""

    def __init__(self, vector: Tensor, bits: Tensor, scales: Tensor, shape: torch.Size | None = None):
        super().__init__(bits, scales, vector.shape if shape is None else shape)
        self.register_buffer("vector", vector)
        self.vector: Tensor

    @classmethod
    def of(cls, vector: Tensor, masks: Tensor, scales: Tensor) -> "Masked":
        """From boolean masks [G, *shape] and scales [G]."""
        return cls(vector, packed(masks.reshape(len(masks), vector.numel())), scales)

    def part(self, index: int) -> Tensor:
        return self.scales[index] * self.vector.view(self.shape) * self.mask(index)

    def rows(self, index: int, ids: Tensor) -> Tensor:
        return self.scales[index] * self.vector.view(self.shape)[ids] * self.mask_rows(index, ids)

    def transposed(self) -> "Masked":
        return Masked.of(self.vector.view(self.shape).T.contiguous(), self.turned(), self.scales)


class Ternary(Bitwise):
    """delta_g = scale_g (mask_2g - mask_(2g+1)): entries of 1, -1 and 0 for each task, in two bits."""

    @classmethod
    def of(cls, masks: Tensor, scales: Tensor) -> "Ternary":
        """From boolean masks [2 G, *shape], where an entry is 1 and where it is -1 in turn, and scales [G]."""
        return cls(packed(masks.reshape(len(masks), masks.shape[1:].numel())), scales, masks.shape[1:])

    def part(self, index: int) -> Tensor:
        return self.scales[index] * (self.mask(2 * index).char() - self.mask(2 * index + 1).char())

    def rows(self, index: int, ids: Tensor) -> Tensor:
        up, down = (self.mask_rows(2 * index + half, ids).char() for half in (0, 1))
        return self.scales[index] * (up - down)

    def transposed(self) -> "Ternary":
        return Ternary.of(self.turned(), self.scales)


def packed(flags: Tensor) -> Tensor:
    """Booleans [G, n] as bits, uint8 [G, ceil(n / 8)], the first in the lowest one."""
    if flags.device.type == "cpu":
        return torch.from_numpy(np.packbits(flags.numpy(), 1, "little"))
    padded = functional.pad(flags, (0, -flags.shape[1] % 8)).unflatten(1, (-1, 8))
    return (padded * _powers(flags.device)).sum(-1, dtype=torch.uint8)


def unpacked(bits: Tensor, count: int) -> Tensor:
    """The first `count` booleans of one row of bits."""
    if bits.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bits.numpy(), count=count, bitorder="little").view(np.bool_))
    return (bits[:, None] & _powers(bits.device)).bool().flatten()[:count]


def _powers(device: torch.device) -> Tensor:
    return 2 ** torch.arange(8, dtype=torch.uint8, device=device)
