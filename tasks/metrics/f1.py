"""F1, of the positive class of two."""

from collections.abc import Sequence

from torch import Tensor

from tasks.metrics.metric import Metric


class F1(Metric):
    """The harmonic mean of precision and recall of class 1; 0 where it is neither predicted nor there."""

    name = "f1"

    def value(self, predicted: Tensor, labels: Tensor) -> float:
        return f1_of_class(predicted, labels, 1)

    def undefined(self, labels: Tensor, classes: Sequence[str]) -> str | None:
        count = max(len(classes), int(labels.max()) + 1)
        return f"it is of class 1 of two, and there are {count} classes (choose f1_macro)" if count > 2 else None


def f1_of_class(predicted: Tensor, labels: Tensor, index: int) -> float:
    """2 TP / (predicted + labelled) of one class, 0 where both are none."""
    mine, true = predicted == index, labels == index
    total = int(mine.sum()) + int(true.sum())
    return 2 * int((mine & true).sum()) / total if total else 0.0
