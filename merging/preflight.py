"""What can be refused before a weight is read."""

from collections.abc import Sequence

from merging.checkpoints import Checkpoint
from merging.errors import UserError


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises UserError for no task or a task named twice."""
    if not tasks:
        raise UserError("There is no task to merge: the list of tasks is empty. Name at least one.")
    twice = sorted({task for task in tasks if list(tasks).count(task) > 1})
    if twice:
        raise UserError(
            f"The task {some(twice)} is listed more than once in [{', '.join(tasks)}]. Name every task once."
        )


def check_experts(base: Checkpoint, experts: Sequence[Checkpoint], tasks: Sequence[str]) -> None:
    """Raises UserError unless every expert has exactly the base's keys and shapes."""
    check_tasks(tasks)
    if len(experts) != len(tasks):
        raise UserError(
            f"There are {len(experts)} experts for {len(tasks)} tasks ({', '.join(tasks)}). Give one expert per task."
        )
    want = base.specs()
    for task, expert in zip(tasks, experts, strict=True):
        have = expert.specs()
        where = f"The expert for {task} ({expert.name})"
        if missing := sorted(want.keys() - have.keys()):
            raise UserError(
                f"{where} lacks {some(missing)}, which the base {base.name} has. Use an expert tuned from this base."
            )
        if extra := sorted(have.keys() - want.keys()):
            raise UserError(
                f"{where} has {some(extra)}, which the base {base.name} lacks. Use an expert tuned from this base."
            )
        for key, spec in want.items():
            if have[key].shape != spec.shape:
                raise UserError(
                    f"{where} has {key} of shape {tuple(have[key].shape)}, "
                    f"the base {base.name} has {tuple(spec.shape)}. "
                    f"All experts must come from the same architecture as the base."
                )


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few of many names."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Raises UserError unless low <= value <= high (low < value with `open_low`)."""
    if not (low < value if open_low else low <= value) or not value <= high:
        bracket = "(" if open_low else "["
        raise UserError(f"{name}={value} is out of range: it must lie in {bracket}{low}, {high}].")
