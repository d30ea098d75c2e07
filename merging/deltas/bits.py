"""Boolean masks as bits."""

import torch
from torch import Tensor
from torch.nn import functional


def packed(flags: Tensor) -> Tensor:
    """Booleans [G, n] as bits, uint8 [G, ceil(n / 8)], the first in the lowest one."""
    padded = functional.pad(flags, (0, -flags.shape[1] % 8)).unflatten(1, (-1, 8))
    return (padded * _powers(flags.device)).sum(-1, dtype=torch.uint8)


def unpacked(bits: Tensor, count: int) -> Tensor:
    """The first `count` booleans of one row of bits."""
    return (bits[:, None] & _powers(bits.device)).bool().flatten()[:count]


def _powers(device: torch.device) -> Tensor:
    return 2 ** torch.arange(8, dtype=torch.uint8, device=device)
