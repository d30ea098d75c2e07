"""Accuracy against bytes: the two numbers of a run that a search is told, and `python -m launchers.pareto [paths]`."""

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from launchers import rows
from launchers.results.frame import Line, Summary, summarise
from launchers.results.table import RESULTS, rows_of
from launchers.rows import Row
from merging.errors import UserError
from merging.files import write_atomically

if TYPE_CHECKING:  # every run has its two numbers, a drawing alone needs matplotlib
    from matplotlib.axes import Axes

MB = 1e6
MARKERS = "osD^vPX*<>hp"


class Point(NamedTuple):
    """A merge as a search sees it: normalised accuracy (plain without experts), to be high; bytes, to be low."""

    accuracy: float
    stored_bytes: float


def objectives(files: Sequence[str | Path]) -> Point | None:
    """Those of the first row file, whose references are among the others; None where it is missing or failed."""
    found = rows.read([file for file in files if Path(file).exists()])
    wanted = Path(files[0]).stem if files else ""
    lines = chain.from_iterable(summary.lines for summary in summarise(found))
    return next((point(line) for line in lines if line.rows[0].run_id == wanted and not line.failed), None)


def point(line: Line) -> Point:
    """Where a line of a table lies, the mean over its seeds."""
    level = line.norm or line.mean
    return Point(math.nan if level is None else level.mean, statistics.fmean(row.stored_bytes for row in line.rows))


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other beats in both, by rising bytes; of equal points the first."""
    order = sorted(range(len(points)), key=lambda index: (points[index].stored_bytes, -points[index].accuracy))
    kept: list[int] = []
    for index in order:
        if not kept or points[index].accuracy > points[kept[-1]].accuracy:
            kept.append(index)
    return kept


def figure(made: Iterable[Row], path: str | Path) -> Path:
    """Every merge as a point, and the front of those that need no true task; raises UserError where there is none."""
    from matplotlib.figure import Figure

    summaries = [summary for summary in summarise(made) if _drawn(summary)]
    if not summaries:
        raise UserError(f"There is nothing to draw in {path}: no finished merge was given. Run a method first.")
    kinds = [{(line.rows[0].method, line.kind) for line in _drawn(summary)} for summary in summaries]
    heights = [max(4.0, 0.8 + 0.2 * len(each)) for each in kinds]  # so that the legend fits
    drawing = Figure(figsize=(9, sum(heights)), layout="constrained")
    axes = drawing.subplots(len(summaries), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, summary in zip(axes, summaries, strict=True):
        _panel(ax, summary)
    return write_atomically(path, lambda file: drawing.savefig(file, format="png", dpi=160))


def _drawn(summary: Summary) -> list[Line]:
    return [line for line in summary.lines if line.kind in ("static", "routed", "oracle")]


def _panel(ax: "Axes", summary: Summary) -> None:
    """One marker a method, hollow where the true task is told; the front as steps."""
    from matplotlib import colormaps

    lines = _drawn(summary)
    methods = list(dict.fromkeys(line.rows[0].method for line in lines))
    for number, method in enumerate(methods):
        colour = colormaps["cividis"](0.9 * number / max(1, len(methods) - 1))
        for oracle in (False, True):
            own = [point(line) for line in lines
                   if line.rows[0].method == method and (line.kind == "oracle") == oracle]  # fmt: skip
            if own:
                ax.scatter([each.stored_bytes / MB for each in own], [100 * each.accuracy for each in own], s=36,
                           marker=MARKERS[number % len(MARKERS)], facecolors="none" if oracle else colour,
                           edgecolors=colour, label=f"{method}{' (true task)' * oracle}", zorder=3)  # fmt: skip
    fair = [point(line) for line in lines if line.kind != "oracle"]
    best = [fair[index] for index in front(fair)]
    if best:
        ax.step([each.stored_bytes / MB for each in best], [100 * each.accuracy for each in best], where="post",
                color="#555555", linewidth=1, label="front, true task not told")  # fmt: skip
    unit = "normalised accuracy" if all(line.norm for line in lines) else "accuracy"
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    ax.set(xlabel="stored, MB", ylabel=f"{unit}, percent")
    ax.set_title(f"{summary.suite}: {len(lines)} merges, {len(summary.tasks)} tasks", loc="left", fontsize=11)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits 1 with one paragraph when there is nothing to draw."""
    parser = argparse.ArgumentParser("python -m launchers.pareto", description="Draw accuracy against stored bytes.")
    parser.add_argument("paths", nargs="*", default=[RESULTS], help=f"row files or folders of them ({RESULTS})")
    parser.add_argument("--file", default="front.png", help="the picture (front.png)")
    chosen = parser.parse_args(arguments)
    try:
        found = rows_of(chosen.paths)
        print(figure(found, chosen.file))
    except UserError as error:
        sys.exit(f"error: {error}")
    for summary in summarise(found):
        fair = [line for line in _drawn(summary) if line.kind != "oracle"]
        for each in (fair[index] for index in front([point(line) for line in fair])):
            accuracy, stored = point(each)
            print(f"{summary.suite}  {100 * accuracy:5.1f} %  {stored / MB:8.1f} MB  {each.label}")


if __name__ == "__main__":
    main()
