"""All rows as one page: `python -m launchers.report [paths...] [--output report.html] [--figures folder] [--open]`.

The page needs no network and no other file. The figures are also written for papers: PDF and PNG, 3.25 or 6.75 in wide.
"""

import logging
import os
import re
import sys
import webbrowser
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from launchers import motivation
from launchers.results.command import one_paragraph, parser_of
from launchers.results.curves import front_figure, level_figure, search_figures
from launchers.results.frame import Summary, rows_of, summarise
from launchers.results.heat import energy_map, routed, routing_map, score_map, similarity_map
from launchers.results.motivation_figures import drawings_of, title_of
from launchers.results.notes import notes, warnings
from launchers.results.plot import OVER_X, Plot, declared, drawings, of_experiments
from launchers.results.style import Drawn
from launchers.results.table import columns
from launchers.results.writers import render
from merging.files import write_text

MANY = 9  # routing matrices of a suite; more are folded away until asked for


@dataclass(frozen=True)
class Section:
    """A heading of the page with its figures, those of a suite with its table."""

    key: str  # unique in the page, for ids and file names
    title: str
    figures: Mapping[str, Sequence[Drawn]]  # heading -> figures
    summary: Summary | None = None


def sections(summaries: Sequence[Summary]) -> list[Section]:
    """One section a suite, figures drawn."""
    names = [_slug(summary.suite) for summary in summaries]
    made = []
    for number, (name, summary) in enumerate(zip(names, summaries, strict=True)):
        several = names.count(name) > 1
        title = summary.title + (f": {', '.join(summary.tasks)}" if several else "")
        made.append(Section(f"{name}-{number}" if several else name, title, _figures(summary), summary))
    return made


def _figures(summary: Summary) -> dict[str, list[Drawn]]:
    figures = {
        "Methods and tasks": [score_map([summary]), similarity_map(summary)],
        "Trade-offs": [front_figure(summary), level_figure(summary), *search_figures(summary)],
        "Where the gates send samples": [routing_map([pair]) for pair in routed(summary)],
        "What the routed parts hold": [energy_map(summary)],
    }
    known = {heading: [figure for figure in drawn if figure is not None] for heading, drawn in figures.items()}
    return {heading: drawn for heading, drawn in known.items() if drawn}


def across(summaries: Sequence[Summary], plots: Mapping[Plot, str], folders: Sequence[Path] = ()) -> list[Section]:
    """What experiments declare and these tables fill, and what launchers.motivation measured in `folders`."""
    drawn = [figure for plot, name in plots.items() if plot.kind in OVER_X
             for figure in drawings(plot, name, summaries)]  # fmt: skip
    measured = [Section(f"motivation-{file.run_id}", f"What DuetMerging builds on: {title_of(file)}",
                        {"": drawings_of(file)}) for folder in folders for file in motivation.read(folder)]  # fmt: skip
    return [*([Section("ablations", "Ablations", {"": drawn})] if drawn else []), *measured]


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII).strip("-.") or "suite"


def page(made: Sequence[Section], damaged: Sequence[str] = ()) -> str:
    """The whole page."""
    style, script = ((files("launchers.results") / "page" / f"report.{kind}").read_text("utf-8")
                     for kind in ("css", "js"))  # fmt: skip
    suites = [section for section in made if section.summary is not None]
    return render(
        "report.html", sections=suites, across=[section for section in made if section.summary is None],
        svg=lambda drawn, key: drawn.svg(f"{key}-{_slug(drawn.name)}"),
        rows=[row for section in suites if section.summary is not None for row in section.summary.rows],
        columns_of=lambda summary: columns(summary, wide=True)[1:], notes=notes, warnings=warnings,
        checkpoints=checkpoints, splits=splits, many=MANY, damaged=damaged, style=style, script=script,
    )  # fmt: skip


def checkpoints(summary: Summary) -> list[tuple[str, int, dict[str, str]]]:
    """The sets of checkpoints: family, number of rows, and name -> content id."""
    counts = Counter((row.family, *sorted(row.checkpoints.items())) for row in summary.rows)
    return [(family, count, dict(ids)) for (family, *ids), count in counts.items()]


def splits(summary: Summary) -> list[tuple[str, ...]]:
    """Every split that a row was scored on: task, name, samples, fingerprint."""
    seen = {(task, *(str(split.get(name, "-")) for name in ("name", "size", "id")))
            for row in summary.rows for task, split in row.splits.items()}  # fmt: skip
    order = [*summary.tasks, *summary.unseen]
    return sorted(seen, key=lambda split: (order.index(split[0]) if split[0] in order else len(order), split))


def write_figures(made: Sequence[Section], folder: Path) -> list[Path]:
    """Every figure as `<section>-<name>.pdf` and `.png` at its size on paper."""
    named = {f"{section.key}-{_slug(drawn.name)}": drawn
             for section in made for figures in section.figures.values() for drawn in figures}  # fmt: skip
    return [drawn.write(folder / f"{name}.{kind}") for name, drawn in named.items() for kind in ("pdf", "png")]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits 1 with one paragraph when there is nothing to show or no place for it."""
    parser = parser_of("report", "Write result rows as one HTML page.")
    parser.add_argument("--output", default="report.html", help="the page (report.html)")
    parser.add_argument("--figures", metavar="FOLDER", help="also write every figure there, as PDF and PNG for a paper")
    parser.add_argument("--plot", metavar="YAML", action="append", default=[],
                        help="another figure, declared as by experiments: '{kind: curve, x: method.keep}'")  # fmt: skip
    parser.add_argument("--open", action="store_true", help="show the page in a browser, where there is one")
    chosen = parser.parse_args(arguments)
    damaged: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: damaged.append(record.getMessage())
    logging.getLogger("launchers.rows").addHandler(listener)
    try:
        with one_paragraph():
            plots = {declared(text, "--plot"): f"own {number}" for number, text in enumerate(chosen.plot, 1)}
            summaries = summarise(rows_of(chosen.paths))
            folders = {Path(path).parent / motivation.FOLDER for path in chosen.paths if Path(path).is_dir()}
            made = [*across(summaries, of_experiments() | plots, sorted(folders)), *sections(summaries)]
            written = write_text(chosen.output, page(made, damaged))
            figures = write_figures(made, Path(chosen.figures)) if chosen.figures else []
    finally:
        logging.getLogger("launchers.rows").removeHandler(listener)
    more = f" and {len(figures)} figures in {chosen.figures}" if figures else ""
    print(f"{sum(len(summary.rows) for summary in summaries)} rows in {written}{more}", flush=True)
    screens = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")  # without one a browser in text would take over the terminal
    if chosen.open and (sys.platform != "linux" or any(map(os.environ.get, screens))):
        with suppress(webbrowser.Error, OSError):
            webbrowser.open(written.resolve().as_uri())


if __name__ == "__main__":
    main()
