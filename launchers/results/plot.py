"""The figure that an experiment declares (`plot:` in conf/experiment), drawn from any rows that fill its axes."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import yaml

import conf
from launchers.results.frame import REFERENCES, Summary
from launchers.results.labels import Identity, identity, labels
from merging.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame, Series

    from launchers.results.style import Drawn

Names = tuple[str, ...]
FOLLOWS = ("row.needs", "row.router", "row.granularity")  # what rows say of the choice of a router
BATCH = "engine.batch"  # named by rows for gates that see a batch alone
OF_TASKS = ("suite.tasks", "suite.sources", "order", "orders", "count")  # what differs between sets of tasks
X = {"stored_mb": "stored, MB (base included)", "tasks": "number of tasks"}  # what is no option
MOST = 6  # curves, or groups of bars, in a figure


@dataclass(frozen=True)
class Plot:
    """What is drawn: lines alike in everything but the options of x, hue, facet and along make one figure.

    x: an option such as method.keep, "stored_mb", or "tasks" (how many were merged; sets of as many are averaged).
    y: a panel each of score (norm, without experts mean), routing_accuracy, energy.
    hue: options, or parts such as method, that tell curves apart or make the rows of a grid.
    facet: an option whose values have a panel each. along: the option along which a curve is joined, if it is not x.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["curve", "grid", "bars", "scores", "levels", "pareto"]
    x: str = ""
    y: Names = ("score",)
    hue: Names = ()
    facet: str = ""
    along: str = ""


def declared(text: Any, where: str) -> Plot:
    """The plot of a mapping, or of its YAML. Raises UserError naming `where`."""
    from pydantic import TypeAdapter, ValidationError  # not needed by `duet --help`

    try:
        values = yaml.safe_load(text) if isinstance(text, str) else text
        if not isinstance(values, dict):
            raise ValueError(f"{text} is no mapping")
        names = {name: values[name] for name in ("y", "hue") if name in values}
        lists = {name: (value,) if isinstance(value, str) else tuple(value) for name, value in names.items()}
        plot = TypeAdapter(Plot).validate_python(values | lists)
    except (yaml.YAMLError, ValidationError, ValueError, TypeError) as error:
        problems = error.errors() if isinstance(error, ValidationError) else []
        listed = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in problems) or str(
            error
        )
        raise UserError(
            f"The plot of {where} cannot be drawn: {listed}. Write e.g. {{kind: curve, x: method.keep}}."
        ) from error
    if not plot.x and plot.kind in ("curve", "grid", "bars"):
        raise UserError(f"The plot of {where} has no x. Name an option, as in {{kind: {plot.kind}, x: method.keep}}.")
    return plot


def of_experiments(folder: Path | None = None) -> dict[Plot, str]:
    """The plots of all prepared experiments with the names of those that declare them."""
    names: dict[Plot, list[str]] = defaultdict(list)
    for path in sorted((folder or Path(conf.__path__[0]) / "experiment").glob("*.yaml")):
        if (values := yaml.safe_load(path.read_text("utf-8")).get("plot")) is not None:
            names[declared(values, str(path))].append(path.stem)
    return {plot: ", ".join(listed) for plot, listed in names.items()}


def drawings(plot: Plot, name: str, summaries: Sequence[Summary]) -> list["Drawn"]:
    """The figures that these tables fill, those with the most lines first; none where x has a single value."""
    from launchers.results import curves, heat

    if plot.kind == "scores":
        return [heat.score_map([summary]) for summary in summaries]
    if plot.kind in ("levels", "pareto"):
        draw = curves.level_figure if plot.kind == "levels" else curves.bytes_figure
        return [drawn for summary in summaries if (drawn := draw(summary)) is not None]
    lines = _lines(plot, summaries)
    if not len(lines):
        return []
    by = ["figure", "curve"] if plot.kind == "curve" else ["figure"]
    lines = lines[lines.groupby(by)["at"].transform("nunique") > 1]
    figures = sorted((group for _, group in lines.groupby("figure", sort=False)), key=len, reverse=True)[:MOST]
    numbers = [str(number) if len(figures) > 1 else "" for number in range(1, len(figures) + 1)]
    return [_drawn(plot, name, group, number) for group, number in zip(figures, numbers, strict=True)]


def _lines(plot: Plot, summaries: Sequence[Summary]) -> "DataFrame":
    """The lines that have x and hue: figure and curve (what is the same in each), x, facet, hue, and all quantities."""
    from pandas import DataFrame

    free = [plot.x, plot.along, plot.facet, *plot.hue]
    records = []
    for summary in summaries:
        for number, line in summary.scored.iterrows():
            own = identity(line["rows"][0])
            x = {"stored_mb": line["stored_bytes"] / 1e6, "tasks": len(summary.tasks)}.get(plot.x, own.get(plot.x))
            x = _part(own, plot.x) if x is None and plot.kind == "bars" else x
            if not _fits(plot, own, x, line["kind"]):
                continue
            suite = line["suite"] if plot.x == "tasks" else summary.title
            records.append({
                **line, "own": own, "x": x, "at": str(x), "summary": summary, "number": number, "title": suite,
                "figure": json.dumps([suite, _rest(own, free)], sort_keys=True),
                "curve": json.dumps(_rest(own, free[:3]), sort_keys=True), "facet": str(own.get(plot.facet, "")),
                "hue": ", ".join(str(own.get(name)) for name in plot.hue),
            })  # fmt: skip
    return DataFrame(records)


def _fits(plot: Plot, own: Identity, x: Any, kind: str) -> bool:
    """Whether a line has a place in such a figure: references have one only where tasks are counted."""
    known = isinstance(x, int | float) and not isinstance(x, bool) if plot.kind != "bars" else x is not None
    merge = kind not in REFERENCES or (plot.x == "tasks" and kind == "base")
    rows = plot.kind != "grid" or all(name in own for name in plot.hue)
    return known and merge and rows and (not plot.along or bool(_under(own, plot.along)))


def _part(own: Identity, name: str) -> str | None:
    """A part of the configuration as one text: methods, routers and such that were chosen by their name."""
    inside = {key: own[key] for key in _under(own, name)}
    return json.dumps(inside, sort_keys=True) if inside else None


def _under(own: Identity, name: str) -> list[str]:
    return [key for key in own if key == name or key.startswith(f"{name}.") or key == f"row.{name}"]


def _rest(own: Identity, without: Sequence[str]) -> Identity:
    """What is left of an identity, without what follows from the options that may differ."""
    free = [name for name in without if name]
    left = {*FOLLOWS, *(key for name in free for key in _under(own, name))}
    left |= {BATCH} if any(name.startswith("router") for name in free) else set()
    left |= {key for name in OF_TASKS for key in _under(own, name)} if "tasks" in free else set()
    return {key: own[key] for key in own if key not in left}


def _drawn(plot: Plot, name: str, lines: "DataFrame", number: str) -> "Drawn":
    from launchers.results.style import Drawn

    score = "norm" if lines["norm"].notna().all() else "mean"
    measures = [score if measure == "score" else measure for measure in plot.y]
    figure, more = {"curve": _curves, "grid": _grid, "bars": _bars}[plot.kind](plot, lines, measures)
    deviate = lines[[f"{measure} sd" for measure in measures]].notna().any(axis=None)
    what = f"Accuracy {'against' if plot.kind == 'curve' else 'by'} {X.get(plot.x, plot.x)}"
    caption = " ".join([*["Deviations over seeds."] * bool(deviate), *more])
    return Drawn(
        f"plot-{name.partition(',')[0]}{number}", f"{what} ({name}): {lines['title'].iloc[0]}", figure, caption
    )


def _panels(plot: Plot, lines: "DataFrame") -> list[tuple[str, "DataFrame"]]:
    last = plot.facet.rpartition(".")[2]
    return [(f"{last}={value}" if plot.facet else "", frame) for value, frame in lines.groupby("facet")]


def _curves(plot: Plot, lines: "DataFrame", measures: Sequence[str]) -> tuple["Figure", list[str]]:
    """A curve for all lines that differ in x alone; where several lines meet, their mean and deviation."""
    from launchers.results.curves import curves

    first = lines.drop_duplicates("curve")
    shown = labels([_rest(own, [plot.x, plot.along, plot.facet]) for own in first["own"]])
    names = {curve: label + " (oracle)" * (kind == "oracle")
             for curve, label, kind in zip(first["curve"], shown, first["kind"], strict=True)}  # fmt: skip
    meeting = lines.assign(curve=lines["curve"].map(names)).groupby(["curve", "facet", "x"])
    points, several = (
        meeting[[name for measure in measures for name in (measure, f"{measure} sd")]].mean(),
        meeting.size() > 1,
    )
    for measure in measures:
        points[f"{measure} sd"] = points[f"{measure} sd"].mask(several, meeting[measure].std())
    points = points.reset_index()
    lengths = points.groupby("curve").size().sort_values(ascending=False, kind="stable")
    kept = points[points["curve"].isin(lengths.index[:MOST])]
    more = [f"The {MOST} longest of {len(lengths)} curves; the others are in the table."] if len(lengths) > MOST else []
    return curves(_panels(plot, kept), measures, X.get(plot.x, plot.x), at_values=plot.x != "stored_mb"), more


def _grid(plot: Plot, lines: "DataFrame", measures: Sequence[str]) -> tuple["Figure", list[str]]:
    """The values of x across, those of hue down; a panel a facet and measure."""
    from launchers.results.heat import grids

    return grids(_panels(plot, lines), measures, plot.x, ",\n".join(plot.hue)), []


def _bars(plot: Plot, lines: "DataFrame", measures: Sequence[str]) -> tuple["Figure", list[str]]:
    """Groups by what lines share, their lines by rising score; beside a part what it gives alone."""
    from pandas import DataFrame

    from launchers.results.curves import bars

    groups = [group.sort_values("mean") for _, group in lines.groupby("curve", sort=False) if len(group) > 1][:MOST]
    headings = labels([_rest(group["own"].iloc[0], [plot.x]) for group in groups])
    made, last = [], plot.x.rpartition(".")[2]
    for heading, group in zip(headings, groups, strict=True):
        parts = [label.partition(" ")[2].removeprefix(f"{last}=") for label in labels(list(group["own"]))]
        words = [own.get(plot.x, name) for own, name in zip(group["own"], parts, strict=True)]
        named = group.assign(name=list(map(str, words)) if len({*map(str, words)}) == len(words) else parts)
        records = [record for _, line in named.iterrows() for record in (line, *_alone(plot, line))]
        made.append((heading, DataFrame(records)))
    alone = any(str(name).startswith("alone: ") for _, frame in made for name in frame["name"])
    return bars(made, measures), ["Alone: what the part gives by itself."] if alone else []


def _alone(plot: Plot, line: "Series") -> list["Series"]:
    """The line of the method that is a part of another, at the scale it has there."""
    part: Any = line["rows"][0].config
    for name in plot.x.split("."):
        part = part.get(name) if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping):
        return []
    for _, other in line["summary"].lines.iterrows():
        row = other["rows"][0]
        if other["kind"] == "static" and row.config.get("method") == part and row.scale == part.get("scale"):
            other["name"] = f"alone: {row.method}"
            return [other]
    return []
