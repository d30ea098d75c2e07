"""Figures of tasks against tasks: where gates send images, how alike task vectors are."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from launchers.results.frame import Line, Summary
from launchers.results.report.maps import paint
from launchers.results.report.style import COLUMN, PAGE, TEXT, Drawn, named, styled
from launchers.results.routing_figure import images_of, matrix

READABLE = 14  # tasks at most whose cells carry numbers in one column
ALIKE = 0.2  # cosine that the colours cover at least: task vectors of one base are usually below


@styled
def routing_map(summary: Summary, line: Line) -> Drawn:
    """True task x mean weight, in percent, mean over the line's seeds."""
    weights = 100 * matrix(line, summary.tasks, summary.unseen)
    figure = Figure(figsize=(COLUMN, COLUMN * len(weights) / len(summary.tasks)), layout="constrained")
    ax = figure.subplots()
    scale = Normalize(min(0.0, weights.min()), max(100.0, weights.max()))
    fits = len(summary.tasks) <= READABLE
    paint(ax, weights, scale, 0 if fits else None, TEXT if len(summary.tasks) <= 9 else TEXT - 2)
    name_ticks(ax, summary.tasks, images_of(summary))
    ax.set(aspect="equal", xlabel="mean weight of the part of, %", ylabel="images of")
    if not fits:
        figure.colorbar(ax.collections[0], ax=ax, label="%", shrink=0.6)
    right = line.routed_right
    assert right is not None
    deviation = "" if right.deviation is None else f" ±{100 * right.deviation:.1f}"
    told = f"Largest weight on the own task: {100 * right.mean:.1f}{deviation} % of the images."
    number = summary.lines.index(line) + 1
    return Drawn(f"routing-{line.rows[0].method}-{number}", named(summary, line), figure, told, COLUMN)


@styled
def similarity_maps(summary: Summary) -> list[Drawn]:
    """Cosines between task vectors, mean over seeds; one for every set of experts of other seeds or families."""
    found: dict[str, np.ndarray] = {}
    for line in summary.lines:
        if line.kind == "expert" and any(row.similarity for row in line.rows):
            cosines = similarity(line, summary.tasks)
            found.setdefault(str(cosines.tolist()), cosines)
    several = len(found) > 1
    return [
        _similarity(summary, cosines, str(number) if several else "")
        for number, cosines in enumerate(found.values(), 1)
    ]


def similarity(line: Line, tasks: tuple[str, ...]) -> np.ndarray:
    """Mean over the seeds that know it, in the order of `tasks`."""
    seeds = []
    for row in line.rows:
        if row.similarity:
            order = [row.tasks.index(task) for task in tasks]
            seeds.append(np.array(row.similarity, dtype=float)[np.ix_(order, order)])
    return np.mean(seeds, axis=0)


def _similarity(summary: Summary, cosines: np.ndarray, number: str) -> Drawn:
    count = len(summary.tasks)
    apart = ~np.eye(count, dtype=bool)
    others = cosines[apart] if count > 1 else np.zeros(1)
    wide = COLUMN if count <= 9 else PAGE
    figure = Figure(figsize=(wide, wide), layout="constrained")
    ax = figure.subplots()
    scale = Normalize(min(0.0, others.min()), max(ALIKE, others.max()))
    shown = np.where(apart, cosines, np.nan)  # each is 1 with itself
    paint(ax, shown, scale, 3 if np.abs(others).max() < 0.1 else 2, TEXT - 1 if wide == COLUMN else TEXT - 1.5)
    name_ticks(ax, summary.tasks)
    ax.set_aspect("equal")
    ax.set(xlabel="cosine of the task vector with that of", ylabel="task vector of")
    told = f"Mean {others.mean():.3f}" + (_largest(summary, cosines, apart) if count > 1 else "") + "."
    still = [task for task, place in zip(summary.tasks, cosines.diagonal(), strict=True) if place == 0]
    told += f" Experts that equal the base have no direction: {', '.join(still)}." if still else ""
    return Drawn(f"similarity{number}", "Similarity of task vectors, cosine", figure, told, wide)


def _largest(summary: Summary, cosines: np.ndarray, apart: np.ndarray) -> str:
    one, other = np.unravel_index(np.where(apart, cosines, -2).argmax(), cosines.shape)
    return f", largest {cosines[one, other]:.3f}: {summary.tasks[one]} and {summary.tasks[other]}"


def name_ticks(ax: Axes, columns: Sequence[str], lines: Sequence[str] | None = None) -> None:
    """Names in the middle of cells, those of the lines where they are not the columns'."""
    lines = columns if lines is None else lines
    ax.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(np.arange(len(lines)) + 0.5, lines)
