"""Blocks of rows, each stored in a way of its own."""

from typing import Any

import torch
from torch import Tensor, nn

from merging.deltas.base import Delta


class Rows(Delta):
    """Deltas of the blocks of rows of one matrix: query, key and value of a fused projection, decomposed apart."""

    def __init__(self, blocks: list[Delta]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.parts = blocks[0].parts
        self.shape = torch.Size((sum(block.shape[0] for block in blocks), *blocks[0].shape[1:]))

    @property
    def factored(self) -> bool:  # type: ignore[override]
        return any(block.factored for block in self.blocks)  # type: ignore[misc]

    def mix(self, weights: Tensor) -> Tensor:
        return torch.cat([block.mix(weights) for block in self.blocks], weights.ndim - 1)  # type: ignore[operator]

    def add_(self, x: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
        start = 0
        for block in self.blocks:
            rows = int(block.shape[0])  # type: ignore[index]
            block.add_(x, weights, onto.narrow(-1, start, rows))  # type: ignore[operator]
            start += rows
        return onto

    def stored(self) -> "Rows":
        return Rows([block.stored() for block in self.blocks])  # type: ignore[operator]

    def opened(self) -> "Rows":
        return Rows([block.opened() for block in self.blocks])  # type: ignore[operator]

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"blocks": [block.facts() for block in self.blocks]}  # type: ignore[operator]

    @property
    def params(self) -> int:
        return sum(block.params for block in self.blocks)  # type: ignore[misc]

    @property
    def bytes(self) -> int:
        return sum(block.bytes for block in self.blocks)  # type: ignore[misc]

    def macs(self, tokens: int, per_token: bool = False, used: int | None = None) -> int:
        return sum(block.macs(tokens, per_token, used) for block in self.blocks)  # type: ignore[operator]

    def mix_macs(self) -> int:
        return sum(block.mix_macs() for block in self.blocks)  # type: ignore[operator]
