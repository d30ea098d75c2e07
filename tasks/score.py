"""How good a model is on a task: one number, its metric and its standard error."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from merging.errors import UserError

if TYPE_CHECKING:  # rows are read without torch
    from torch import Tensor

RESAMPLES = 1000
NUMBERS = 1 << 20  # indices of resamples that are made at once


@dataclass(frozen=True)
class Score:
    """The score of one model on one split of one task.

    value: in the metric's own unit (accuracy in [0, 1]). count: samples. standard_error: of the value, over samples.
    parts: further metrics of the same predictions. notes: what a reader should know, such as a constant prediction.
    Raises UserError for a value that is NaN or infinite.
    """

    metric: str
    value: float
    count: int
    standard_error: float
    higher_is_better: bool = True
    parts: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        numbers = {self.metric: self.value, "its standard error": self.standard_error, **self.parts}
        if odd := [name for name, number in numbers.items() if not math.isfinite(number)]:
            raise UserError(
                f"The score {self.metric} over {self.count} samples has no finite value: {odd[0]} is "
                f"{numbers[odd[0]]}. Check the predictions of the model and whether the metric is defined for the task."
            )
        object.__setattr__(self, "notes", tuple(self.notes))
        object.__setattr__(self, "parts", dict(self.parts))

    def with_notes(self, notes: Sequence[str]) -> "Score":
        """The same with further notes."""
        return replace(self, notes=(*self.notes, *notes)) if notes else self

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return {**asdict(self), "notes": list(self.notes)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Score":
        """The score that `to_json` wrote."""
        return cls(**stored)


class Normalised(NamedTuple):
    """Mean over tasks of score / expert score; `undefined` names the tasks that are left out, and why."""

    value: float | None  # None where no task is left
    undefined: dict[str, str]


def accuracy(right: int, count: int) -> Score:
    """The share of right answers, with the standard error of a binomial proportion."""
    value = right / count
    return Score("accuracy", value, count, math.sqrt(value * (1 - value) / count))


def normalise(scores: Mapping[str, Score], experts: Mapping[str, Score]) -> Normalised:
    """The normalised score over the tasks of `scores`; undefined where no ratio says how much of an expert is kept."""
    reasons = {task: why for task, score in scores.items() if (why := _no_ratio(score, experts.get(task)))}
    ratios = [score.value / experts[task].value for task, score in scores.items() if task not in reasons]
    return Normalised(math.fsum(ratios) / len(ratios) if ratios else None, reasons)


def _no_ratio(score: Score, expert: Score | None) -> str | None:
    if expert is None:
        return "no expert was scored"
    if expert.metric != score.metric:
        return f"the expert's metric is {expert.metric}"
    if not score.higher_is_better:
        return f"lower {score.metric} is better"
    return None if expert.value > 0 else f"the expert's {score.metric} is {expert.value:g}, not above 0"


def bootstrap(statistic: "Callable[[Tensor], Iterable[float]]", count: int, seed: int = 0) -> float:
    """Standard error of `statistic`, from 1,000 seeded resamples with replacement.

    The statistic maps sample indices [R, count] to R numbers, some resamples at a time. One for which it is undefined
    (NaN) is left out (Efron, 1979).
    """
    import torch

    random, rows = torch.Generator().manual_seed(seed), max(1, NUMBERS // count)
    sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    draws = (torch.randint(count, (size, count), generator=random) for size in sizes)
    values = [float(value) for some in draws for value in statistic(some)]
    finite = list(filter(math.isfinite, values))
    return stdev(finite) if len(finite) > 1 else math.nan
