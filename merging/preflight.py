"""What can be refused before a weight is merged, and where possible before one is read."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from merging.checkpoints import Checkpoint, raw_bytes
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
            if have[key].merged != spec.merged:
                raise UserError(
                    f"{where} has {key} as {_short(have[key].dtype)}, the base {base.name} as {_short(spec.dtype)}. "
                    f"Numbers of these two kinds mean different things: quantised weights have scales beside them. "
                    f"Convert the weights back to fp32, bf16 or fp16 before they are merged."
                )


def check_finite(tau: Tensor, key: str, who: str, expert: Checkpoint, base: Checkpoint) -> None:
    """Raises UserError, naming the parameter and both files, for a difference that holds NaN or Inf."""
    if not tau.sum().isfinite() and not tau.isfinite().all():
        raise UserError(
            f"{key} is not finite (NaN or Inf) in {who} ({expert.name}) or in the base ({base.name}). Its training "
            f"diverged or its file is damaged: use another checkpoint."
        )


def differing(base: Checkpoint, experts: Sequence[Checkpoint]) -> tuple[str, ...]:
    """Keys of tensors that are not merged (integers, booleans, float8, complex) and differ between the checkpoints.

    The base's are kept: right for counters and positions, which have at most one axis. Raises UserError for a matrix of
    integers that differs, and for any other kind: those are quantised weights or tables of indices. Reads these tensors
    alone, and none that merges.
    """
    found = []
    for key, spec in sorted(base.specs().items()):
        if spec.merged or all(same(base, expert, key) for expert in experts):
            continue
        if len(spec.shape) > 1 or spec.dtype.is_floating_point or spec.dtype.is_complex:
            raise UserError(
                f"{key} is of {_short(spec.dtype)} and shape {tuple(spec.shape)} in {base.name}, and differs between "
                f"the base and the experts. Such numbers are not merged: if they are quantised weights, convert them "
                f"back to fp32, bf16 or fp16 first; if they belong to one task, leave them out of all checkpoints."
            )
        found.append(key)
    return tuple(found)


def same(first: Checkpoint, second: Checkpoint, key: str) -> bool:
    """Whether two checkpoints have the same type and bytes under a key."""
    one, other = first.tensor(key), second.tensor(key)
    return one.dtype == other.dtype and raw_bytes(one) == raw_bytes(other)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_method(method: object) -> None:
    """Raises UserError for what is no method: its class, its name, a model."""
    if isinstance(method, type):
        name = method.__name__
        raise UserError(f"The method is given as the class {name}, not as an object of it. Write merge({name}(), ...).")
    if isinstance(method, nn.Module) or not callable(method):
        raise UserError(
            f"The method is given as a {type(method).__name__}. Give an object of merging.methods, such as "
            f"merging.methods.Ties(), or a function of Experts: merge(method, base, experts)."
        )


def listed(experts: object, tasks: object) -> tuple[list, list | None]:
    """Experts and tasks as lists. Raises UserError for one expert or one name in the place of a list."""
    what = f"The experts are given as a {type(experts).__name__}, not as a list of them."
    if isinstance(experts, Mapping) and experts and not all(isinstance(each, Tensor) for each in experts.values()):
        raise UserError(f"{what} Write experts=list(found.values()), tasks=list(found).")
    if isinstance(experts, nn.Module):
        raise UserError(f"{what} Give the weights of each in a list: [module.state_dict(), ...].")
    if isinstance(experts, str | bytes | Path | Mapping | Tensor) or not isinstance(experts, Iterable):
        raise UserError(f"{what} Put it in a list, also if there is a single one: [expert].")
    if isinstance(tasks, str | bytes | Mapping) or not (tasks is None or isinstance(tasks, Iterable)):
        raise UserError(
            f"The tasks are given as {tasks!r}, not as a list of names. Write one name per expert: [name, ...]."
        )
    names = None if tasks is None else list(tasks)
    if wrong := [name for name in names or () if not isinstance(name, str)]:
        raise UserError(f"The task {wrong[0]!r} is a {type(wrong[0]).__name__}. Names of tasks are strings.")
    return list(experts), names


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few of many names."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Raises UserError unless low <= value <= high (low < value with `open_low`)."""
    if not (low < value if open_low else low <= value) or not value <= high:
        bracket = "(" if open_low else "["
        raise UserError(f"{name}={value} is out of range: it must lie in {bracket}{low}, {high}].")
