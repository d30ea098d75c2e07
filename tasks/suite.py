"""What is measured: suites of tasks, their splits and their frozen heads."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from merging.backbones.tower import Backbone
from merging.calibration import Calibration
from merging.errors import UserError
from merging.preflight import check_tasks

SPLITS = ("train", "val", "calibration", "test")  # calibration is used without its labels


@dataclass(frozen=True)
class Split:
    """Images of one task that serve one purpose."""

    name: str
    images: Tensor  # uint8 [N, 3, H, W]
    labels: Tensor  # int64 [N]

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def id(self) -> str:
        """Fingerprint: sha256 over images and labels, the first 16 hex digits."""
        digest = hashlib.sha256(self.images.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()[:16]


class Task(Protocol):
    """A classification task with a frozen head: logits = unit features [N, D] @ head().T."""

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> Sequence[str]: ...
    def split(self, name: str) -> Split: ...
    def head(self) -> Tensor: ...


@dataclass(frozen=True)
class Suite:
    """Tasks in a fixed order. Raises UserError when there is none, or one twice."""

    name: str
    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        check_tasks(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)


def calibration(suite: Suite, backbone: Backbone, split: str) -> Calibration:
    """The images of one split of every task, without their labels."""
    splits = [task.split(split) for task in suite.tasks]
    return Calibration(
        split=split,
        ids=tuple(each.id for each in splits),
        sizes=tuple(len(each) for each in splits),
        images=lambda task, indices: backbone.prepare(splits[task].images[indices]),
        heads=tuple(task.head() for task in suite.tasks),
        tower=backbone.build,
    )


def known(task: str, available: Sequence[str], suite: str) -> str:
    """The task's name. Raises UserError listing what the suite has when there is no such task."""
    if task not in available:
        raise UserError(f"There is no task {task!r} in the suite {suite}. It has: {', '.join(available)}.")
    return task
