"""Correlations of predicted numbers [N]."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tasks.metrics.metric import Metric, constant


class Pearson(Metric):
    """Linear correlation of predicted and true numbers in [-1, 1]; 0 for a constant prediction."""

    name = "pearson"
    compares = "numbers"

    def value(self, predicted: Tensor, labels: Tensor) -> float:
        if not predicted.isfinite().all():
            return -1.0  # a model that gives no numbers is worse than any that does
        if constant(predicted) or constant(labels):
            return 0.0
        return float(torch.corrcoef(torch.stack([self.scale(predicted), self.scale(labels)]))[0, 1])

    def scale(self, values: Tensor) -> Tensor:
        """What is correlated, fp64 [N]."""
        return values.double()

    def undefined(self, labels: Tensor, classes: Sequence[str]) -> str | None:
        return "all labels are the same number" if constant(labels) else None

    def notes(self, predicted: Tensor, labels: Tensor) -> list[str]:
        return [f"{self.name} is 0 because every prediction is the same number"] if constant(predicted) else []


class Spearman(Pearson):
    """Pearson's correlation of the ranks; equal numbers share the mean of their ranks."""

    name = "spearman"

    def scale(self, values: Tensor) -> Tensor:
        _, index, counts = values.unique(return_inverse=True, return_counts=True)
        last = counts.cumsum(0).to(torch.float64)
        return (last - (counts + 1) / 2)[index]


class PearsonSpearman(Pearson):
    """The mean of both, as GLUE scores STS-B."""

    name = "pearson_spearman"

    def value(self, predicted: Tensor, labels: Tensor) -> float:
        return (Pearson().value(predicted, labels) + Spearman().value(predicted, labels)) / 2
