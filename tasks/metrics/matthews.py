"""Matthews correlation coefficient."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tasks.metrics.metric import Metric, constant


class Matthews(Metric):
    """Correlation of predicted and true classes in [-1, 1] (Matthews, 1975; of several classes Gorodkin, 2004).

    0 for a constant prediction, which says nothing of the labels.
    """

    name = "matthews"

    def value(self, predicted: Tensor, labels: Tensor) -> float:
        count, right = len(labels), int((predicted == labels).sum())
        classes = torch.cat([predicted, labels]).unique()
        mine, true = ((values[:, None] == classes).sum(0).double() for values in (predicted, labels))
        spread = (count**2 - float(mine @ mine)) * (count**2 - float(true @ true))
        return (right * count - float(mine @ true)) / math.sqrt(spread) if spread else 0.0

    def undefined(self, labels: Tensor, classes: Sequence[str]) -> str | None:
        return "all labels are of one class" if constant(labels) else None

    def notes(self, predicted: Tensor, labels: Tensor) -> list[str]:
        return ["matthews is 0 because every sample is predicted to be of one class"] if constant(predicted) else []
