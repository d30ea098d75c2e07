"""How the coefficient of a merge is chosen: as the method has it, or the best of a list on validation."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from merging.errors import UserError
from merging.fit.black_box import mean, signed
from merging.merged import Merged
from tasks.evaluate import Grid, Scores, answer
from tasks.journal import NOWHERE, Journal
from tasks.score import normalise
from tasks.split import count_of
from tasks.task import reading

log = logging.getLogger(__name__)
Criterion = Literal["norm", "mean"]


@dataclass(frozen=True)
class Chosen:
    """A merge at its coefficient; after a search, what it scored on the way and what was searched (for the row)."""

    merged: Merged
    validation: Scores | None = None
    search: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fixed:
    """Keep the method's own scale."""

    source: str = "fixed"

    def choose(
        self, merged: Merged, grid: Grid, experts: Callable[[str], Scores], journal: Journal = NOWHERE
    ) -> Chosen:
        return Chosen(merged)


@dataclass(frozen=True)
class Search:
    """The best of `scales` on `split`, the smallest of equals; a method without a coefficient stays as it is.

    criterion: "norm", the mean over tasks of score / the expert's (as in the code of TALL-masks, TSV-M and Iso), or
    "mean", of plain scores. routed: whether the coefficient of a merge with task-specific parts is searched too, which
    the true task then mixes, before any gate is trained; parts that depend on it (Twin's) are made anew for each.
    seconds: where the whole list would take longer, about, every third scale is scored, then those around the best
    until both neighbours are lower: exact for a curve with one clean peak alone, so the row says it. null: no limit.
    """

    scales: Sequence[float]
    criterion: Criterion = "norm"
    split: Literal["train", "val", "calibration", "test"] = "val"
    routed: bool = False
    seconds: float | None = 60.0

    def __post_init__(self) -> None:
        if not self.scales:
            raise UserError("scale.scales is empty. List at least one coefficient, such as scale.scales=[0.3].")
        if odd := [scale for scale in self.scales if not math.isfinite(scale)]:
            raise UserError(f"scale.scales lists {odd[0]}, which is no finite number.")
        if self.split == "test":
            raise UserError("scale.split=test would choose on the split that is reported. Choose on val.")
        if self.criterion not in get_args(Criterion):
            raise UserError(
                f"scale.criterion={self.criterion!r} is unknown. Choose one of {', '.join(get_args(Criterion))}."
            )

    @property
    def source(self) -> str:
        return f"search:{self.split}"

    def choose(
        self, merged: Merged, grid: Grid, experts: Callable[[str], Scores], journal: Journal = NOWHERE
    ) -> Chosen:
        """The merge at the best scale; `experts` tells what the experts score on a split.

        Raises UserError, before any scale is scored, where the criterion would divide by nothing.
        """
        if merged.scale is None or (merged.deltas and not self.routed):
            if self.routed:
                log.warning("scale.routed=true changes nothing here: this merge has no coefficient to search")
            return Chosen(merged)
        references = experts(self.split) if self.criterion == "norm" else None
        if undefined := normalise(references or {}, references or {}).undefined:
            task, why = next(iter(undefined.items()))
            raise UserError(
                f"scale.criterion=norm divides by the scores of the experts on {self.split}, and for {task} {why}. "
                f"Check that expert, or set scale.criterion=mean."
            )
        value = lambda scores: worth(scores, references)  # noqa: E731
        scales, tried = sorted(set(self.scales)), {}

        def ask(some: Sequence[float]) -> None:
            tried.update(zip(some, grid.at_scales(merged, some, self.split, journal), strict=True))

        if self._affords(len(scales), merged, grid, journal):
            ask(scales)
        else:
            coarse(scales, ask, lambda scale: value(tried[scale]) if scale in tried else None)
        best = max(sorted(tried), key=lambda scale: value(tried[scale]))
        search = {"criterion": self.criterion, "scales": scales, "scored": len(tried)}
        return Chosen(merged.scaled(best), tried[best], search)

    def _affords(self, count: int, merged: Merged, grid: Grid, journal: Journal) -> bool:
        """Whether all scales are scored; a search that was killed does not decide again."""
        limit = math.inf if self.seconds is None else self.seconds

        def decide() -> dict[str, torch.Tensor]:
            needed = count * seconds(grid, merged, self.split)
            if needed > limit:
                log.info("all %d scales would take about %.0f s, above scale.seconds=%g: every third is scored, then "
                         "those around the best; the row says so", count, needed, limit)  # fmt: skip
            return {"all": torch.tensor(needed <= limit)}

        return limit == math.inf or bool(journal.tensors("search", decide)["all"])


def worth(scores: Scores, references: Scores | None) -> float:
    """Mean score, relative to the references if there are any; of a metric whose lower values are better, its negative.

    To 12 digits, so that the order of a sum decides nothing.
    """
    if references is not None:
        return round(normalise(scores, references).value or 0.0, 12)
    return mean(signed(scores))


def coarse(scales: Sequence[float], ask: Callable[[Sequence[float]], None], known: Callable[[float], float | None]):
    """Ask every third scale, then the neighbours of the best so far until both are lower."""
    new = scales[min(1, len(scales) - 1) :: 3]
    while new:
        ask(new)
        values = [known(scale) for scale in scales]
        best = values.index(max(value for value in values if value is not None))
        new = [scales[i] for i in (best - 1, best + 1) if 0 <= i < len(scales) and values[i] is None]


def seconds(grid: Grid, merged: Merged, split: str) -> float:
    """About how long one more coefficient takes on a split, from a batch of the first task.

    On a CPU in its own time, so that other processes play no role.
    """
    remade = 0.0
    if merged.remade is not None and merged.scale is not None:
        begin = time.process_time()
        merged.remade(merged.scale)
        remade = (time.process_time() - begin) / torch.get_num_threads()
    (sample,) = grid.each(lambda _: _sample(grid, split), 1)
    return remade + sample * sum(len(task.split(split)) for task in grid.suite.tasks) / grid.engine.workers


def _sample(grid: Grid, split: str) -> float:
    batch = next(grid.engine.stream(grid.suite.tasks[0].split(split).inputs), None)
    if batch is None:
        return 0.0
    with grid.module() as module:
        prepare, read, _ = reading(grid.backbone, grid.suite.tasks[0])
        inputs = prepare(batch)
        answer(module, inputs, read=read, engine=grid.engine)  # the first time is slower
        begin = grid.engine.clock()
        answer(module, inputs, read=read, engine=grid.engine)
        return (grid.engine.clock() - begin) / count_of(batch)
