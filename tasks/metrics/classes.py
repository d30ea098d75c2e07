"""Metrics of predicted classes [N], or sequences of token ids [N, L], or texts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tasks.metrics.metric import INVALID, Kind, Metric, Rows, constant
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


class F1(Rows):
    """The harmonic mean of precision and recall of class 1; 0 where it is neither predicted nor there."""

    name = "f1"

    def values(self, predicted: Tensor, labels: Tensor) -> Tensor:
        return f1_of_class(predicted, labels, 1)[0]

    def undefined(self, labels: Tensor, classes: Sequence[str]) -> str | None:
        count = max(len(classes), int(labels.max()) + 1)
        return f"it is of class 1 of two, and there are {count} classes (choose f1_macro)" if count > 2 else None


class AccuracyF1(F1):
    """The mean of accuracy and F1, as GLUE scores MRPC and QQP."""

    name = "accuracy_f1"

    def values(self, predicted: Tensor, labels: Tensor) -> Tensor:
        return ((predicted == labels).double().mean(-1) + super().values(predicted, labels)) / 2


class F1Macro(Rows):
    """The mean over classes of their F1; the classes are those that are predicted or labelled, as in scikit-learn."""

    name = "f1_macro"

    def values(self, predicted: Tensor, labels: Tensor) -> Tensor:
        every = [f1_of_class(predicted, labels, i) for i in classes_of(predicted, labels) if i != INVALID]
        f1, present = map(torch.stack, zip(*every, strict=True))
        return f1.sum(0) / present.sum(0)


def classes_of(predicted: Tensor, labels: Tensor) -> range:
    """All classes from the lowest to the highest."""
    return range(int(min(predicted.min(), labels.min())), int(max(predicted.max(), labels.max())) + 1)


def f1_of_class(predicted: Tensor, labels: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """2 TP / (predicted + labelled) of one class in every row [R, N], 0 where both are none, and whether any is."""
    positive, true = predicted == index, labels == index
    total = positive.sum(-1) + true.sum(-1)
    return 2 * (positive & true).sum(-1).double() / total.clamp(min=1), total > 0


class Matthews(Rows):
    """Correlation of predicted and true classes in [-1, 1] (Matthews, 1975; of several classes Gorodkin, 2004).

    0 for a constant prediction, which says nothing of the labels.
    """

    name = "matthews"

    def values(self, predicted: Tensor, labels: Tensor) -> Tensor:
        count, right = labels.shape[-1], (predicted == labels).sum(-1).double()
        classes = classes_of(predicted, labels)
        answered, true = (torch.stack([(of == i).sum(-1) for i in classes]).double() for of in (predicted, labels))
        spread = (count**2 - (answered**2).sum(0)) * (count**2 - (true**2).sum(0))
        return torch.where(spread > 0, (right * count - (answered * true).sum(0)) / spread.clamp(min=1).sqrt(), 0.0)

    def undefined(self, labels: Tensor, classes: Sequence[str]) -> str | None:
        return "all labels are of one class" if constant(labels) else None

    def notes(self, predicted: Tensor, labels: Tensor) -> list[str]:
        return ["matthews is 0 because every sample is predicted to be of one class"] if constant(predicted) else []
