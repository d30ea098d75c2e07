from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from merging.entries import entrywise, sweep
from merging.experts import Experts
from merging.merged import Merged
from merging.ops import magnitude_at
from merging.options import Fraction, Options


@dataclass(frozen=True)
class LocalizeAndStitch(Options):
    """Localize-and-Stitch without data: each expert's largest entries, averaged where several keep the same one.

    He et al., 2024, arXiv 2408.13656: the dataless variant, whose masks are where the learned ones start. An expert
    keeps what is strictly larger than its entry of rank int(density * entries), over the whole model. density: the
    authors' 0.1 for CLIP (their vision script sets it under a name that nothing reads), 0.05 for RoBERTa, counted over
    the blocks alone; here all parameters count. There is no coefficient for the whole change.
    """

    density: Fraction = 0.1
    needs: ClassVar[str] = "nothing"
    streams: ClassVar[bool] = True

    def __call__(self, experts: Experts) -> Merged:
        threshold = thresholds(experts, self.density)
        return experts.merged(entrywise(experts, lambda _, tau: stitched(tau, tau.abs() > threshold)))


def thresholds(experts: Experts, density: float) -> Tensor:
    """The magnitudes [T, 1] above which an entry is among the largest of a task vector, over the whole model."""
    total = sum(spec.shape.numel() for spec in experts.specs().values())
    if not total:
        return torch.zeros(len(experts.tasks), 1)
    ranks = torch.full((len(experts.tasks), 1), max(1, int(total * density)))
    return magnitude_at(partial(sweep, experts), ranks)


def stitched(tau: Tensor, kept: Tensor) -> Tensor:
    """Entries [n] of task vectors [T, n], averaged over the tasks that keep them."""
    return (tau * kept).sum(0) / kept.sum(0).clamp_min(1)
