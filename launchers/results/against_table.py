"""Measured lines beside published ones as a table: terminal, markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from launchers.results.against import Compared, Comparison, Section, sections
from launchers.results.columns import Cell, Column
from launchers.results.draw import cut, draw, escape, fits, latex_grid, markdown_grid
from launchers.results.frame import Value
from launchers.rows import Row

Printed = dict[str, Cell]  # header -> cell of one printed line; missing cells are "-"


@dataclass
class Footnotes:
    """Texts numbered in the order of their first appearance, each once."""

    texts: list[str] = field(default_factory=list)

    def __call__(self, texts: Iterable[str]) -> str:
        """The marks of these texts: "[1 3]", or nothing."""
        for text in (texts := list(texts)):
            if text not in self.texts:
                self.texts.append(text)
        return f"[{' '.join(map(str, sorted({self.texts.index(text) + 1 for text in texts})))}]" if texts else ""


@dataclass(frozen=True)
class Page:
    """One section, printed: columns, which lines are published ones, where a method ends, and what stands below."""

    title: str
    columns: tuple[Column, ...]
    published: tuple[int, ...]  # the lines that are not measured
    breaks: tuple[int, ...]
    below: tuple[str, ...]


def pages(rows: Iterable[Row]) -> list[Page]:
    """Every suite and backbone of `rows` as a page."""
    return [_page(section) for section in sections(rows)]


def _page(section: Section) -> Page:
    footnotes, lines, published, breaks = Footnotes(), [], [], []
    shown = [each for each in section.lines if each.counterparts]
    for each in shown:
        lines.append(_measured(each))
        for comparison in each.counterparts:
            published += [len(lines), len(lines) + 1]
            lines += [_known(comparison, footnotes), _difference(comparison, footnotes)]
        breaks.append(len(lines) - 1)
    tasks = section.summary.tasks
    headers = ["method", *tasks, "mean", *(["norm"] if any("norm" in line for line in lines) else []), "verdict"]
    columns = tuple(Column(header, tuple(line.get(header, Cell()) for line in lines)) for header in headers)
    title = f"{section.name}, against published numbers"
    return Page(title, columns, tuple(published), tuple(breaks[:-1]), tuple(_below(section, shown, footnotes)))


def _measured(each: Compared) -> Printed:
    line = each.line
    values: dict[str, Value | None] = {**line.accuracy, "mean": line.mean}
    if any(comparison.published.norm is not None for comparison in each.counterparts):
        values["norm"] = line.norm
    cells = {name: Cell(f"{100 * value.mean:.1f}") for name, value in values.items() if value is not None}
    return {"method": Cell(line.label), **cells, "verdict": Cell("measured")}


def _known(comparison: Comparison, footnotes: Footnotes) -> Printed:
    there = comparison.published
    values = {**there.accuracy, "mean": there.mean, "norm": there.norm}
    cells = {name: Cell(f"{value:.1f}") for name, value in values.items() if value is not None}
    return {"method": Cell(f"  {there.table}"), **cells, "verdict": Cell(footnotes(there.notes))}


def _difference(comparison: Comparison, footnotes: Footnotes) -> Printed:
    gaps = {**comparison.accuracy, "mean": comparison.mean, "norm": comparison.norm}
    cells = {name: Cell(signed(gap)) for name, gap in gaps.items() if gap is not None}
    told = verdict(comparison) + ("" if comparison.comparable else f" {footnotes(comparison.reasons)}")
    return {"method": Cell("    difference"), **cells, "verdict": Cell(told, bold=comparison.within)}


def signed(gap: float) -> str:
    """A difference in points, one decimal; no sign in front of zero."""
    text = f"{gap:+.1f}"
    return "0.0" if float(text) == 0 else text


def verdict(comparison: Comparison) -> str:
    """within | outside the tolerance; "differs" where the two must not be compared."""
    if not comparison.comparable:
        return "differs"
    if comparison.mean is None and comparison.norm is None:
        return "unknown"
    return f"{'within' if comparison.within else 'outside'} {comparison.published.tolerance:g}"


def _below(section: Section, shown: Sequence[Compared], footnotes: Footnotes) -> list[str]:
    said = []
    if shown:
        said.append(
            "Percent and points. within, outside: of so many points of the mean, every task within ten times that; "
            "differs: another experiment, no repetition, whatever the numbers."
        )
    said += [f"[{number}] {text}" for number, text in enumerate(footnotes.texts, 1)]
    tables = {each.published.table: each.published.source for one in shown for each in one.counterparts}
    said += [f"{table}: {source}" for table, source in tables.items() if table not in source]
    bare = [each.line.label for each in section.lines if not each.counterparts and not each.line.failed]
    failed = [each.line.label for each in section.lines if each.line.failed]
    said += [f"Nothing published for {', '.join(bare)}."] if bare else []
    return said + ([f"Failed, nothing to compare: {', '.join(failed)}."] if failed else [])


def show(rows: Iterable[Row], console: Console) -> None:
    """Print every page; columns that do not fit side by side follow below, none is dropped."""
    for page in pages(rows):
        console.print(Text(f"\n{page.title}\n", "bold"))
        for block in _blocks(page, console):
            console.print(draw(block, page.published, page.breaks))
            console.print()
        for text in page.below:
            console.print(Text(text, "dim"))


def _blocks(page: Page, console: Console) -> list[list[Column]]:
    if not page.columns[0].cells:
        return []
    whole = list(page.columns)
    return [whole] if fits(whole, console) else cut(page.columns[0], page.columns[1:], console)


def markdown(rows: Iterable[Row]) -> str:
    """GitHub tables, footnotes and sources below."""
    found = []
    for page in pages(rows):
        grid = markdown_grid(page.columns) + "\n\n" if page.columns[0].cells else ""
        found.append(f"**{page.title}**\n\n{grid}" + "\n".join(f"- {text}" for text in page.below))
    return "\n\n".join(found) + "\n"


def latex(rows: Iterable[Row]) -> str:
    """booktabs tabulars; footnotes and sources as text below."""
    found = []
    for page in pages(rows):
        grid = latex_grid(page.columns, page.breaks) + "\n" if page.columns[0].cells else ""
        below = "\n".join(rf"\par {escape(text)}" for text in page.below)
        found.append(f"% {page.title}; needs \\usepackage{{booktabs}}\n{grid}{below}")
    return "\n\n".join(found) + "\n"


def comma_separated(rows: Iterable[Row]) -> str:
    """A line for every measured line and counterpart, 4 decimals; one without published columns where there is none."""
    lines = [_record(section, each, comparison)
             for section in sections(rows) for each in section.lines
             for comparison in each.counterparts or (None,)]  # fmt: skip
    page = io.StringIO()
    writer = csv.DictWriter(page, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return page.getvalue()


def _record(section: Section, each: Compared, comparison: Comparison | None) -> dict[str, Any]:
    line, there = each.line, comparison and comparison.published
    record: dict[str, Any] = {
        "suite": section.summary.suite,
        "backbone": section.backbone,
        "method": line.label,
        "status": line.rows[0].status,
        "family": line.rows[0].family,
        "table": there and there.table,
        "printed": there and there.printed,
        "source": there and there.source,
        "published_family": there and there.family,
        "verdict": comparison and verdict(comparison).split()[0],
        "tolerance": there and there.tolerance,
        "reasons": comparison and "; ".join(comparison.reasons),
        "notes": there and " ".join(there.notes),
    }
    measured = {**line.accuracy, "mean": line.mean, "norm": line.norm}
    known = {**there.accuracy, "mean": there.mean, "norm": there.norm} if there else {}
    gaps = {**comparison.accuracy, "mean": comparison.mean, "norm": comparison.norm} if comparison else {}
    for name in (*section.summary.tasks, "mean", "norm"):
        value = measured.get(name)
        record[f"{name} measured"] = None if value is None else round(100 * value.mean, 4)
        record[f"{name} published"] = _rounded(known.get(name))
        record[f"{name} difference"] = _rounded(gaps.get(name))
    return record


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 4) + 0.0  # no minus in front of zero


def terminal(rows: Iterable[Row], width: int = 120) -> str:
    """The terminal page as plain text of at most `width` columns."""
    page = io.StringIO()
    show(rows, Console(file=page, width=width, color_system=None))
    return page.getvalue()


FORMATS = {"terminal": terminal, "markdown": markdown, "latex": latex, "csv": comma_separated}
