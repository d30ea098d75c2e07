"""Stacks of task matrices known by their factors, in bases that all share: small cores are decomposed instead."""

from typing import NamedTuple

import torch
from torch import Tensor

from merging.decompose.tucker import Tucker
from merging.deltas import Delta, LowRank
from merging.deltas import Tucker as TuckerDelta


class Compressed(NamedTuple):
    """X_t = out core_t into^T with orthonormal columns in out and into: norms and angles are those of the cores."""

    core: Tensor  # [T, p, q]
    out: Tensor  # [m, p]
    into: Tensor  # [n, q]

    @classmethod
    def of(cls, delta: LowRank) -> "Compressed":
        """QR of all factors side by side, in fp64; nothing of a full side of the matrices but the factors is made."""
        out, left = torch.linalg.qr(delta.up.double())
        into, right = torch.linalg.qr(delta.down.T.double())
        pairs = zip(left.split(delta.ranks, 1), right.split(delta.ranks, 1), strict=True)
        core = torch.stack([one @ other.T for one, other in pairs])
        return cls(core.float(), out.float(), into.float())

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, m, n)"""
        return len(self.core), len(self.out), len(self.into)

    def transposed(self) -> "Compressed":
        """That of the transposed matrices."""
        return Compressed(self.core.mT.contiguous(), self.into, self.out)

    def exact(self) -> Tucker:
        """As a Tucker decomposition that loses nothing."""
        return Tucker(self.core, torch.eye(len(self.core)), self.out, self.into)

    def lifted(self, delta: Delta, out: bool = True, into: bool = True) -> Delta:
        """A change of the cores as one of the matrices, or of one side of them alone."""
        if isinstance(delta, LowRank):
            up = self.out @ delta.up if out else delta.up
            return LowRank(up, delta.down @ self.into.T if into else delta.down, delta.parts, ranks=delta.ranks)
        assert isinstance(delta, TuckerDelta)
        sides = self.out @ delta.out if out else delta.out, self.into @ delta.into if into else delta.into
        return TuckerDelta(delta.core, delta.task, *sides)
