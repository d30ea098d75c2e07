"""Columns drawn: cut to the width of a terminal, as markdown, as LaTeX."""

import re
from collections.abc import Collection, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launchers.results.columns import Cell, Column

FIRST_WIDTH = 30  # of the column that names the lines


def cut(first: Column, rest: Sequence[Column], console: Console) -> list[list[Column]]:
    """Columns in runs that fit the console, each starting with `first`."""
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


def draw(block: Sequence[Column], dim: Collection[int] = (), breaks: Collection[int] = ()) -> Table:
    """The columns as a table; lines of the indices `dim` are grey, after those of `breaks` follows a rule."""
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False, header_style="bold cyan")
    for index, column in enumerate(block):
        if index == 0:
            table.add_column(column.header, max_width=FIRST_WIDTH, overflow="fold")
        else:
            wide = 7 if column.header in ("mean", "scale") else None  # air in front of each group of columns
            table.add_column(_narrow(column.header), justify="right", no_wrap=True, overflow="fold", min_width=wide)
    for index in range(len(block[0].cells)):
        cells = (_text(column.cells[index]) for column in block)
        table.add_row(*cells, style="dim" if index in dim else None, end_section=index in breaks)
    return table


def _narrow(header: str) -> str:
    """A long task name on several lines, cut where it has a joint."""
    return re.sub(r"[-_ ]", "\n", header) if len(header) > 8 else header


def _text(cell: Cell) -> Text:
    style = "bold green" if cell.bold else "red" if cell.text.startswith(("failed", "outside")) else ""
    return Text.assemble((cell.text, style), ("\n" + cell.deviation if cell.deviation else "", "dim"))


def markdown_grid(every: Sequence[Column]) -> str:
    """A GitHub table."""
    lines = [[column.header for column in every], ["---", *["---:"] * (len(every) - 1)]]
    lines += [[_markdown(column.cells[index]) for column in every] for index in range(len(every[0].cells))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _markdown(cell: Cell) -> str:
    text = cell.text.replace("|", "\\|").replace("  ", "&nbsp;&nbsp;")
    return f"**{text}**" if cell.bold else text


def latex_grid(every: Sequence[Column], breaks: Collection[int] = ()) -> str:
    """A booktabs tabular, rules after the lines of the indices `breaks`."""
    lines = [
        " & ".join(_latex(column.cells[index]) for column in every) + (r" \\ \midrule" if index in breaks else r" \\")
        for index in range(len(every[0].cells))
    ]
    head = " & ".join(escape(column.header) for column in every) + r" \\"
    begin = rf"\begin{{tabular}}{{l{'r' * (len(every) - 1)}}}"
    return "\n".join([begin, r"\toprule", head, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}"])


def _latex(cell: Cell) -> str:
    text = escape(cell.text).replace("  ", r"\quad ")
    return rf"\textbf{{{text}}}" if cell.bold else text


def escape(text: str) -> str:
    """Plain text for LaTeX."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(char, f"\\{char}" if char in "&%$#_{}" else char) for char in text)
