"""What is measured: tasks with labelled samples, a head of their own and a metric."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from merging.backbones.base import Backbone
from merging.checkpoints import StateDict
from merging.correction import Correction, Corrections
from merging.errors import UserError
from tasks.heads.head import Given, HeadSource, ZeroShot, check_head
from tasks.metrics import INVALID, measure, metric
from tasks.score import Score
from tasks.split import Inputs, Split, Uncached

Predictions = Mapping[str, Tensor]  # by name, samples along the first axis
Predict = Callable[[Split], Predictions]
Read = Callable[[nn.Module, Any], Tensor]  # what a model answers to inputs, [B, ...]


class Reading(NamedTuple):
    """How a task asks a model: inputs of a split -> what the model takes -> its answers.

    notes: what is to be said of all inputs of a split. Raises UserError for those that cannot be asked.
    """

    prepare: Callable[[Any], Any]
    read: Read
    notes: Callable[[Inputs], list[str]] = lambda inputs: []


class Task(Protocol):
    """One task: a model is run on a split, what it answers is decided sample by sample, and all of it is scored.

    A task with a method run(module, backbone, engine, samples, page) asks the model itself and gives its predictions.
    """

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> Sequence[str]: ...  # in label order; empty where labels are numbers or texts
    def split(self, name: str) -> Split: ...
    def head(self) -> nn.Module | None: ...  # features [N, D] -> outputs; never merged; None: the model's own outputs
    def decide(self, outputs: Tensor) -> Predictions: ...  # what is kept of the outputs of a batch
    def evaluate(self, predict: Predict, split: str) -> Score: ...

    # and, of a model that is neither read by a head nor by its outputs: reading(backbone) -> Reading


class Data(Protocol):
    """The labelled samples of a task."""

    @property
    def classes(self) -> Sequence[str]: ...
    def split(self, name: str) -> Split: ...


@dataclass(frozen=True)
class LabelledTask(Uncached):
    """A task whose predictions are compared with labels: classification, regression, exact answers.

    metrics: the first is the score, the others are parts of it. Raises UserError for a head with another number of
    classes than the task, and for a metric that is not defined for the task.
    """

    name: str
    data: Any  # Data, which may also have content(split), notes() and needs(splits)
    heads: HeadSource | None = None
    metrics: Sequence[str] = ("accuracy",)

    @property
    def classes(self) -> Sequence[str]:
        return self.data.classes

    def split(self, name: str) -> Split:
        return self.data.split(name)

    def head(self) -> nn.Module | None:
        return self._head

    @cached_property
    def _head(self) -> nn.Module | None:
        if self.heads is None:
            return None
        head = self.heads.open(self.name, self.classes)
        check_head(self.name, self.classes, head)
        return head

    def decide(self, outputs: Tensor) -> Predictions:
        """The class of the highest logit, INVALID where one is not finite; of a regression the number itself."""
        if metric(self.metrics[0]).compares == "numbers":
            return {"predicted": outputs.float().reshape(len(outputs))}
        return {"predicted": torch.where(outputs.isfinite().all(-1), outputs.argmax(-1), INVALID)}

    def evaluate(self, predict: Predict, split: str) -> Score:
        samples = self.split(split)
        return measure(self.metrics, self.name, predict(samples)["predicted"], samples.labels, self.classes)

    def content(self, what: str) -> str:
        """Id of everything that decides a split, or the "head"; never a path."""
        if what == "head":
            return "none" if self.heads is None else self.heads.content(self.name, self.classes)
        return self.data.content(what) if hasattr(self.data, "content") else self.split(what).id

    @property
    def is_local(self) -> bool:
        """Whether nothing of it is asked of the Hub."""
        return getattr(self.data, "is_local", True)

    def notes(self) -> list[str]:
        """What a reader of the scores should know of how the samples were read."""
        return [f"{self.name}: {note}." for note in self.data.notes()] if hasattr(self.data, "notes") else []


@dataclass(frozen=True)
class Arrays:
    """Samples in memory: split -> inputs and labels."""

    splits: Mapping[str, tuple[Inputs, Tensor]]
    classes: Sequence[str] = ()

    def split(self, name: str) -> Split:
        """Raises KeyError for a split that was not given."""
        return Split(name, *self.splits[name])


def array_task(
    name: str,
    splits: Mapping[str, tuple[Inputs, Tensor]],
    head: nn.Module | None = None,
    metrics: Sequence[str] = ("accuracy",),
    classes: Sequence[str] = (),
) -> LabelledTask:
    """A task of tensors: split -> (inputs, labels), with a head that maps features [N, D] to outputs [N, C]."""
    return LabelledTask(name, Arrays(splits, tuple(classes)), None if head is None else Given(head), tuple(metrics))


@dataclass(frozen=True)
class Corrected:
    """A task whose head sees corrected features."""

    task: Any
    correction: Correction

    def head(self) -> nn.Module:
        """The correction, and behind it the head."""
        return self._head

    @cached_property
    def _head(self) -> nn.Module:
        head = None if hasattr(self.task, "run") else self.task.head()
        if head is None:
            raise UserError(
                f"{self.task.name} has no head that reads features, and this merge corrects features in front of a "
                f"head. Leave the task out, or merge by a method that changes weights."
            )
        return nn.Sequential(copy.deepcopy(self.correction), head)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)


def corrected(tasks: Sequence[Any], corrections: Corrections) -> list[Any]:
    """The tasks, those that have a correction with it."""
    return [Corrected(task, corrections[task.name]) if task.name in corrections else task for task in tasks]


def reading(backbone: Backbone, task: Any) -> Reading:
    """The task's own way, else features for its head, or the model's outputs where it has none."""
    if hasattr(task, "reading"):
        return task.reading(backbone)
    return Reading(backbone.prepare, backbone.outputs if task.head() is None else backbone.features)


def head_id(task: Any) -> str:
    """Content of the head that is in use, or of how a model is asked without one."""
    head = task.head()
    if head is None:
        return task.content("head") if hasattr(task, "reading") else "none"
    state = {"head": head.weight} if isinstance(head, ZeroShot) else dict(head.state_dict())
    return StateDict(state).id
