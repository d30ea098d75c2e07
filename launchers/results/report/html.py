"""All rows as one page: `python -m launchers.report [paths...] [--output report.html] [--figures folder] [--open]`.

The page needs no network and no other file. The figures are also written for papers: PDF and PNG, 3.25 or 6.75 in wide.
"""

import argparse
import logging
import os
import re
import sys
import webbrowser
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from launchers.motivation import FOLDER, Measured, read
from launchers.results.frame import Summary, summarise
from launchers.results.notes import first_line
from launchers.results.report import motivation, table
from launchers.results.report.axes import choices, grids, runs
from launchers.results.report.bars import choice_figure, level_figure
from launchers.results.report.counts import count_figures
from launchers.results.report.curves import knob_figure
from launchers.results.report.grids import grid_figure
from launchers.results.report.maps import energy_map, score_map
from launchers.results.report.sizes import bytes_figure, size_figure
from launchers.results.report.squares import routing_map, similarity_maps
from launchers.results.report.style import Drawn, inline_svg, save
from launchers.results.report.table import Grid
from launchers.results.table import RESULTS, rows_of
from launchers.rows import Row
from merging.errors import UserError
from merging.files import write_atomically, write_text

PAGE = "report.html"
MANY = 9  # routing matrices of a suite; more are folded away until asked for
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Section:
    """One suite of the page."""

    key: str  # unique in the page, for ids and file names
    title: str
    summary: Summary
    table: Grid
    warnings: list[str]
    notes: list[str]
    maps: list[Drawn]
    curves: list[Drawn]
    routing: list[Drawn]
    energy: list[Drawn]

    @property
    def figures(self) -> list[Drawn]:
        return [*self.maps, *self.curves, *self.routing, *self.energy]


def sections(rows: Iterable[Row]) -> list[Section]:
    """One section a suite, figures drawn."""
    summaries = summarise(rows)
    names = [_slug(summary.suite) for summary in summaries]
    several = [names.count(name) > 1 for name in names]
    keys = [f"{name}-{number}" if several[number] else name for number, name in enumerate(names)]
    return [_section(*each) for each in zip(keys, summaries, several, strict=True)]


def _section(key: str, summary: Summary, several: bool) -> Section:
    family = ", ".join(sorted({line.rows[0].family for line in summary.lines}))
    title = summary.suite if family in ("", summary.suite) else f"{summary.suite} ({family})"
    return Section(
        key=key,
        title=title + (f": {', '.join(summary.tasks)}" if several else ""),
        summary=summary,
        table=table.grid(summary),
        warnings=table.warnings(summary),
        notes=table.remarks(summary),
        maps=[score_map(summary), *similarity_maps(summary)],
        curves=_curves(summary),
        routing=[routing_map(summary, line) for line in summary.lines if line.routed_right],
        energy=[drawn] if (drawn := energy_map(summary)) else [],
    )


def _curves(summary: Summary) -> list[Drawn]:
    """Bytes, deviations, then what was varied: grids of numbers, single numbers that no grid shows, words."""
    ends = [bytes_figure(summary), size_figure(summary), level_figure(summary)]
    gridded = grids(summary)
    inside = {id(line) for grid in gridded for line in grid.cells.values()}
    left = {
        knob: [run for run in found if not {id(line) for _, line in run} <= inside]
        for knob, found in runs(summary).items()
    }
    return [
        *(drawn for drawn in ends if drawn is not None),
        *(grid_figure(summary, grid, number) for number, grid in enumerate(gridded, 1)),
        *(knob_figure(summary, knob, found) for knob, found in left.items() if found),
        *(choice_figure(summary, knob, found) for knob, found in choices(summary).items()),
    ]


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII).strip("-.") or "suite"


def across(made: Sequence[Section]) -> list[Drawn]:
    """Figures that need several tables."""
    return count_figures(section.summary for section in made)


def page(made: Sequence[Section], damaged: Sequence[str] = (), measured: Sequence[Measured] = ()) -> str:
    """The whole page; `measured`: what launchers.motivation wrote."""
    house = Environment(
        loader=PackageLoader("launchers.results", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    house.globals.update(first_line=first_line, runs=table.runs, checkpoints=table.checkpoints,
                         splits=table.splits, words=table.WORDS)  # fmt: skip
    house.filters["svg"] = lambda drawn, key: inline_svg(drawn, f"{key}-{_slug(drawn.name)}")
    own = files("launchers.results") / "page"
    style, script = ((own / name).read_text("utf-8") for name in ("report.css", "report.js"))
    rows = [run.row for section in made for run in table.runs(section.summary)]
    dates = sorted(row.created[:10] for row in rows)
    return house.get_template("report.html").render(
        sections=made,
        many=MANY,
        across=across(made),
        motivation=[(motivation.title(each), motivation.drawings(each)) for each in measured],
        damaged=damaged,
        style=style,
        script=script,
        rows=rows,
        first=dates[0],
        last=dates[-1],
    )


def write_figures(made: Sequence[Section], folder: Path, measured: Sequence[Measured] = ()) -> list[Path]:
    """Every figure as `<suite>-<name>.pdf` and `.png` at its size on paper."""
    named = {f"{section.key}-{_slug(drawn.name)}": drawn for section in made for drawn in section.figures}
    alone = [*across(made), *(drawn for each in measured for drawn in motivation.drawings(each))]
    named |= {_slug(drawn.name): drawn for drawn in alone}
    return [_write(drawn, folder / f"{name}.{kind}", kind) for name, drawn in named.items() for kind in ("pdf", "png")]


def _write(drawn: Drawn, path: Path, kind: str) -> Path:
    content = save(drawn, kind)
    return write_atomically(path, lambda file: file.write(content))


class _Heard(logging.Handler):
    """What was said while rows were read: files that were left out."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextmanager
def _listening(name: str) -> Iterator[list[str]]:
    heard, logger = _Heard(), logging.getLogger(name)
    logger.addHandler(heard)
    try:
        yield heard.said
    finally:
        logger.removeHandler(heard)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits 1 with one paragraph when there is nothing to show or no place for it."""
    parser = argparse.ArgumentParser("python -m launchers.report", description="Write result rows as one HTML page.")
    parser.add_argument("paths", nargs="*", default=[RESULTS], help=f"row files or folders of them ({RESULTS})")
    parser.add_argument("--output", default=PAGE, help=f"the page ({PAGE})")
    parser.add_argument("--figures", metavar="FOLDER", help="also write every figure there, as PDF and PNG for a paper")
    parser.add_argument("--open", action="store_true", help="show the page in a browser, where there is one")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        with _listening("launchers.rows") as damaged:
            rows = rows_of(chosen.paths)
        made, measured = sections(rows), _measured(chosen.paths)
        written = write_text(chosen.output, page(made, damaged, measured))
        figures = write_figures(made, Path(chosen.figures), measured) if chosen.figures else []
    except UserError as error:
        sys.exit(f"error: {error}")
    more = f" and {len(figures)} figures in {chosen.figures}" if figures else ""
    print(f"{len(rows)} rows in {written}{more}", flush=True)
    if chosen.open:
        _open(written)


def _measured(paths: Sequence[str]) -> list[Measured]:
    """What lies in folders beside those of the rows."""
    folders = dict.fromkeys(Path(path).parent / FOLDER for path in paths if Path(path).is_dir())
    return [found for folder in folders for found in read(folder)]


def _open(path: Path) -> None:
    """Show a file in the user's browser. Without a screen nothing happens: the path has been printed."""
    screens = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")  # else a browser in text would take over the terminal
    if sys.platform == "linux" and not any(os.environ.get(name) for name in screens):
        return
    with suppress(webbrowser.Error, OSError):
        webbrowser.open(path.resolve().as_uri())
