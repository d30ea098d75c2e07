"""Changes of low rank, each with factors of its own."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from merging.deltas.base import Delta
from merging.deltas.products import add_product, alike, in_use, over_tokens, scaled


class LowRank(Delta):
    """delta_g = up_g down_g: `up` [m, R] and `down` [R, n] hold the factors side by side, R = sum of `ranks` [G].

    Ranks may differ and be 0, as adapters of several trainings have them; by default all are R / G.
    """

    factored = True

    def __init__(
        self, up: Tensor, down: Tensor, parts: int, shape: torch.Size | None = None, ranks: Iterable[int] | None = None
    ):
        super().__init__()
        self.register_buffer("up", up)
        self.register_buffer("down", down)
        self.up: Tensor
        self.down: Tensor
        self.parts, self.shape = parts, torch.Size((len(up), down.shape[1]) if shape is None else shape)
        self.ranks = (len(down) // parts,) * parts if ranks is None else tuple(ranks)
        if sum(self.ranks) != len(down) or len(self.ranks) != parts:
            raise ValueError(f"ranks {self.ranks} of {parts} changes are not those of {len(down)} rows of factors")

    @classmethod
    def of(cls, ups: Iterable[Tensor], downs: Iterable[Tensor], shape: torch.Size | None = None) -> "LowRank":
        """From factors up_g [m, r_g] and down_g [r_g, n] of every change."""
        ups, downs = list(ups), list(downs)
        return cls(torch.cat(ups, 1), torch.cat(downs), len(ups), shape, [len(down) for down in downs])

    @property
    def rank(self) -> int:
        """The largest of the ranks."""
        return max(self.ranks)

    def factors(self, index: int) -> tuple[Tensor, Tensor]:
        """up_index [m, r] and down_index [r, n]."""
        return self.up.split(self.ranks, 1)[index], self.down.split(self.ranks)[index]

    def spread(self, weights: Tensor) -> Tensor:
        """Weights [..., G] as those [..., R] of the rows of `down`."""
        if len(set(self.ranks)) == 1:
            return weights.repeat_interleave(self.ranks[0], -1)
        every = (weights[..., g, None].expand(*weights.shape[:-1], rank) for g, rank in enumerate(self.ranks))
        return torch.cat(list(every), -1)

    def mix(self, weights: Tensor) -> Tensor:
        weights, up, down = alike(weights, self.up, self.down)
        return ((up * self.spread(weights)[..., None, :]) @ down).view((*weights.shape[:-1], *self.shape))

    def add_(self, x: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
        up, down, used, spread = self.up, self.down, in_use(weights), self.spread(weights)
        if not used:
            return onto
        if len(used) < self.parts:  # run only those in use: of the samples of one expert, one
            starts = torch.arange(len(down), device=down.device).split(self.ranks)
            rows = torch.cat([starts[index] for index in used])
            up, down, spread = up[:, rows], down[rows], spread[..., rows]
        inner = functional.linear(x, down)
        return add_product(onto, scaled(inner, over_tokens(spread)), up)

    def looked_up(self, ids: Tensor, weights: Tensor) -> Tensor:
        weights, up, down = alike(weights, self.up, self.down)
        return (functional.embedding(ids, up) * over_tokens(self.spread(weights))) @ down

    def transposed(self) -> "LowRank":
        return LowRank(self.down.T.contiguous(), self.up.T.contiguous(), self.parts, ranks=self.ranks)

    def facts(self) -> dict[str, Any]:
        return super().facts() | ({"ranks": list(self.ranks)} if len(set(self.ranks)) > 1 else {})

    def macs(self, tokens: int, per_token: bool = False, used: int | None = None) -> int:
        return tokens * sum(sorted(self.ranks, reverse=True)[: used or self.parts]) * sum(self.sides())

    def mix_macs(self) -> int:
        return len(self.down) * self.shape.numel()
