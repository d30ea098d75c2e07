from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from merging.combined import terms
from merging.entries import Entry, entrywise, sweep
from merging.experts import Experts
from merging.merged import Merged
from merging.methods.ties import alike
from merging.ops import KeepLargest
from merging.options import Fraction, Options


@dataclass(frozen=True)
class Sce(Options):
    """SCE: select entries on which experts differ, calculate a weight per parameter and expert, erase minority signs.

    Wan et al., 2024, arXiv 2408.07990, by mergekit's code. Of every parameter the share `density` of the entries whose
    variance over the experts is not zero is selected, those of largest variance; an expert's weight is its share in the
    summed squares of these entries; where the sum of the task vectors is negative only negative entries stay, else only
    positive ones; the change is their weighted mean. density: 1, mergekit's, selects all; the share of the paper was
    not verified. A single expert has no variance: below 1 nothing of it is selected. There is no coefficient.
    """

    density: Fraction = 1.0
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts) -> Merged:
        select = self._selections(experts) if self.density < 1 else {}

        def selected(entry: Entry, tau: Tensor) -> Tensor:
            if self.density == 1:
                return tau
            return tau.mul_(select[entry.key](entry, _variance(tau)) > 0) if entry.key in select else tau.zero_()

        def squares(entry: Entry, tau: Tensor) -> tuple[str, Tensor]:
            return entry.key, selected(entry, tau).double().square().sum(1)

        energy = {key: torch.zeros(len(experts.tasks)).double() for key in experts.specs()}
        for key, piece in sweep(experts, squares):
            energy[key] += piece

        def merge(entry: Entry, tau: Tensor) -> Tensor:
            tau = selected(entry, tau)
            sign = torch.where(tau.sum(0) >= 0, 1.0, -1.0)
            weights = energy[entry.key] / energy[entry.key].sum().clamp_min(1e-300)
            weights = weights.float()[:, None] * (tau.sign() == sign)
            total = weights.sum(0)
            return (weights * tau).sum(0) / torch.where(total > 0, total, 1.0)

        return experts.merged(alike(experts, terms(entrywise(experts, merge))))

    def _selections(self, experts: Experts) -> Mapping[str, KeepLargest]:
        """What keeps the largest variances of every parameter that has any to be kept, in three passes."""
        counts = dict.fromkeys(experts.specs(), 0)
        for key, count in sweep(experts, lambda entry, tau: (entry.key, int(_variance(tau).count_nonzero()))):
            counts[key] += count
        some = {key: kept for key, count in counts.items() if (kept := int(self.density * count))}
        return {key: KeepLargest.find(partial(_variances, experts, key), kept) for key, kept in some.items()}


def _variance(tau: Tensor) -> Tensor:
    """Over the experts, [1, n] of [T, n]."""
    return tau.var(0, correction=0, keepdim=True)


def _variances(experts: Experts, key: str, work: Callable[[Entry, Tensor], Any]) -> Iterable[Any]:
    """A sweep over the variances of one parameter."""
    return sweep(experts, lambda entry, tau: work(entry, _variance(tau)), [key])
