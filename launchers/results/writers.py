"""Sheets of formatted cells as terminal, markdown and LaTeX tables, and frames as CSV."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from jinja2 import Environment
    from pandas import DataFrame

WIDTH = 120  # of a table that does not go to a terminal
FIRST_WIDTH = 30  # of the column that names the lines
BAD = ("failed", "outside")  # texts that begin so are red


@dataclass(frozen=True)
class Cell:
    """A printed value, the deviation that belongs to it, and whether it is the best of its column."""

    text: str = "-"
    deviation: str = ""
    bold: bool = False


@dataclass(frozen=True)
class Column:
    """Where a sheet is cut for want of width, `is_fact` starts another block, in which `is_mean` is repeated."""

    header: str
    cells: tuple[Cell, ...]
    is_mean: bool = False
    is_fact: bool = False
    is_text: bool = False


@dataclass(frozen=True)
class Sheet:
    """One table: the first column names the lines; `dim` and `breaks` are positions of lines."""

    title: str
    columns: tuple[Column, ...]
    notes: tuple[str, ...] = ()
    dim: frozenset[int] = frozenset()
    breaks: frozenset[int] = frozenset()

    @property
    def lines(self) -> list[tuple[Cell, ...]]:
        return list(zip(*(column.cells for column in self.columns), strict=True))


def show(sheets: Sequence[Sheet], console: Console) -> None:
    """Print every sheet; columns that do not fit side by side follow below, none is dropped."""
    for sheet in sheets:
        console.print(Text(f"\n{sheet.title}\n", "bold"))
        for block in _blocks(sheet.columns, console) if sheet.lines else ():
            console.print(draw(block, sheet.dim, sheet.breaks))
            console.print()
        for note in sheet.notes:
            console.print(Text(note, "dim"))


def terminal(sheets: Sequence[Sheet], width: int = WIDTH) -> str:
    """What `show` prints, as plain text of at most `width` columns."""
    page = io.StringIO()
    show(sheets, Console(file=page, width=width, color_system=None))
    return page.getvalue()


def _blocks(columns: Sequence[Column], console: Console) -> list[list[Column]]:
    """Columns cut into runs that fit the console, each starting with the first; facts start another, beside means."""
    first, *rest = columns
    facts = [column for column in rest if column.is_fact]
    if fits(columns, console):
        return [[*columns]]
    blocks = _cut(first, [column for column in rest if not column.is_fact], console)
    means = [column for column in rest if column.is_mean]
    return [*blocks, *_cut(first, [*means, *facts], console)] if facts else blocks


def _cut(first: Column, rest: Sequence[Column], console: Console) -> list[list[Column]]:
    blocks = [[first]]
    for column in rest:
        wider = [*blocks[-1], column]
        if len(wider) > 2 and not fits(wider, console):
            blocks.append([first, column])
        else:
            blocks[-1] = wider
    return blocks


def fits(block: Sequence[Column], console: Console) -> bool:
    """Whether the columns fit the console side by side."""
    return console.measure(draw(block), options=console.options.update(width=10_000)).maximum <= console.width


def draw(block: Sequence[Column], dim: frozenset[int] = frozenset(), breaks: frozenset[int] = frozenset()) -> Table:
    """The columns as a rich table; lines of the positions `dim` are grey, after those of `breaks` follows a rule."""
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False, header_style="bold cyan")
    for place, column in enumerate(block):
        if place == 0:
            table.add_column(column.header, max_width=FIRST_WIDTH, overflow="fold")
        else:
            wide = 7 if column.header in ("mean", "scale") else None  # air in front of each group of columns
            header = re.sub(r"[-_ ]", "\n", column.header) if len(column.header) > 8 else column.header
            table.add_column(header, justify="right", no_wrap=True, overflow="fold", min_width=wide)
    for place, cells in enumerate(zip(*(column.cells for column in block), strict=True)):
        table.add_row(*map(text_of, cells), style="dim" if place in dim else None, end_section=place in breaks)
    return table


def text_of(cell: Cell, joint: str = "\n") -> Text:
    """A cell for the terminal."""
    style = "bold green" if cell.bold else "red" if cell.text.startswith(BAD) else ""
    return Text.assemble((cell.text, style), (f"{joint}{cell.deviation}" if cell.deviation else "", "dim"))


def markdown(sheets: Sequence[Sheet]) -> str:
    """GitHub tables, notes below as lists."""
    return "\n\n".join(map(_markdown, sheets)) + "\n"


def _markdown(sheet: Sheet) -> str:
    def cell_of(cell: Cell) -> str:
        text = f"{cell.text} {cell.deviation}".rstrip().replace("|", "\\|").replace("  ", "&nbsp;&nbsp;")
        return f"**{text}**" if cell.bold else text

    heads = [[column.header for column in sheet.columns], ["---", *["---:"] * (len(sheet.columns) - 1)]]
    lines = [*heads, *([cell_of(cell) for cell in line] for line in sheet.lines)]
    grid = "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n" if sheet.lines else ""
    return f"**{sheet.title}**\n\n{grid}" + "\n".join(f"- {note}" for note in sheet.notes)


def latex(sheets: Sequence[Sheet]) -> str:
    """booktabs tabulars, notes below as paragraphs."""
    return "\n\n".join(map(_latex, sheets)) + "\n"


def _latex(sheet: Sheet) -> str:
    def cell_of(cell: Cell) -> str:
        text = _escape(cell.text).replace("  ", r"\quad ")
        text = rf"\textbf{{{text}}}" if cell.bold else text
        return text + (rf" $\pm$ {cell.deviation[1:]}" if cell.deviation else "")

    lines = [
        " & ".join(map(cell_of, line)) + (r" \\ \midrule" if place in sheet.breaks else r" \\")
        for place, line in enumerate(sheet.lines)
    ]
    head = " & ".join(_escape(column.header) for column in sheet.columns) + r" \\"
    begin = rf"\begin{{tabular}}{{l{'r' * (len(sheet.columns) - 1)}}}"
    grid = [begin, r"\toprule", head, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}"] if lines else []
    notes = (rf"\par {_escape(note)}" for note in sheet.notes)
    return "\n".join([rf"% {sheet.title}; needs \usepackage{{booktabs}}", *grid, *notes])


def _escape(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    return "".join(special.get(char, f"\\{char}" if char in "&%$#_{}" else char) for char in text)


def comma_separated(frame: "DataFrame") -> str:
    """A record a line, numbers with 4 decimals at most, nothing where nothing is known."""
    numbers = frame.select_dtypes("float").columns
    return frame.assign(**frame[numbers].round(4) + 0.0).to_csv(index=False, lineterminator="\n")


@cache
def _templates() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    return Environment(loader=PackageLoader("launchers.results", "page"), autoescape=select_autoescape(["html"]),
                       undefined=StrictUndefined, trim_blocks=False, lstrip_blocks=True)  # fmt: skip


def render(template: str, **facts: Any) -> str:
    """A template of the folder page, filled in."""
    return _templates().get_template(template).render(**facts)


FORMATS: dict[str, Callable[[Sequence[Sheet]], str]] = {"terminal": terminal, "markdown": markdown, "latex": latex}
