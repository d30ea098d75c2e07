from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from merging.deltas import Delta, Masked
from merging.deltas.masked import packed
from merging.entries import Entry, sweep
from merging.experts import Experts
from merging.merged import Merged, Routing
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
        tasks, specs = len(experts.tasks), experts.specs()
        vectors = {key: torch.empty(spec.shape) for key, spec in specs.items()}
        bits = {key: packed(torch.empty(tasks, size.numel(), dtype=torch.bool)) for key, (size, _) in specs.items()}

        def unify(entry: Entry, tau: Tensor) -> tuple[str, Tensor]:
            first, count = entry.first, tau.shape[1]
            total = tau[0].double()
            for change in tau[1:]:
                total += change
            sign = torch.where(total > 0, 1.0, -1.0)
            signed = tau * sign
            agreeing, largest = signed > 0, signed.amax(0).clamp_min_(0)
            torch.mul(sign, largest, out=vectors[entry.key].view(-1)[first : first + count])
            bits[entry.key][:, first // 8 : -(-(first + count) // 8)] = packed(agreeing)
            kept = torch.mul(agreeing, largest, out=signed)
            return entry.key, torch.stack([torch.linalg.vector_norm(sizes, 1, dim=1) for sizes in (tau, kept)]).double()

        sums = {key: torch.zeros(2, tasks, dtype=torch.float64) for key in specs}
        for key, pair in sweep(experts, unify):
            sums[key] += pair
        weight = {key: max(size.numel(), 1) if self.rescale == "parameter" else 1 for key, (size, _) in specs.items()}
        whole, kept = sum((pair / weight[key] for key, pair in sums.items()), torch.zeros(2, tasks).double())
        scales = torch.where(kept > 0, whole / kept.clamp_min(1e-300), 1.0).float()
        deltas: dict[str, Delta] = {key: Masked(vector, bits[key], scales) for key, vector in vectors.items()}
        return experts.merged({}, deltas=deltas, routing=Routing("learned" if self.routed else "oracle"))
