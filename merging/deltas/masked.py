"""One vector, masked and scaled for each task; boolean masks as bits."""

import torch
from torch import Tensor
from torch.nn import functional

from merging.deltas.base import Whole


class Masked(Whole):
    """delta_g = scale_g (mask_g * vector): `vector` has the parameter's shape, `bits` [G, ceil(size / 8)] packed."""

    def __init__(self, vector: Tensor, bits: Tensor, scales: Tensor, shape: torch.Size | None = None):
        super().__init__()
        for name, tensor in (("vector", vector), ("bits", bits), ("scales", scales)):
            self.register_buffer(name, tensor)
        self.vector: Tensor
        self.bits: Tensor
        self.scales: Tensor
        self.parts, self.shape = len(bits), torch.Size(vector.shape if shape is None else shape)

    @classmethod
    def of(cls, vector: Tensor, masks: Tensor, scales: Tensor) -> "Masked":
        """From boolean masks [G, *shape] and scales [G]."""
        return cls(vector, packed(masks.reshape(len(masks), vector.numel())), scales)

    def mask(self, part: int) -> Tensor:
        """Boolean [*shape]."""
        return unpacked(self.bits[part], self.shape.numel()).view(self.shape)

    def part(self, index: int) -> Tensor:
        return self.scales[index] * self.vector.view(self.shape) * self.mask(index)

    def rows(self, index: int, ids: Tensor) -> Tensor:
        width = self.shape[1]
        entries = ids[..., None] * width + torch.arange(width, device=ids.device)
        kept = (self.bits[index][entries // 8] >> (entries % 8).to(torch.uint8)) & 1
        return self.scales[index] * self.vector.view(self.shape)[ids] * kept

    def transposed(self) -> "Masked":
        masks = torch.stack([self.mask(index).T for index in range(self.parts)])
        return Masked.of(self.vector.view(self.shape).T.contiguous(), masks, self.scales)

    @property
    def params(self) -> int:
        """Stored numbers, 32 bits counted as one."""
        return self.vector.numel() + self.scales.numel() + -(-self.bits.numel() // 4)


def packed(flags: Tensor) -> Tensor:
    """Booleans [G, n] as bits, uint8 [G, ceil(n / 8)], the first in the lowest one."""
    padded = functional.pad(flags, (0, -flags.shape[1] % 8)).unflatten(1, (-1, 8))
    return (padded * _powers(flags.device)).sum(-1, dtype=torch.uint8)


def unpacked(bits: Tensor, count: int) -> Tensor:
    """The first `count` booleans of one row of bits."""
    return (bits[:, None] & _powers(bits.device)).bool().flatten()[:count]


def _powers(device: torch.device) -> Tensor:
    return 2 ** torch.arange(8, dtype=torch.uint8, device=device)
