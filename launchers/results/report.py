"""All rows as one page: `python -m launchers.report [paths...] [--output report.html] [--figures folder] [--open]`.

The page needs no network and no other file. The figures are also written for papers: PDF and PNG, 3.25 or 6.75 in wide.
"""

import argparse
import logging
import os
import re
import sys
import webbrowser
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from launchers.motivation import FOLDER, read
from launchers.results.curves import bytes_figure, level_figure
from launchers.results.frame import RESULTS, Summary, rows_of, summarise
from launchers.results.heat import energy_map, routed, routing_map, score_map, similarity_maps
from launchers.results.motivation_figures import drawings_of, title_of
from launchers.results.notes import numbered, warnings
from launchers.results.plot import Plot, declared, drawings, of_experiments
from launchers.results.style import Drawn, inline_svg, save
from launchers.results.table import columns
from launchers.results.writers import render
from merging.errors import UserError
from merging.files import write_atomically, write_text

PAGE = "report.html"
MANY = 9  # routing matrices of a suite; more are folded away until asked for


@dataclass(frozen=True)
class Section:
    """A heading of the page with its figures, those of a suite with its table."""

    key: str  # unique in the page, for ids and file names
    title: str
    figures: dict[str, list[Drawn]]  # heading -> figures
    summary: Summary | None = None
    columns: tuple[Any, ...] = ()
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def sections(summaries: Sequence[Summary]) -> list[Section]:
    """One section a suite, figures drawn."""
    names = [_slug(summary.suite) for summary in summaries]
    return [_section(f"{name}-{number}" if names.count(name) > 1 else name, summary, names.count(name) > 1)
            for number, (name, summary) in enumerate(zip(names, summaries, strict=True))]  # fmt: skip


def _section(key: str, summary: Summary, several: bool) -> Section:
    energy, trade_offs = energy_map(summary), [bytes_figure(summary), level_figure(summary)]
    figures = {
        "Methods and tasks": [score_map([summary]), *similarity_maps(summary)],
        "Trade-offs": [drawn for drawn in trade_offs if drawn is not None],
        "Where the gates send images": [routing_map([pair]) for pair in routed(summary)],
        "What the routed parts hold": [energy] if energy is not None else [],
    }
    return Section(
        key=key,
        title=summary.title + (f": {', '.join(summary.tasks)}" if several else ""),
        figures={heading: drawn for heading, drawn in figures.items() if drawn},
        summary=summary,
        columns=columns(summary, wide=True)[1:],
        warnings=warnings(summary),
        notes=numbered(summary),
    )


def across(summaries: Sequence[Summary], plots: dict[Plot, str], folders: Sequence[Path] = ()) -> list[Section]:
    """What experiments declare and these tables fill, and what launchers.motivation measured in `folders`."""
    drawn = [figure for plot, name in plots.items() if plot.kind in ("curve", "grid", "bars")
             for figure in drawings(plot, name, summaries)]  # fmt: skip
    measured = [Section(f"motivation-{file.run_id}", f"What DuetMerging builds on: {title_of(file)}",
                        {"": drawings_of(file)}) for folder in folders for file in read(folder)]  # fmt: skip
    return [*([Section("ablations", "Ablations", {"": drawn})] if drawn else []), *measured]


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII).strip("-.") or "suite"


def page(made: Sequence[Section], damaged: Sequence[str] = ()) -> str:
    """The whole page."""
    style, script = (
        (files("launchers.results") / "page" / name).read_text("utf-8") for name in ("report.css", "report.js")
    )
    return render(
        "report.html",
        svg=lambda drawn, key: inline_svg(drawn, f"{key}-{_slug(drawn.name)}"),
        sections=[section for section in made if section.summary is not None],
        across=[section for section in made if section.summary is None],
        checkpoints=checkpoints, splits=splits, many=MANY, damaged=damaged, style=style, script=script,
        rows=[row for section in made if section.summary is not None for row in section.summary.rows],
    )  # fmt: skip


def checkpoints(summary: Summary) -> list[tuple[str, int, dict[str, str]]]:
    """The sets of checkpoints: family, number of rows, and name -> content id."""
    keys = [f"{row.family}{sorted(row.checkpoints.items())}" for row in summary.rows]
    first = dict(zip(reversed(keys), reversed(summary.rows), strict=True))
    return [(first[key].family, keys.count(key), first[key].checkpoints) for key in dict.fromkeys(keys)]


def splits(summary: Summary) -> list[tuple[str, ...]]:
    """Every split that a row was scored on: task, name, images, fingerprint."""
    names = ("name", "size", "id")
    seen = {(task, *(str(split.get(name, "-")) for name in names))
            for row in summary.rows for task, split in row.splits.items()}  # fmt: skip
    order = list(summary.tasks)
    return sorted(seen, key=lambda split: (order.index(split[0]) if split[0] in order else len(order), split))


def write_figures(made: Sequence[Section], folder: Path) -> list[Path]:
    """Every figure as `<section>-<name>.pdf` and `.png` at its size on paper."""
    named = {f"{section.key}-{_slug(drawn.name)}": drawn
             for section in made for figures in section.figures.values() for drawn in figures}  # fmt: skip
    return [write_figure(drawn, folder / f"{name}.{kind}") for name, drawn in named.items() for kind in ("pdf", "png")]


def write_figure(drawn: Drawn, path: Path, dpi: int = 300) -> Path:
    """One figure in the format that the path ends with."""
    content = save(drawn, path.suffix[1:], dpi)
    return write_atomically(path, lambda file: file.write(content))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits 1 with one paragraph when there is nothing to show or no place for it."""
    parser = argparse.ArgumentParser("python -m launchers.report", description="Write result rows as one HTML page.")
    parser.add_argument("paths", nargs="*", default=[RESULTS], help=f"row files or folders of them ({RESULTS})")
    parser.add_argument("--output", default=PAGE, help=f"the page ({PAGE})")
    parser.add_argument("--figures", metavar="FOLDER", help="also write every figure there, as PDF and PNG for a paper")
    parser.add_argument("--plot", metavar="YAML", action="append", default=[],
                        help="another figure, declared as by experiments: '{kind: curve, x: method.keep}'")  # fmt: skip
    parser.add_argument("--open", action="store_true", help="show the page in a browser, where there is one")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    damaged: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: damaged.append(record.getMessage())
    logging.getLogger("launchers.rows").addHandler(listener)
    try:
        plots = {declared(text, "--plot"): f"own {number}" for number, text in enumerate(chosen.plot, 1)}
        summaries = summarise(rows_of(chosen.paths))
        folders = dict.fromkeys(Path(path).parent / FOLDER for path in chosen.paths if Path(path).is_dir())
        made = [*across(summaries, of_experiments() | plots, list(folders)), *sections(summaries)]
        written = write_text(chosen.output, page(made, damaged))
        figures = write_figures(made, Path(chosen.figures)) if chosen.figures else []
    except UserError as error:
        sys.exit(f"error: {error}")
    finally:
        logging.getLogger("launchers.rows").removeHandler(listener)
    more = f" and {len(figures)} figures in {chosen.figures}" if figures else ""
    print(f"{sum(len(summary.rows) for summary in summaries)} rows in {written}{more}", flush=True)
    if chosen.open:
        _open(written)


def _open(path: Path) -> None:
    """Show a file in the user's browser. Without a screen nothing happens: the path has been printed."""
    screens = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")  # else a browser in text would take over the terminal
    if sys.platform == "linux" and not any(os.environ.get(name) for name in screens):
        return
    with suppress(webbrowser.Error, OSError):
        webbrowser.open(path.resolve().as_uri())
