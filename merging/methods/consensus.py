from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from merging.combined import terms
from merging.entries import Entry, entrywise
from merging.experts import Experts
from merging.merged import Merged
from merging.methods.ties import Ties, alike
from merging.options import Fraction, Index, Options, Within
from merging.threads import Scratch


@dataclass(frozen=True)
class Consensus(Options):
    """Consensus TA and Consensus TIES: the merged task vector without the entries that few tasks use.

    Wang et al., 2024, arXiv 2405.07813. A task uses an entry where |tau_t| > threshold * |merged - tau_t|, the mask of
    TALL-masks. merged: the "sum" of the task vectors, or "ties", sums of agreeing entries of task vectors trimmed to
    `density` (masks compare with untrimmed ones). least: tasks that must use an entry for it to stay; 1 drops what none
    uses, 2 (published) also what one alone uses, 0 drops nothing. threshold: one for all tasks; the authors choose it
    from 0.2 to 0.6 for every task on validation, as they do the scale. scale: 0 is the base.
    """

    merged: Literal["sum", "ties"] = "sum"
    threshold: Annotated[float, Within(0.0, 100.0)] = 0.4
    least: Index = 2
    density: Fraction = 0.2
    scale: float = 0.3
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts) -> Merged:
        together, scratch = self._together(experts), Scratch()

        def merge(entry: Entry, tau: Tensor) -> Tensor:
            merged = together(entry, scratch.like(tau).copy_(tau))
            used = (tau.abs() > self.threshold * (merged - tau).abs()).sum(0)
            return merged * (used >= self.least)

        return experts.merged(alike(experts, terms(entrywise(experts, merge))), self.scale)

    def _together(self, experts: Experts) -> Callable[[Entry, Tensor], Tensor]:
        if self.merged == "ties" and any(spec.shape.numel() for spec in experts.specs().values()):
            return Ties(self.density, "sum").merging(experts)
        return lambda _, tau: tau.sum(0)
