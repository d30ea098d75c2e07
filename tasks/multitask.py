"""All tasks of a suite as one, for the model that is trained on all of them: the reference that merging spares."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from tasks.heads.head import ZeroShot
from tasks.split import Inputs, Split, gather
from tasks.task import Task

NAME = "multitask"
TASKS = "tasks"  # a fact in the file of such a model: the names of its tasks


@dataclass(frozen=True)
class Mixture:
    """Splits of several tasks counted through; their labels too: behind the first task's classes come the second's."""

    splits: tuple[Split, ...]
    classes: tuple[int, ...]  # per task

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples per task."""
        return tuple(map(len, self.splits))

    @cached_property
    def id(self) -> str:
        """Fingerprint of those of the splits, 16 hex digits."""
        return hashlib.sha256(" ".join(split.id for split in self.splits).encode()).hexdigest()[:16]

    @cached_property
    def labels(self) -> Tensor:
        """int64 [N], counted through the classes of all tasks."""
        firsts = torch.tensor([0, *self.classes[:-1]]).cumsum(0)
        return torch.cat([split.labels + first for split, first in zip(self.splits, firsts, strict=True)])

    def take(self, indices: Tensor) -> tuple[Inputs, Tensor]:
        """Inputs and labels [n] of some samples; only these are read."""
        return gather(self.splits, indices), self.labels[indices]


@dataclass(frozen=True)
class Together:
    """The tasks as one, their heads one below the other. A sample still chooses among its own task's classes alone."""

    tasks: tuple[Task, ...]
    name: str = NAME

    def split(self, name: str) -> Mixture:
        """The samples of all tasks."""
        return Mixture(tuple(task.split(name) for task in self.tasks), tuple(len(task.classes) for task in self.tasks))

    def head(self) -> nn.Module:
        """Features [N, D] -> outputs for the classes of all tasks."""
        heads = [task.head() for task in self.tasks]
        if all(isinstance(head, ZeroShot) for head in heads):
            return ZeroShot(torch.cat([head.weight for head in heads]))  # type: ignore[union-attr]
        return Joined(heads)  # type: ignore[arg-type]

    def owners(self) -> Tensor:
        """The task of every class, int64 [classes of all tasks]."""
        sizes = torch.tensor([len(task.classes) for task in self.tasks])
        return torch.repeat_interleave(torch.arange(len(sizes)), sizes)


class Joined(nn.ModuleList):
    """The outputs of several heads side by side."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([head(features) for head in self], -1)
