"""What a metric is: a number that compares predictions with labels, and when it has no meaning."""

from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tasks.score import bootstrap

INVALID = -1  # the predicted class where a model gave no finite logits
Kind = Literal["classes", "numbers", "texts"]


class Metric:
    """Base of all metrics.

    compares: "classes" are integer indices [N] or token ids [N, L], "numbers" floating-point values [N], "texts" UTF-8
    in uint8 [N, L], filled up with zeros.
    """

    name: ClassVar[str]
    compares: ClassVar[Kind] = "classes"
    higher_is_better: ClassVar[bool] = True

    def value(self, predicted: Tensor, labels: Tensor) -> float:
        """The metric of predictions and labels of the same shape."""
        raise NotImplementedError

    def values(self, predicted: Tensor, labels: Tensor) -> Iterable[float]:
        """`value` of each row of resampled predictions and labels [R, N]."""
        return (self.value(*row) for row in zip(predicted, labels, strict=True))

    def undefined(self, labels: Tensor, classes: Sequence[str]) -> str | None:
        """Why the metric has no meaning for these labels, None where it has one."""
        return None

    def notes(self, predicted: Tensor, labels: Tensor) -> list[str]:
        """What a reader of this value should know."""
        return []

    def standard_error(self, predicted: Tensor, labels: Tensor) -> float:
        """Of `value` over samples, by bootstrap unless a closed form is known."""
        return bootstrap(lambda draws: self.values(predicted[draws], labels[draws]), len(labels))

    def refusal(self, labels: Tensor, classes: Sequence[str]) -> str | None:
        """Why labels cannot be scored at all, or by this metric."""
        if len(labels) == 0:
            return "it has no samples"
        kind: Kind = "texts" if labels.dtype == torch.uint8 else "numbers" if labels.is_floating_point() else "classes"
        if kind not in self.kinds():
            return f"it compares {' or '.join(self.kinds())}, and the labels are {kind}"
        return self.undefined(labels, classes)

    def kinds(self) -> tuple[Kind, ...]:
        """All that it compares."""
        return (self.compares,)


class Rows(Metric):
    """A metric that is computed of many rows of samples at once, which makes its standard error cheap."""

    def values(self, predicted: Tensor, labels: Tensor) -> Tensor:
        """The metric of each row of predictions and labels [R, N], fp64 [R]."""
        raise NotImplementedError

    def value(self, predicted: Tensor, labels: Tensor) -> float:
        return float(self.values(predicted[None], labels[None])[0])


def constant(values: Tensor) -> Tensor:
    """Whether all of [..., N] are equal, [...]."""
    return (values == values[..., :1]).all(-1)
