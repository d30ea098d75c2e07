"""Correlations of predicted numbers [N]."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tasks.metrics.metric import Rows, constant


class Pearson(Rows):
    """Linear correlation of predicted and true numbers in [-1, 1]; 0 for a constant prediction."""

    name = "pearson"
    compares = "numbers"

    def values(self, predicted: Tensor, labels: Tensor) -> Tensor:
        scaled = (self.scale(values) for values in (predicted, labels))
        x, y = (values - values.mean(-1, keepdim=True) for values in scaled)
        correlation = (x * y).sum(-1) / ((x * x).sum(-1) * (y * y).sum(-1)).sqrt()
        correlation[constant(predicted) | constant(labels)] = 0.0
        correlation[~predicted.isfinite().all(-1)] = -1.0  # a model that gives no numbers is worse than any that does
        return correlation.clamp(-1, 1)

    def scale(self, values: Tensor) -> Tensor:
        """What is correlated, fp64 [R, N]."""
        return values.double()

    def undefined(self, labels: Tensor, classes: Sequence[str]) -> str | None:
        return "all labels are the same number" if constant(labels) else None

    def notes(self, predicted: Tensor, labels: Tensor) -> list[str]:
        return [f"{self.name} is 0 because every prediction is the same number"] if constant(predicted) else []


class Spearman(Pearson):
    """Pearson's correlation of the ranks; equal numbers share the mean of their ranks."""

    name = "spearman"

    def scale(self, values: Tensor) -> Tensor:
        known, index = values.unique(return_inverse=True)
        counts = torch.zeros(len(values), len(known), dtype=torch.float64)
        counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float64))
        return (counts.cumsum(1) - (counts + 1) / 2).gather(1, index)


class PearsonSpearman(Pearson):
    """The mean of both, as GLUE scores STS-B."""

    name = "pearson_spearman"

    def values(self, predicted: Tensor, labels: Tensor) -> Tensor:
        return (Pearson().values(predicted, labels) + Spearman().values(predicted, labels)) / 2
