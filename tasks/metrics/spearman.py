"""Spearman's rank correlation."""

import torch
from torch import Tensor

from tasks.metrics.pearson import Pearson, correlation


class Spearman(Pearson):
    """Pearson's correlation of the ranks; equal numbers share the mean of their ranks."""

    name = "spearman"

    def value(self, predicted: Tensor, labels: Tensor) -> float:
        if not predicted.isfinite().all():
            return -1.0
        return correlation(ranks(predicted), ranks(labels))


def ranks(values: Tensor) -> Tensor:
    """Ranks from 0 of [N], fp64; those of equal values are averaged."""
    _, index, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).to(torch.float64)
    return (last - (counts + 1) / 2)[index]
