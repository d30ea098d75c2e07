"""Macro F1."""

import torch
from torch import Tensor

from tasks.metrics.f1 import f1_of_class
from tasks.metrics.metric import INVALID, Metric


class F1Macro(Metric):
    """The mean over classes of their F1; the classes are those that are predicted or labelled, as in scikit-learn."""

    name = "f1_macro"

    def value(self, predicted: Tensor, labels: Tensor) -> float:
        classes = [index for index in torch.cat([predicted, labels]).unique().tolist() if index != INVALID]
        return sum(f1_of_class(predicted, labels, index) for index in classes) / len(classes)
