"""Accuracy."""

import math

from torch import Tensor

from tasks.metrics.metric import Metric


class Accuracy(Metric):
    """The share of right classes."""

    name = "accuracy"

    def value(self, predicted: Tensor, labels: Tensor) -> float:
        return int((predicted == labels).sum()) / len(labels)

    def standard_error(self, predicted: Tensor, labels: Tensor) -> float:
        """That of a binomial proportion."""
        value = self.value(predicted, labels)
        return math.sqrt(value * (1 - value) / len(labels))
