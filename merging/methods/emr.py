from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from merging.deltas import Delta, Masked
from merging.experts import Experts
from merging.merged import Merged, Routing
from merging.ops import rows
from merging.options import Options


@dataclass(frozen=True)
class Emr(Options):
    """EMR-Merging: one unified task vector, and per task a bit for every entry and one scalar, by the true task id.

    Huang et al., 2024, arXiv 2405.17461. An entry of the unified vector has the sign of the mean change (negative for
    a mean of zero) and the largest magnitude among the tasks of that sign; the bits of a task mark where its own change
    has that sign. rescale: the scalar restores the task vector's mean magnitude per parameter, summed over parameters
    ("parameter": a bias counts as much as a matrix, as in the published code), or over all entries ("entry"). routed:
    a router weighs what the tasks' bits select, in place of the true task (ours).
    """

    rescale: Literal["parameter", "entry"] = "parameter"
    routed: bool = False
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts) -> Merged:
        masked: dict[str, Masked] = {}
        whole, kept = torch.zeros(2, len(experts.tasks), dtype=torch.float64)
        for key, tau in experts.stream():
            sign = torch.where(tau.sum(0, dtype=torch.float64) > 0, 1.0, -1.0)
            agreeing = tau * sign > 0
            vector = sign * (tau.abs() * agreeing).amax(0)
            masked[key] = Masked.of(vector, agreeing, torch.ones(len(tau)))
            whole.add_(self._size(tau))
            kept.add_(self._size(agreeing * vector))
        scales = torch.where(kept > 0, whole / kept.clamp_min(1e-300), 1.0).float()
        deltas: dict[str, Delta] = {key: Masked(delta.vector, delta.bits, scales) for key, delta in masked.items()}
        return experts.merged({}, deltas=deltas, routing=Routing("learned" if self.routed else "oracle"))

    def _size(self, changes: Tensor) -> Tensor:
        """What a parameter [T, ...] adds to the sums that the scalars keep, [T] fp64."""
        total = rows(changes).abs().sum(1, dtype=torch.float64)
        return total / max(changes[0].numel(), 1) if self.rescale == "parameter" else total
