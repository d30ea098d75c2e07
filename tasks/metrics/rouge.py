"""Metrics of texts [N, L] by the n-grams that they share (Lin, 2004)."""

import math
from functools import lru_cache
from typing import Any

from torch import Tensor

from merging.errors import UserError
from tasks.metrics.metric import Metric


class Rouge2(Metric):
    """Mean F of the bigrams that prediction and label share, by rouge-score without a stemmer."""

    name = "rouge2"
    compares = "texts"

    def value(self, predicted: Tensor, labels: Tensor) -> float:
        return math.fsum(self.scores(predicted, labels)) / len(labels)

    def standard_error(self, predicted: Tensor, labels: Tensor) -> float:
        scores, mean = self.scores(predicted, labels), self.value(predicted, labels)
        return math.sqrt(math.fsum((score - mean) ** 2 for score in scores)) / len(scores)

    def scores(self, predicted: Tensor, labels: Tensor) -> list[float]:
        """F of every sample."""
        texts = ([bytes(row).rstrip(b"\0").decode(errors="replace") for row in codes.tolist()]
                 for codes in (labels, predicted))  # fmt: skip
        return [f(self.name, label, text) for label, text in zip(*texts, strict=True)]


@lru_cache(maxsize=1 << 16)
def f(name: str, label: str, text: str) -> float:
    """F of a text and its label. Raises UserError where the package is not installed."""
    return scorer(name).score(label, text)[name].fmeasure


@lru_cache
def scorer(name: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError(
            f"The metric {name} needs the package rouge-score. Install it: pip install 'duet-merging[language]'."
        ) from error
    return RougeScorer([name], use_stemmer=False)
