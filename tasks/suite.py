"""What is measured: suites of tasks, their splits and their frozen heads."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch

from merging.backbones.base import Backbone
from merging.backbones.language import Asked
from merging.calibration import Calibration
from merging.errors import UserError
from merging.preflight import check_tasks, some
from tasks.split import SPLITS, Split, Texts, mapped, take
from tasks.task import Task, head_id, reading

KEPT = ("base", "mean", "norm")  # what rows and tables have beside the tasks
CPU = torch.device("cpu")


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


def no_tasks() -> Suite:
    """What suite=none stands for. Raises UserError: only a command that merges and saves does without tasks."""
    raise UserError("suite=none has no tasks, with which only `duet` merges and saves. Choose a suite.")


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


def sized(name: str, sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """How many samples every split of the suite has. Raises UserError for a name that is no split and sizes below 1."""
    if extra := sorted(set(sizes) - set(SPLITS)):
        raise UserError(f"suite.sizes has {', '.join(extra)}, which is no split. Splits are {', '.join(SPLITS)}.")
    for split in SPLITS:
        if sizes.get(split, 0) < 1:
            raise UserError(
                f"suite.sizes.{split}={sizes.get(split)} leaves the split {split} of {name} empty. "
                f"Give at least 1 sample."
            )
    return tuple((split, int(sizes[split])) for split in SPLITS)


def content(task: Task, what: str) -> str:
    """Id of everything that decides a split of a task, or its "head"; never a path.

    A task that knows it without reading its samples says so by a method of this name; else they are read now.
    """
    if hasattr(task, "content"):
        return task.content(what)  # type: ignore[attr-defined]
    return head_id(task)[:16] if what == "head" else task.split(what).id


def contents(suite: Suite, scored: str, others: Sequence[str] = ()) -> dict[str, dict[str, str]]:
    """Task -> ids of its head, of the split that is scored and, where it has an expert, of the others that are read."""
    whole, part = ("head", scored, *others), ("head", scored)
    read = [(task, whole) for task in suite.tasks] + [(task, part) for task in suite.held_out]
    return {task.name: {what: content(task, what) for what in names} for task, names in read}


def remarks(
    suite: Suite, scored: Mapping[str, Split], chosen_on: Iterable[str] = (), backbone: Backbone | None = None
) -> list[str]:
    """What a reader of scores should know of the samples: how they were read, absent classes, equal tasks.

    chosen_on: the splits, beside the scored one, on which a coefficient was chosen. backbone: what reads them.
    """
    notes = [note for task in suite.every if hasattr(task, "notes") for note in task.notes()]  # type: ignore[attr-defined]
    notes += [note for task in suite.every if (note := absent(task, scored[task.name]))]
    notes += [note for task in suite.every if (note := cut(task, scored[task.name], backbone))]
    others = [(task, task.split(split)) for split in chosen_on for task in suite.tasks]
    notes += [note for task, split in others if split.name != scored[task.name].name and (note := absent(task, split))]
    owners: dict[str, str] = {}
    for name, split in scored.items():
        if (first := owners.setdefault(split.id, name)) != name:
            notes.append(f"{first} and {name} are scored on the same samples.")
    return notes


def cut(task: Task, split: Split, backbone: Backbone | None) -> str | None:
    """The sentence on texts that are longer than the backbone reads, None where none is."""
    if (
        not isinstance(split.inputs, Texts) or not hasattr(backbone, "cut") or hasattr(task, "reading")
    ):  # says so itself
        return None
    count = backbone.cut(split.inputs.items)  # type: ignore[union-attr]
    length = backbone.tokens  # type: ignore[union-attr]
    return f"{task.name}: {count} of {len(split)} texts of {split.name} are cut at {length} tokens." if count else None


def absent(task: Task, split: Split) -> str | None:
    """The sentence on classes that have no sample in the split, None where all have."""
    present = set(split.labels.tolist()) if split.labels.ndim == 1 else set()
    missing = [name for index, name in enumerate(task.classes) if index not in present]
    if not missing:
        return None
    return (
        f"{task.name}: {split.name} has no sample of {len(missing)} of {len(task.classes)} classes ({some(missing)})."
    )


def calibration(
    suite: Suite, backbone: Backbone, split: str, device: torch.device = CPU, precision: str = "fp32"
) -> Calibration:
    """The inputs of one split of every task, without their labels; batches of them lie on the device."""
    splits, readings = [task.split(split) for task in suite.tasks], [reading(backbone, task) for task in suite.tasks]
    return Calibration(
        split=split,
        ids=tuple(samples.id for samples in splits),
        sizes=tuple(len(samples) for samples in splits),
        inputs=lambda task, indices: readings[task].prepare(
            mapped(lambda tensor: tensor.to(device), take(splits[task].inputs, indices))
        ),
        heads=tuple(None if (head := task.head()) is None else deepcopy(head).to(device) for task in suite.tasks),
        head_ids=tuple(head_id(task) for task in suite.tasks),
        read=lambda module, inputs: (
            inputs.read(module) if isinstance(inputs, Asked) else backbone.features(module, inputs)
        ),
        tower=backbone.build,
        backbone=backbone.identity(),
        device=device,
        precision=precision,
    )


def unread(option: str, mapping: Iterable[str], tasks: Sequence[str]) -> list[str]:
    """The names in a mapping by task that no task reads.

    Raises UserError for one that is nearly the name of a task which the mapping lacks: it is misspelt.
    """
    names = list(mapping)
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
