"""Changes of low rank, each with factors of its own."""

import torch
from torch import Tensor
from torch.nn import functional

from merging.deltas.base import Delta
from merging.deltas.products import add_product, alike, in_use, over_tokens, scaled


class LowRank(Delta):
    """delta_g = up_g down_g of rank r: `up` [m, G r] and `down` [G r, n] hold the factors side by side."""

    factored = True

    def __init__(self, up: Tensor, down: Tensor, parts: int, shape: torch.Size | None = None):
        super().__init__()
        self.register_buffer("up", up)
        self.register_buffer("down", down)
        self.up: Tensor
        self.down: Tensor
        self.parts, self.shape = parts, torch.Size((len(up), down.shape[1]) if shape is None else shape)

    @classmethod
    def of(cls, u: Tensor, vh: Tensor, shape: torch.Size | None = None) -> "LowRank":
        """From factors u [G, m, r] and vh [G, r, n]."""
        return cls(u.permute(1, 0, 2).flatten(1).contiguous(), vh.flatten(0, 1).contiguous(), len(u), shape)

    @property
    def rank(self) -> int:
        return self.up.shape[1] // self.parts

    def mix(self, weights: Tensor) -> Tensor:
        weights, up, down = alike(weights, self.up, self.down)
        scale = weights.repeat_interleave(self.rank, -1)
        return ((up * scale[..., None, :]) @ down).view((*weights.shape[:-1], *self.shape))

    def add_(self, x: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
        up, down, used = self.up, self.down, in_use(weights)
        if not used:
            return onto
        if len(used) < self.parts:  # run only those in use: of the samples of one expert, one
            rows = torch.arange(len(down), device=down.device).view(self.parts, -1)[used].flatten()
            up, down, weights = up[:, rows], down[rows], weights[..., used]
        inner = functional.linear(x, down)
        return add_product(onto, scaled(inner, over_tokens(weights.repeat_interleave(self.rank, -1))), up)

    def transposed(self) -> "LowRank":
        return LowRank(self.down.T.contiguous(), self.up.T.contiguous(), self.parts)

    def macs(self, tokens: int, per_token: bool = False, used: int | None = None) -> int:
        return tokens * (used or self.parts) * self.rank * sum(self.sides())

    def mix_macs(self) -> int:
        return self.up.shape[1] * self.shape.numel()
