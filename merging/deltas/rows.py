"""Blocks of rows or of columns, each stored in a form of its own."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from merging.deltas.base import Delta


class Rows(Delta):
    """Deltas of the blocks of one matrix, of rows (axis 0) or of columns (axis 1).

    So query, key and value of a fused projection are decomposed apart; columns come of transposing.
    """

    def __init__(self, blocks: list[Delta], axis: int = 0):
        super().__init__()
        self.blocks, self.axis = nn.ModuleList(blocks), axis
        self.parts = blocks[0].parts
        sizes = list(blocks[0].shape)
        sizes[axis] = sum(block.shape[axis] for block in blocks)
        self.shape = torch.Size(sizes)

    def placed(self) -> Iterator[tuple[Delta, int, int]]:
        """Every block, its first row or column and their number."""
        start = 0
        for block in self.members():
            yield block, start, block.shape[self.axis]
            start += block.shape[self.axis]

    def members(self) -> list[Delta]:
        """The blocks in order."""
        return list(self.blocks)  # type: ignore[arg-type]

    @property
    def factored(self) -> bool:  # type: ignore[override]
        return any(block.factored for block in self.members())

    def mix(self, weights: Tensor) -> Tensor:
        return torch.cat([block.mix(weights) for block in self.members()], weights.ndim - 1 + self.axis)

    def mixes(self, weights: Tensor, samples: int) -> Iterator[Tensor]:
        blocks = zip(*(block.mixes(weights, samples) for block in self.members()), strict=True)
        return (torch.cat(some, 1 + self.axis) for some in blocks)

    def add_(self, x: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
        for block, start, size in self.placed():
            if self.axis == 0:
                block.add_(x, weights, onto.narrow(-1, start, size))
            else:
                block.add_(x.narrow(-1, start, size), weights, onto)
        return onto

    def looked_up(self, ids: Tensor, weights: Tensor) -> Tensor:
        if self.axis == 1:
            return torch.cat([block.looked_up(ids, weights) for block in self.members()], -1)
        total = 0
        for block, start, size in self.placed():
            inside = (ids >= start) & (ids < start + size)
            total = total + block.looked_up((ids - start).clamp(0, size - 1), weights) * inside[..., None]
        return total  # type: ignore[return-value]

    def transposed(self) -> "Rows":
        return Rows([block.transposed() for block in self.members()], 1 - self.axis)

    def stored(self) -> "Rows":
        return Rows([block.stored() for block in self.members()], self.axis)

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"axis": self.axis, "blocks": [block.facts() for block in self.members()]}

    @property
    def params(self) -> int:
        return sum(block.params for block in self.members())

    @property
    def bytes(self) -> int:
        return sum(block.bytes for block in self.members())

    def macs(self, tokens: int, per_token: bool = False, used: int | None = None) -> int:
        return sum(block.macs(tokens, per_token, used) for block in self.members())

    def mix_macs(self) -> int:
        return sum(block.mix_macs() for block in self.members())
