from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from merging.errors import UserError
from merging.experts import Experts
from merging.merged import Merged
from merging.ops import KeepLargest, rows
from merging.preflight import check_range
from merging.threads import each

CHUNK = 1 << 16  # entries per expert at a time: small enough for the processor's cache


@dataclass(frozen=True)
class Ties:
    """TIES-Merging: trim, elect a sign per entry, merge those that agree. Yadav et al., 2023, arXiv 2306.01708.

    density: share of its largest entries that each task vector keeps, over the whole model; 1 trims nothing.
    merge: "sum" of the agreeing entries (usual for vision, scale about 0.3) or their "mean" (the paper's, scale about
    1). scale: 0 is the base.
    """

    density: float = 0.2
    merge: Literal["sum", "mean"] = "sum"
    scale: float = 0.3
    needs: ClassVar[str] = "nothing"

    def __post_init__(self) -> None:
        check_range("ties: density", self.density, 0.0, 1.0, open_low=True)
        if self.merge not in ("sum", "mean"):
            raise UserError(f"ties: merge={self.merge!r} is unknown. Choose sum or mean.")

    def __call__(self, experts: Experts) -> Merged:
        total = sum(spec.shape.numel() for spec in experts.specs().values())
        count = min(int(total * self.density) + 1, total)  # the published threshold entry is kept too
        trim = KeepLargest.find(lambda: (rows(tau) for _, tau in experts.stream()), count)
        votes, undecided = 0, []

        def merge(key: str, tau: Tensor) -> Tensor:
            nonlocal votes
            merged = torch.empty(tau.shape[1:])
            for found in each(self._disjoint, rows(trim(key, tau)).split(CHUNK, 1), merged.view(-1).split(CHUNK)):
                votes += found.votes
                undecided.append(found)
            return merged

        merged = experts.map(merge)
        if votes > 0:  # entries that cancel exactly take the majority sign of the model, known only now
            for chunk in undecided:
                chunk.merged[chunk.cancelled] = chunk.positive
        return experts.merged(merged, self.scale)

    def _disjoint(self, tau: Tensor, out: Tensor) -> "Chunk":
        """Merge trimmed [T, n] into `out` [n]; entries that cancel exactly count as negative."""
        total = tau.sum(0)
        positive, negative = tau.clamp_min(0).sum(0), tau.clamp_max(0).sum(0)
        if self.merge == "mean":
            positive /= (tau > 0).sum(0).clamp_min(1)
            negative /= (tau < 0).sum(0).clamp_min(1)
        torch.where(total > 0, positive, negative, out=out)
        cancelled = ((total == 0) & (out != 0)).nonzero()[:, 0]
        return Chunk(int(total.sign().sum()), out, cancelled, positive[cancelled])


class Chunk(NamedTuple):
    """A merged piece, and what to change if the positive sign wins over the model."""

    votes: int  # sum of the elected signs
    merged: Tensor
    cancelled: Tensor  # entries whose task vectors sum to zero
    positive: Tensor  # their values under a positive sign
