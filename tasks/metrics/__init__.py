"""Metrics: a subclass of Metric in a file of this package is known by its name.

A task names one metric or several: the first is its score, the others are parts of it.
"""

import pkgutil
from collections.abc import Sequence
from functools import cache
from importlib import import_module

from torch import Tensor

from merging.errors import UserError
from tasks.metrics.metric import INVALID, Metric
from tasks.score import Score

__all__ = ["INVALID", "Metric", "measure", "metric", "metrics"]


@cache
def metrics() -> dict[str, type[Metric]]:
    """All metrics by name."""
    modules = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    members = [member for module in modules for member in vars(module).values() if isinstance(member, type)]
    return {member.name: member for member in members if issubclass(member, Metric) and hasattr(member, "name")}


def metric(name: str) -> Metric:
    """The metric of that name. Raises UserError for one that there is not."""
    if name not in metrics():
        raise UserError(f"There is no metric {name!r}. Choose one of {', '.join(sorted(metrics()))}.")
    return metrics()[name]()


def measure(names: Sequence[str], task: str, predicted: Tensor, labels: Tensor, classes: Sequence[str] = ()) -> Score:
    """The score of predictions; the first metric is its value, those behind are its parts.

    Raises UserError for a metric that is not defined for the task.
    """
    chosen = [metric(name) for name in names]
    for one in chosen:
        if why := one.refusal(labels, classes):
            raise UserError(f"The metric {one.name} is not defined for the task {task}: {why}.")
    first = chosen[0]
    return Score(
        metric=first.name,
        value=first.value(predicted, labels),
        count=len(labels),
        standard_error=first.standard_error(predicted, labels),
        higher_is_better=first.higher_is_better,
        parts={part.name: part.value(predicted, labels) for part in chosen[1:]},
        notes=[note for one in chosen for note in one.notes(predicted, labels)],
    )
