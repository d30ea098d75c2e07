"""Sheets of formatted cells on the terminal, as markdown and LaTeX, and whatever else page/ has a template for."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from jinja2 import Environment
    from pandas import DataFrame

WIDTH = 120  # of a table that does not go to a terminal
FIRST_WIDTH = 30  # of the column that names the lines
MEANS = ("mean", "norm", "unseen")  # headers repeated in front of the columns behind them, where a sheet is cut
BAD = ("failed", "outside")  # texts that begin so are red
LATEX = str.maketrans({"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
         **{character: f"\\{character}" for character in "&%$#_{}"}})  # fmt: skip


class Cell(NamedTuple):
    """A printed value, the deviation that belongs to it, and whether it is the best of its column."""

    text: str = "-"
    deviation: str = ""
    bold: bool = False


class Column(NamedTuple):
    """A column of a table."""

    header: str
    cells: tuple[Cell, ...]

    @property
    def is_text(self) -> bool:
        """Whether no cell is a number."""
        return not any(cell.text[:1].isdigit() for cell in self.cells)


@dataclass(frozen=True)
class Sheet:
    """One table: the first column names the lines; `dim` and `breaks` are positions of lines."""

    title: str
    columns: Sequence[Column]
    notes: Sequence[str] = ()
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


def _blocks(columns: Sequence[Column], console: Console) -> list[list[Column]]:
    """Columns cut into runs that fit, each starting with the first; what follows the means stands beside them again."""
    if fits(columns, console):
        return [[*columns]]
    means = [column for column in columns if column.header in MEANS]
    end = 1 + max((position for position, column in enumerate(columns) if column in means), default=len(columns))
    facts = [[*means, *columns[end:]]] if columns[end:] else []
    blocks: list[list[Column]] = []
    for run in (columns[1:end], *facts):
        blocks.append([columns[0]])
        for column in run:
            if len(blocks[-1]) > 1 and not fits([*blocks[-1], column], console):
                blocks.append([columns[0]])
            blocks[-1].append(column)
    return blocks


def fits(block: Sequence[Column], console: Console) -> bool:
    """Whether the columns fit the console side by side."""
    return console.measure(draw(block), options=console.options.update(width=10_000)).maximum <= console.width


def draw(block: Sequence[Column], dim: frozenset[int] = frozenset(), breaks: frozenset[int] = frozenset()) -> Table:
    """The columns as a rich table; lines of the positions `dim` are grey, after those of `breaks` follows a rule."""
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False, header_style="bold cyan")
    table.add_column(block[0].header, max_width=FIRST_WIDTH, overflow="fold")
    for column in block[1:]:
        wide = 7 if column.header in ("mean", "scale") else None  # air in front of each group of columns
        header = re.sub(r"[-_ ]", "\n", column.header) if len(column.header) > 8 else column.header
        table.add_column(header, justify="right", no_wrap=True, overflow="fold", min_width=wide)
    for position, cells in enumerate(zip(*(column.cells for column in block), strict=True)):
        style = "dim" if position in dim else None
        table.add_row(*map(_rich, cells), style=style, end_section=position in breaks)
    return table


def _rich(cell: Cell) -> Text:
    style = "bold green" if cell.bold else "red" if cell.text.startswith(BAD) else ""
    return Text.assemble((cell.text, style), (f"\n{cell.deviation}" if cell.deviation else "", "dim"))


def terminal(sheets: Sequence[Sheet], width: int = WIDTH) -> str:
    """What `show` prints, as plain text of at most `width` columns."""
    page = io.StringIO()
    show(sheets, Console(file=page, width=width, color_system=None))
    return page.getvalue()


def markdown(sheets: Sequence[Sheet]) -> str:
    """GitHub tables, notes below as lists."""
    return render("table.md", sheets=sheets)


def latex(sheets: Sequence[Sheet]) -> str:
    """booktabs tabulars, notes below as paragraphs."""
    return render("table.tex", sheets=sheets, escape=lambda text: text.translate(LATEX))


def comma_separated(frame: "DataFrame") -> str:
    """A record a line, numbers with 4 decimals at most, nothing where nothing is known."""
    numbers = frame.select_dtypes("float").round(4) + 0.0  # no negative zeros
    return frame.assign(**numbers).to_csv(index=False, lineterminator="\n")


def frame_of(sheets: Sequence[Sheet]) -> "DataFrame":
    """The printed texts of all sheets below each other, each line with the title of its sheet."""
    from pandas import DataFrame, concat

    frames = [DataFrame({"table": sheet.title, **{column.header: [cell.text.strip() for cell in column.cells]
                                                  for column in sheet.columns}}) for sheet in sheets]  # fmt: skip
    return concat([DataFrame(), *frames], ignore_index=True)


@cache
def _templates() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    return Environment(loader=PackageLoader("launchers.results", "page"), autoescape=select_autoescape(["html"]),
                       undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                       keep_trailing_newline=True)  # fmt: skip


def render(template: str, **facts: Any) -> str:
    """A template of the folder page, filled in."""
    return _templates().get_template(template).render(**facts)


FORMATS: dict[str, Callable[[Sequence[Sheet]], str]] = {"terminal": terminal, "markdown": markdown, "latex": latex}
