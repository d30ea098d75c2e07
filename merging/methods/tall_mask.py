from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from merging.deltas import Delta, Masked
from merging.experts import Experts
from merging.merged import Merged, Routing
from merging.options import Options, Within


@dataclass(frozen=True)
class TallMask(Options):
    """TALL-masks: the summed task vectors, and per task a bit for every entry that is its own, by the true task id.

    Wang et al., 2024, arXiv 2405.07813. A task keeps an entry where |tau_t| > threshold * |sum of the others' tau|.
    threshold: 0 keeps all that the task changed; 0.2 to 0.6 are published, chosen per task on validation. routed: a
    router weighs what the tasks' bits select, which is the idea of MergeVLA (arXiv 2511.18810, threshold 0.6); its own
    router, which runs the model under every mask and compares with the experts' value projections, is not here.
    """

    threshold: Annotated[float, Within(0.0, 100.0)] = 0.4
    routed: bool = False
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts) -> Merged:
        deltas: dict[str, Delta] = {}
        for key, tau in experts.stream():
            vector = tau.sum(0)
            deltas[key] = Masked.of(vector, tau.abs() > self.threshold * (vector - tau).abs(), torch.ones(len(tau)))
        return experts.merged({}, deltas=deltas, routing=Routing("learned" if self.routed else "oracle"))
