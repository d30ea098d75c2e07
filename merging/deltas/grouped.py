"""Changes that several parts share, each held once."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from merging.deltas.base import Delta


class Grouped(Delta):
    """delta_g = member_(of[g]) of the fewer changes in `members`: parts of one number share a change."""

    def __init__(self, members: Delta, of: Sequence[int]):
        super().__init__()
        self.members, self.of = members, tuple(of)
        self.parts, self.shape = len(self.of), members.shape
        if {*self.of} != {*range(members.parts)}:
            raise ValueError(f"parts of the groups {self.of} do not share {members.parts} changes")

    def _summed(self, weights: Tensor) -> Tensor:
        """Weights [..., G] as those of the members: of parts that share one their sum."""
        apart = weights.unbind(-1)
        shares = [[apart[part] for part, group in enumerate(self.of) if group == member]
                  for member in range(self.members.parts)]  # fmt: skip
        return torch.stack([sum(some[1:], some[0]) for some in shares], -1)

    def mix(self, weights: Tensor) -> Tensor:
        return self.members.mix(self._summed(weights))

    def mixes(self, weights: Tensor, samples: int) -> Iterator[Tensor]:
        return self.members.mixes(self._summed(weights), samples)

    def add_(self, x: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
        return self.members.add_(x, self._summed(weights), onto)

    def looked_up(self, ids: Tensor, weights: Tensor) -> Tensor:
        return self.members.looked_up(ids, self._summed(weights))

    @property
    def factored(self) -> bool:  # type: ignore[override]
        return self.members.factored

    def transposed(self) -> "Grouped":
        return Grouped(self.members.transposed(), self.of)

    def stored(self) -> "Grouped":
        return Grouped(self.members.stored(), self.of)

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"of": list(self.of), "members": self.members.facts()}

    @property
    def params(self) -> int:
        return self.members.params

    @property
    def bytes(self) -> int:
        return self.members.bytes

    def macs(self, tokens: int, per_token: bool = False, used: int | None = None) -> int:
        return self.members.macs(tokens, per_token, min(used or self.parts, self.members.parts))

    def mix_macs(self) -> int:
        return self.members.mix_macs()
