"""What is learned from: samples of every task, with labels where they are known; few of them, or those of one task."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from merging.calibration import Calibration, expert_features
from merging.context import Context
from merging.errors import UserError
from merging.experts import Experts


class Samples(NamedTuple):
    """Inputs of tasks, and their labels [n] per task; none where no objective compares with labels."""

    data: Calibration
    labels: Sequence[Tensor] = ()

    def part(self, rows: dict[int, Tensor]) -> "Samples":
        """As Calibration.part."""
        labels = [self.labels[task][some.to(self.labels[task].device)] for task, some in rows.items() if self.labels]
        return Samples(self.data.part(rows), labels)

    def of_task(self, task: int) -> "Samples":
        """Those of one task."""
        return self.part({task: torch.arange(self.data.sizes[task])})

    def few(self, shots: int | None) -> "Samples":
        """The first `shots` of every class of every task, of all where labels are no classes; None is everything."""
        if shots is None:
            return self
        sizes = self.data.sizes
        labels = [*self.labels] or [torch.zeros(size, dtype=torch.int64) for size in sizes]
        return self.part({task: first(labels[task], shots) for task in range(len(sizes))})


def opened(context: Context, split: str, needs: str) -> Samples:
    """The samples of a split, with labels where `needs` is "labels". Raises UserError where there are none."""
    return Samples(*context.labelled(split)) if needs == "labels" else Samples(context.unlabelled(split))


def first(labels: Tensor, count: int) -> Tensor:
    """The rows, in order, of the first `count` samples of every class [n]; of numbers, of the first `count`."""
    if labels.ndim != 1 or labels.is_floating_point():
        return torch.arange(min(count, len(labels)))
    known = labels.cpu()
    rows = [(known == label).nonzero()[:count, 0] for label in known.unique()]
    if not rows:
        raise UserError("A task has no sample to learn from: give every task some in that split.")
    return torch.cat(rows).sort().values


@torch.inference_mode()
def trusted(data: Calibration, experts: Experts, most: int = 100) -> list[Tensor]:
    """The classes [n] that the base predicts where it is most certain, -1 elsewhere, on the inputs of every task.

    Of each class the samples most likely to be of it: a tenth of what it would have were all classes equally frequent,
    at most `most`.
    """
    labels = []
    for task, features in enumerate(expert_features([experts.origin] * len(data.sizes), data)):
        likelihoods = data.outputs(task, features).float().softmax(-1)
        count = min(len(likelihoods) // (10 * likelihoods.shape[1]), most)
        rows = likelihoods.argsort(dim=0, descending=True, stable=True)[:count].flatten()
        labels.append(torch.full((len(likelihoods),), -1, device=rows.device))
        labels[-1][rows] = likelihoods.argmax(-1)[rows]
    return [known.clone() for known in labels]
