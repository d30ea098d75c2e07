"""Exact match, of answers that are sequences of tokens."""

from torch import Tensor

from tasks.metrics.accuracy import Accuracy

IGNORED = -100  # a label that is not compared, as in Hugging Face's losses


class ExactMatch(Accuracy):
    """The share of sequences [N, L] that are right in every position whose label is not -100."""

    name = "exact_match"

    def value(self, predicted: Tensor, labels: Tensor) -> float:
        right = (predicted == labels) | (labels == IGNORED)
        return int(right.flatten(1).all(1).sum() if right.ndim > 1 else right.sum()) / len(labels)
