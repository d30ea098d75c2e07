"""The picture of a running sweep: the table so far, what is being computed, how long it will take."""

import itertools
import socket
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launchers.live.eta import about, clock
from launchers.live.jobs import Job, View
from launchers.results.columns import Column, columns
from launchers.results.draw import FIRST_WIDTH
from launchers.results.frame import REFERENCES, Summary

SHARE = 0.75  # of the terminal's height: log lines stay in sight above
NOW = 3  # lines for cells in progress
BAR = 60  # width


def page(view: View, summaries: Sequence[Summary], width: int, height: int) -> RenderableType:
    """The view in at most `height` lines of at most `width` characters."""
    bottom = [Text(""), *_progress(view, width), *_running(view, max(1, min(NOW, height - 4)))]
    top = _table(summaries, width, height - len(bottom) - 1)
    return Group(*([Text("")] if top else []), *top, *bottom)


def status(view: View, elapsed: str = "") -> str:
    """One line such as "7 of 36 cells, about 4 min left, 1 failed, 3 found from before"."""
    failed, found, total = view.count("failed"), view.count("found"), view.plan.total
    rows = f"{view.over} row{'s' * (view.over != 1)}"
    said = [f"{view.over} of {total} cells{elapsed}" if total is not None else rows]
    if view.over != total and (left := view.left) is not None:
        said.append(f"about {about(left)} left")
    return ", ".join([*said, *[f"{failed} failed"] * bool(failed), *[f"{found} found from before"] * bool(found)])


def _progress(view: View, width: int) -> list[RenderableType]:
    said = Text(status(view, f" after {clock(view.now - view.started)}"), no_wrap=True, overflow="ellipsis")
    if view.plan.total is None:
        return [said if view.count("preparing", "running") else said.append(", nothing is being computed")]
    bar = Table.grid()
    bar.add_row(ProgressBar(max(1, view.plan.total), view.over, width=min(width, BAR)))
    return [bar, said]


def _running(view: View, room: int) -> list[RenderableType]:
    jobs = sorted((job for job in view.jobs if job.state in ("preparing", "running")), key=lambda job: job.began)
    shown = jobs if len(jobs) <= room else jobs[: room - 1]
    more = [Text(f"{'and ' * bool(shown)}{len(jobs) - len(shown)} more cells", "dim")] if len(jobs) > room else []
    return [*(Text(_now(job, view.now), "cyan", no_wrap=True, overflow="ellipsis") for job in shown), *more]


def _now(job: Job, now: float) -> str:
    host = job.owner.partition(", ")[0]
    where = f" on {host}" if host and host != socket.gethostname() else ""
    doing = "preparing " if job.state == "preparing" else ""
    return f"now {clock(now - job.began)} {doing}{' '.join(job.choices) or 'a cell'}{where}"


def _table(summaries: Sequence[Summary], width: int, height: int) -> list[RenderableType]:
    """The suite of the newest row, as many of its lines as fit; says what it leaves out."""
    if not summaries:
        return []
    summary = max(summaries, key=lambda each: max(_created(each)))
    others = sum(len(each.lines) for each in summaries) - len(summary.lines)
    room = height - 3  # title, head and rule
    room -= others > 0 or len(summary.lines) > room
    kept = _kept(summary, room)
    left_out = [f"{len(summary.lines) - len(kept)} more lines"] * (len(kept) < len(summary.lines))
    left_out += [f"{others} lines of other tasks"] * (others > 0)
    note = [Text(f"not shown: {' and '.join(left_out)}", "dim", no_wrap=True)] if left_out else []
    title = Text(f"{summary.suite}, {len(summary.tasks)} tasks", "bold", no_wrap=True, overflow="ellipsis")
    return [title, _drawn(summary, kept, width), *note] if kept else []


def _created(summary: Summary) -> list[str]:
    return [max(row.created for row in line.rows) for line in summary.lines]


def _kept(summary: Summary, room: int) -> list[int]:
    """Indices of lines: all, or base and expert, the newest and then the best."""
    lines, created = summary.lines, _created(summary)
    if len(lines) <= room:
        return list(range(len(lines)))
    references = [index for index, line in enumerate(lines) if line.kind in REFERENCES]
    newest = sorted(range(len(lines)), key=lambda index: created[index], reverse=True)[: max(1, room // 4)]
    means = [-1.0 if line.mean is None else line.mean.mean for line in lines]
    best = sorted({*range(len(lines))} - {*references}, key=lambda index: means[index], reverse=True)
    ranked = dict.fromkeys([*newest[:1], *best[:1], *references, *newest, *best])
    return sorted(list(ranked)[: max(0, room)])


def _drawn(summary: Summary, kept: Sequence[int], width: int) -> Table:
    """Method, seeds, the scores of the tasks if they fit, mean and norm; a line of text each."""
    every = columns(summary)
    scores = list(itertools.takewhile(lambda column: column.header != "scale", every))
    wide = _grid(summary, scores, kept, width)
    console = Console(width=10_000)
    if console.measure(wide).maximum <= width:
        return wide
    return _grid(summary, [each for each in scores if each.header not in summary.tasks], kept, width)


def _grid(summary: Summary, shown: Sequence[Column], kept: Sequence[int], width: int) -> Table:
    created = _created(summary)
    newest = max(range(len(created)), key=lambda index: created[index])
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False, header_style="bold cyan")
    for column in shown:
        if column.header == "method":
            table.add_column(column.header, no_wrap=True, overflow="ellipsis", max_width=FIRST_WIDTH)
        else:
            wide = 7 if column.header == "mean" else None  # air in front of it
            table.add_column(column.header, justify="right", no_wrap=True, min_width=wide)
    table.add_column("", no_wrap=True)
    for index in kept:
        cells = (_text(column, index) for column in shown)
        dim = "dim" if summary.lines[index].kind in REFERENCES else None
        table.add_row(*cells, Text("  new", "cyan") if index == newest else "", style=dim)
    return table


def _text(column: Column, index: int) -> Text:
    cell = column.cells[index]
    deviation = f" {cell.deviation}" if cell.deviation and column.header in ("mean", "norm") else ""
    style = "bold green" if cell.bold else "red" if cell.text == "failed" else ""
    return Text.assemble((cell.text, style), (deviation, "dim"))
