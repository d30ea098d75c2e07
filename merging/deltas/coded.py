"""Whole changes of a matrix in 4 or 8 bits an entry."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from merging.deltas.base import Whole
from merging.packed import Packed


class Coded(Whole):
    """Changes [G, *shape] of a matrix as codes, steps and zeros, each [G, ...] of what merging.packed.Packed has."""

    def __init__(
        self, codes: Tensor, steps: Tensor, zeros: Tensor | None = None, *, shape: torch.Size, bits: int, group: int,
        transposed: bool = False,
    ):  # fmt: skip
        super().__init__()
        for name, tensor in (("codes", codes), ("steps", steps), ("zeros", zeros)):
            self.register_buffer(name, tensor)
        self.codes: Tensor
        self.steps: Tensor
        self.zeros: Tensor | None
        self.parts, self.shape = len(codes), torch.Size(shape)
        self.bits, self.group, self.stored_transposed = bits, group, transposed

    @classmethod
    def of(cls, changes: Sequence[Packed]) -> "Coded":
        """From changes of one parameter, packed alike."""
        first = changes[0]
        zeros = None if first.zeros is None else torch.stack([change.tensors["zeros"] for change in changes])
        codes, steps = (torch.stack([change.tensors[name] for change in changes]) for name in ("codes", "steps"))
        return cls(codes, steps, zeros, shape=first.shape, bits=first.bits, group=first.group,
                   transposed=first.transposed)  # fmt: skip

    def part(self, index: int) -> Tensor:
        zeros = None if self.zeros is None else self.zeros[index]
        held = Packed(self.codes[index], self.steps[index], zeros, self.shape, self.bits, self.group,
                      self.stored_transposed)  # fmt: skip
        return held.opened()

    def transposed(self) -> "Coded":
        """Over the same codes, which are those of the matrix as it is applied."""
        return Coded(self.codes, self.steps, self.zeros, shape=self.shape[::-1], bits=self.bits, group=self.group,
                     transposed=not self.stored_transposed)  # fmt: skip

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"bits": self.bits, "group": self.group, "transposed": self.stored_transposed}

    @property
    def params(self) -> int:
        """Stored numbers, 32 bits counted as one."""
        return -(-self.bytes // 4)
