"""What is measured: suites of tasks, their splits and their frozen heads."""

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from merging.backbones.tower import Backbone
from merging.calibration import Calibration
from merging.checkpoints import StateDict
from merging.errors import UserError
from merging.preflight import check_tasks, some

KEPT = ("base", "mean", "norm")  # what rows and tables have beside the tasks
CPU = torch.device("cpu")
SPLITS = ("train", "val", "calibration", "test")  # calibration is used without its labels


@dataclass(frozen=True)
class Split:
    """Images of one task that serve one purpose."""

    name: str
    images: Tensor  # uint8 [N, 3, H, W]
    labels: Tensor  # int64 [N]
    stored_id: str | None = None  # the fingerprint where it is known, so that images on disk need not be read for it

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Images per task."""
        return (len(self),)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images [n, 3, H, W] and labels [n]; only these are read."""
        return self.images[indices], self.labels[indices]

    @cached_property
    def id(self) -> str:
        """Fingerprint: sha256 over images and labels, the first 16 hex digits."""
        if self.stored_id is not None:
            return self.stored_id
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
    """Tasks in a fixed order: those whose experts are merged, and unseen ones that are only scored.

    Raises UserError when there is none to merge, or one twice.
    """

    name: str
    tasks: tuple[Task, ...]
    held_out: tuple[Task, ...] = ()

    def __post_init__(self) -> None:
        if kept := [task.name for task in self.every if task.name in KEPT]:
            raise UserError(
                f"A task cannot be called {kept[0]}: rows and tables have {', '.join(KEPT)} beside the tasks. Give it "
                f"another name."
            )
        check_tasks(self.names)
        check_tasks([task.name for task in self.every])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    @property
    def every(self) -> tuple[Task, ...]:
        """All tasks that are scored."""
        return (*self.tasks, *self.held_out)

    @property
    def unseen(self) -> "Suite":
        """The suite turned round: the held-out tasks as those with experts."""
        return replace(self, tasks=self.held_out, held_out=self.tasks)


def divided(name: str, tasks: Sequence[Task], held_out: Sequence[str]) -> Suite:
    """The suite of all tasks but those named by `held_out`, which are scored only.

    Raises UserError for a name that is no task, or listed twice, and where no task is left.
    """
    names = [task.name for task in tasks]
    if unknown := [task for task in held_out if task not in names]:
        raise UserError(f"suite.held_out names {some(unknown)}, no task of the suite {name}: {', '.join(names)}.")
    if len(set(held_out)) < len(held_out):
        raise UserError(f"suite.held_out=[{', '.join(held_out)}] lists a task more than once. Name every task once.")
    if names and set(names) == set(held_out):
        raise UserError(f"suite.held_out holds out every task of the suite {name}: no expert is left to merge.")
    merged, unseen = ([task for task in tasks if (task.name in held_out) == out] for out in (False, True))
    return Suite(name, tuple(merged), tuple(unseen))


def content(task: Task, what: str) -> str:
    """Id of everything that decides a split of a task, or its "head"; never a path.

    A task that knows it without reading its images says so by a method of this name; else they are read now.
    """
    own = getattr(task, "content", None)
    if own is not None:
        return own(what)
    return StateDict({"head": task.head()}).id[:16] if what == "head" else task.split(what).id


def contents(suite: Suite, scored: str, others: Sequence[str] = ()) -> dict[str, dict[str, str]]:
    """Task -> ids of its head, of the split that is scored and, where it has an expert, of the others that are read."""
    whole, part = ("head", scored, *others), ("head", scored)
    read = [(task, whole) for task in suite.tasks] + [(task, part) for task in suite.held_out]
    return {task.name: {what: content(task, what) for what in names} for task, names in read}


def remarks(suite: Suite, scored: Mapping[str, Split], chosen_on: Iterable[str] = ()) -> list[str]:
    """What a reader of accuracies should know of the images: how they were read, absent classes, equal tasks.

    chosen_on: the splits, beside the scored one, on which a coefficient was chosen.
    """
    said = [note for task in suite.every if hasattr(task, "notes") for note in task.notes()]  # type: ignore[attr-defined]
    said += [note for task in suite.every if (note := absent(task, scored[task.name]))]
    others = [(task, task.split(split)) for split in chosen_on for task in suite.tasks]
    said += [note for task, split in others if split.name != scored[task.name].name and (note := absent(task, split))]
    owners: dict[str, str] = {}
    for name, split in scored.items():
        if (first := owners.setdefault(split.id, name)) != name:
            said.append(f"{first} and {name} are scored on the same images.")
    return said


def absent(task: Task, split: Split) -> str | None:
    """What is to be said where classes have no image in the split, else None."""
    there = set(split.labels.tolist())
    missing = [name for index, name in enumerate(task.classes) if index not in there]
    if not missing:
        return None
    return f"{task.name}: {split.name} has no image of {len(missing)} of {len(task.classes)} classes ({some(missing)})."


def calibration(suite: Suite, backbone: Backbone, split: str, device: torch.device = CPU) -> Calibration:
    """The images of one split of every task, without their labels; batches of them lie on the device."""
    splits = [task.split(split) for task in suite.tasks]
    return Calibration(
        split=split,
        ids=tuple(each.id for each in splits),
        sizes=tuple(len(each) for each in splits),
        images=lambda task, indices: backbone.prepare(splits[task].images[indices].to(device)),
        heads=tuple(task.head().to(device) for task in suite.tasks),
        tower=backbone.build,
        backbone=backbone.identity(),
        device=device,
    )


def gather(splits: Sequence[Split], indices: Tensor) -> Tensor:
    """Images [n, 3, H, W] of several splits counted through, in the order of `indices`; only these are read."""
    ends = torch.tensor([len(split) for split in splits]).cumsum(0)
    owners = torch.bucketize(indices, ends, right=True)
    images = splits[0].images.new_empty((len(indices), *splits[0].images.shape[1:]))
    for owner in owners.unique().tolist():
        mine = owners == owner
        images[mine] = splits[owner].images[indices[mine] - ends[owner] + len(splits[owner])]
    return images


def unread(option: str, given: Iterable[str], tasks: Sequence[str]) -> list[str]:
    """The names in a mapping by task that no task reads.

    Raises UserError for one that is nearly the name of a task which the mapping lacks: it is misspelt.
    """
    names = list(given)
    others = [name for name in names if name not in tasks]
    lacking = {task.casefold(): task for task in tasks if task not in names}
    for name in others:
        if near := difflib.get_close_matches(name.casefold(), lacking, 1, 0.75):
            task = lacking[near[0]]
            raise UserError(
                f"{option}.{name} is read by no task: there is {task}, and no {name}. Write {option}.{task}, or remove "
                f"the entry."
            )
    return others


def known(task: str, available: Sequence[str], suite: str) -> str:
    """The task's name. Raises UserError listing what the suite has when there is no such task."""
    if task not in available:
        raise UserError(f"There is no task {task!r} in the suite {suite}. It has: {', '.join(available)}.")
    return task
