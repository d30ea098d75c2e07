"""What can be refused before a weight is merged, and where possible before one is read."""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from merging.checkpoints import Checkpoint, Spec, digest
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


def check_order(who: str, order: Sequence[str], tasks: Sequence[str]) -> None:
    """Raises UserError unless an order, an option of `who`, has every task once."""
    if sorted(order) != sorted(tasks):
        raise UserError(f"{who}: order has {', '.join(order)}, and the experts are {', '.join(tasks)}. Name each once.")


def check_experts(base: Checkpoint, experts: Sequence[Checkpoint], tasks: Sequence[str]) -> None:
    """Raises UserError unless every expert has exactly the base's keys and shapes."""
    check_tasks(tasks)
    if len(experts) != len(tasks):
        raise UserError(
            f"There are {len(experts)} experts for {len(tasks)} tasks ({', '.join(tasks)}). Give one expert per task."
        )
    for task, expert in zip(tasks, experts, strict=True):
        if problem := _misfit(expert.specs(), base.specs(), f"the base {base.name}"):
            types = model_type(expert), model_type(base)
            told = f" Their config.json name a {types[0]} and a {types[1]}." if len({None, *types}) > 2 else ""
            raise UserError(f"The expert for {task} ({expert.name}) {problem}{told}")


def model_type(checkpoint: Checkpoint) -> str | None:
    """What the config.json beside the first of its files says it is, such as llama."""
    for file in checkpoint.files[:1]:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return json.loads((file.parent / "config.json").read_text("utf-8")).get("model_type")
    return None


def _misfit(expert: Mapping[str, Spec], base: Mapping[str, Spec], name: str) -> str | None:
    """Why an expert cannot be merged with a base, None where it can."""
    if missing := sorted(base.keys() - expert.keys()):
        return f"lacks {some(missing)}, which {name} has. Use an expert tuned from this base."
    if extra := sorted(expert.keys() - base.keys()):
        return f"has {some(extra)}, which {name} lacks. Use an expert tuned from this base."
    for key, spec in base.items():
        if expert[key].shape != spec.shape:
            return (
                f"has {key} of shape {tuple(expert[key].shape)}, {name} has {tuple(spec.shape)}. All experts must come "
                f"from the same architecture as the base."
            )
        if expert[key].merged != spec.merged:
            return (
                f"has {key} as {_short(expert[key].dtype)}, {name} as {_short(spec.dtype)}. Numbers of these two kinds "
                f"mean different things: quantised weights have scales beside them. Convert the weights back to fp32, "
                f"bf16 or fp16 before they are merged."
            )
    return None


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
    kept = [key for key, spec in sorted(base.specs().items()) if not spec.merged]
    differ = [key for key in kept if any(digest(expert.tensor(key)) != digest(base.tensor(key)) for expert in experts)]
    for key in differ:
        shape, dtype = base.specs()[key]
        if len(shape) > 1 or dtype.is_floating_point or dtype.is_complex:
            raise UserError(
                f"{key} is of {_short(dtype)} and shape {tuple(shape)} in {base.name}, and differs between "
                f"the base and the experts. Such numbers are not merged: if they are quantised weights, convert them "
                f"back to fp32, bf16 or fp16 first; if they belong to one task, leave them out of all checkpoints."
            )
    return tuple(differ)


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
    if isinstance(experts, Mapping) and experts and not all(isinstance(value, Tensor) for value in experts.values()):
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
