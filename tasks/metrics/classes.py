"""Metrics of predicted classes [N], or sequences of token ids [N, L], or texts."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tasks.metrics.metric import INVALID, Kind, Metric, constant
from tasks.score import accuracy

IGNORED = -100  # a label that is not compared, as in Hugging Face's losses


class Accuracy(Metric):
    """The share of right classes."""

    name = "accuracy"

    def value(self, predicted: Tensor, labels: Tensor) -> float:
        return int(self.right(predicted, labels).sum()) / len(labels)

    def right(self, predicted: Tensor, labels: Tensor) -> Tensor:
        """Which samples [N] are right."""
        return predicted == labels

    def standard_error(self, predicted: Tensor, labels: Tensor) -> float:
        return accuracy(int(self.right(predicted, labels).sum()), len(labels)).standard_error


class ExactMatch(Accuracy):
    """The share of texts, or of sequences of ids, that are right in every position whose label is not -100."""

    name = "exact_match"

    def kinds(self) -> tuple[Kind, ...]:
        return ("classes", "texts")

    def right(self, predicted: Tensor, labels: Tensor) -> Tensor:
        return ((predicted == labels) | (labels == IGNORED)).view(len(labels), -1).all(1)


class F1(Metric):
    """The harmonic mean of precision and recall of class 1; 0 where it is neither predicted nor there."""

    name = "f1"

    def value(self, predicted: Tensor, labels: Tensor) -> float:
        return f1_of_class(predicted, labels, 1)

    def undefined(self, labels: Tensor, classes: Sequence[str]) -> str | None:
        count = max(len(classes), int(labels.max()) + 1)
        return f"it is of class 1 of two, and there are {count} classes (choose f1_macro)" if count > 2 else None


class AccuracyF1(F1):
    """The mean of accuracy and F1, as GLUE scores MRPC and QQP."""

    name = "accuracy_f1"

    def value(self, predicted: Tensor, labels: Tensor) -> float:
        return (Accuracy().value(predicted, labels) + super().value(predicted, labels)) / 2


class F1Macro(Metric):
    """The mean over classes of their F1; the classes are those that are predicted or labelled, as in scikit-learn."""

    name = "f1_macro"

    def value(self, predicted: Tensor, labels: Tensor) -> float:
        classes = [index for index in torch.cat([predicted, labels]).unique().tolist() if index != INVALID]
        return sum(f1_of_class(predicted, labels, index) for index in classes) / len(classes)


def f1_of_class(predicted: Tensor, labels: Tensor, index: int) -> float:
    """2 TP / (predicted + labelled) of one class, 0 where both are none."""
    positive, true = predicted == index, labels == index
    total = int(positive.sum()) + int(true.sum())
    return 2 * int((positive & true).sum()) / total if total else 0.0


class Matthews(Metric):
    """Correlation of predicted and true classes in [-1, 1] (Matthews, 1975; of several classes Gorodkin, 2004).

    0 for a constant prediction, which says nothing of the labels.
    """

    name = "matthews"

    def value(self, predicted: Tensor, labels: Tensor) -> float:
        count, right = len(labels), int((predicted == labels).sum())
        classes = torch.cat([predicted, labels]).unique()
        answered, true = ((values[:, None] == classes).sum(0).double() for values in (predicted, labels))
        spread = (count**2 - float(answered @ answered)) * (count**2 - float(true @ true))
        return (right * count - float(answered @ true)) / math.sqrt(spread) if spread else 0.0

    def undefined(self, labels: Tensor, classes: Sequence[str]) -> str | None:
        return "all labels are of one class" if constant(labels) else None

    def notes(self, predicted: Tensor, labels: Tensor) -> list[str]:
        return ["matthews is 0 because every sample is predicted to be of one class"] if constant(predicted) else []
