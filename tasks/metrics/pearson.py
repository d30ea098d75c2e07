"""Pearson's correlation coefficient."""

from collections.abc import Sequence

from torch import Tensor

from tasks.metrics.metric import Metric, constant


class Pearson(Metric):
    """Linear correlation of predicted and true numbers in [-1, 1]; 0 for a constant prediction."""

    name = "pearson"
    compares = "numbers"

    def value(self, predicted: Tensor, labels: Tensor) -> float:
        if not predicted.isfinite().all():
            return -1.0  # a model that gives no numbers is worse than any that does
        return correlation(predicted.double(), labels.double())

    def undefined(self, labels: Tensor, classes: Sequence[str]) -> str | None:
        return "all labels are the same number" if constant(labels) else None

    def notes(self, predicted: Tensor, labels: Tensor) -> list[str]:
        return [f"{self.name} is 0 because every prediction is the same number"] if constant(predicted) else []


def correlation(first: Tensor, second: Tensor) -> float:
    """Of two vectors [N] in fp64, 0 where one of them is constant."""
    if constant(first) or constant(second):
        return 0.0
    x, y = first - first.mean(), second - second.mean()
    return max(-1.0, min(1.0, float((x / x.norm()) @ (y / y.norm()))))
