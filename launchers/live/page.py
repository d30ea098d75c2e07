"""The picture of a running sweep: how far it is, what is being computed, the table so far."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.text import Text

from launchers.live.view import Job, View
from launchers.results.frame import REFERENCES, Summary
from launchers.results.table import FACTS, columns, references
from launchers.results.writers import draw, fits

if TYPE_CHECKING:
    from pandas import DataFrame

RUNNING = 3  # lines for cells in progress
BAR = 60  # width
SCORES = {"method", "n", "mean", "norm"}  # columns beside those of the tasks


def page(view: View, summaries: Sequence[Summary], width: int, height: int) -> RenderableType:
    """The view in `height` lines of at most `width` characters."""
    total, text = view.plan.total, status(view, f" after {clock(view.now - view.started)}")
    bottom: list[RenderableType] = [Text("")]
    if total is not None:
        bottom.append(ProgressBar(max(1, total), view.done, width=min(width, BAR)))
    bottom.append(_line(text if view.running or total is not None else f"{text}, nothing is being computed"))
    room = max(1, min(RUNNING, height - 4))
    shown = view.running if len(view.running) <= room else view.running[: room - 1]
    bottom += [_line(_running(job, view.now), "cyan") for job in shown]
    if len(shown) < len(view.running):
        bottom.append(_line(f"and {len(view.running) - len(shown)} more cells", "dim"))
    return Group(*_table(summaries, width, height - len(bottom)), *bottom)


def status(view: View, elapsed: str = "") -> str:
    """One line such as "7 of 36 cells, about 0:04:10 left, 1 failed, 3 found from before"."""
    failed, found = (sum(job.state == state for job in view.jobs) for state in ("failed", "found"))
    total, rows = view.plan.total, f"{view.done} row{'s' * (view.done != 1)}"
    facts = [f"{view.done} of {total} cells{elapsed}" if total is not None else rows]
    if view.done != total and (left := view.left) is not None:
        facts.append(f"about {clock(left)} left")
    return ", ".join([*facts, *[f"{failed} failed"] * bool(failed), *[f"{found} found from before"] * bool(found)])


def _running(job: Job, now: float) -> str:
    timer = "" if job.began is None else f"now {clock(job.age(now))} "
    doing = "preparing " if job.state == "preparing" else ""
    where = f" on {job.owner}" if job.owner else ""
    return f"{timer}{doing}{' '.join(job.overrides) or 'a cell'}{where}"


def _table(summaries: Sequence[Summary], width: int, height: int) -> list[RenderableType]:
    """The suite of the newest row, as many of its lines as fit; says what it leaves out."""
    if not summaries:
        return []
    summary = max(summaries, key=lambda summary: max(row.created for row in summary.rows))
    others = sum(len(other.lines) for other in summaries if other is not summary)
    tall = 1 + bool(summary.lines["mean sd"].notna().any())
    kept = _kept(summary.lines, (height - 6) // tall)  # without empty line, title, head of two lines, rule and note
    if not len(kept):
        return []
    left_out = [f"{len(summary.lines) - len(kept)} more lines"] * (len(kept) < len(summary.lines))
    left_out += [f"{others} lines of other tasks"] * (others > 0)
    note = [_line(f"not shown: {' and '.join(left_out)}", "dim")] if left_out else []
    title = _line(f"{summary.suite}, {len(summary.tasks)} tasks", "bold")
    facts = {fact.header for fact in FACTS}
    wide = [column for column in columns(replace(summary, lines=kept)) if column.header not in facts]
    narrow = [column for column in wide if column.header in SCORES]
    return [Text(""), title, draw(wide if fits(wide, Console(width=width)) else narrow, references(kept)), *note]


def _kept(lines: "DataFrame", room: int) -> "DataFrame":
    """All, or base and experts, the newest and the best; the newest is marked."""
    created = lines["rows"].map(lambda rows: max(row.created for row in rows))
    newest, best = ([*key.sort_values(ascending=False, kind="stable").index] for key in (created, lines["mean"]))
    references = lines.index[lines["kind"].isin(REFERENCES)]
    ranked = dict.fromkeys([newest[0], *best[:1], *references, *newest[: room // 4], *best])
    lines = lines.assign(label=lines["label"].where(lines.index != newest[0], lines["label"] + " (new)"))
    return lines.loc[sorted(list(ranked)[: max(0, room)])]


def _line(text: str, style: str = "") -> Text:
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def clock(seconds: float) -> str:
    """A duration: "0:00:23", "1 day, 1:02:03"."""
    return str(timedelta(seconds=max(0, int(seconds))))
