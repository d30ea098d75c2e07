"""Tables for papers, pages and programs: LaTeX, markdown and CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from launchers.results.columns import Cell, columns
from launchers.results.frame import Line, Value, summarise
from launchers.results.notes import first_line, notes
from launchers.rows import Row


def markdown(rows: Iterable[Row]) -> str:
    """GitHub tables, notes below."""
    pages = []
    for summary in summarise(rows):
        every = columns(summary)
        lines = [[column.header for column in every], ["---", *["---:"] * (len(every) - 1)]]
        lines += [[_markdown(column.cells[index]) for column in every] for index in range(len(summary.lines))]
        grid = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        pages.append(f"**{summary.suite}**\n\n{grid}\n\n" + "\n".join(f"- {note}" for note in notes(summary)))
    return "\n\n".join(pages) + "\n"


def _markdown(cell: Cell) -> str:
    text = (cell.text + (f" {cell.deviation}" if cell.deviation else "")).replace("|", "\\|")
    return f"**{text}**" if cell.bold else text


def latex(rows: Iterable[Row]) -> str:
    """booktabs tabulars, notes as comments."""
    pages = []
    for summary in summarise(rows):
        every = columns(summary)
        body = [" & ".join(_latex(column.cells[index]) for column in every) for index in range(len(summary.lines))]
        ends = [r" \\ \midrule" if index in summary.breaks else r" \\" for index in range(len(summary.lines))]
        pages.append(
            "\n".join(
                [
                    rf"% {summary.suite}; needs \usepackage{{booktabs}}",
                    rf"\begin{{tabular}}{{l{'r' * (len(every) - 1)}}}",
                    r"\toprule",
                    " & ".join(_escape(column.header) for column in every) + r" \\",
                    r"\midrule",
                    *(line + end for line, end in zip(body, ends, strict=True)),
                    r"\bottomrule",
                    r"\end{tabular}",
                    *(f"% {note}" for note in notes(summary)),
                ]
            )
        )
    return "\n\n".join(pages) + "\n"


def _latex(cell: Cell) -> str:
    text = rf"\textbf{{{_escape(cell.text)}}}" if cell.bold else _escape(cell.text)
    return text + (rf" $\pm$ {cell.deviation[1:]}" if cell.deviation else "")


def _escape(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(char, f"\\{char}" if char in "&%$#_{}" else char) for char in text)


def comma_separated(rows: Iterable[Row]) -> str:
    """One line a method with every column; percent with 4 decimals, deviations in columns of their own.

    routed_right: images whose largest weight is their own task's; energy: what the routed parts hold of the changes.
    """
    lines = records(rows)
    page = io.StringIO()
    writer = csv.DictWriter(page, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return page.getvalue()


def records(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The lines of all tables as flat mappings of numbers and text, None where nothing is known."""
    return [_record(line) for summary in summarise(rows) for line in summary.lines]


def _record(line: Line) -> dict[str, Any]:
    row = line.rows[0]
    shares = {**line.accuracy, "mean": line.mean, "norm": line.norm}
    return {
        "suite": row.suite,
        "method": line.label,
        "status": row.status,
        "n": len(line.rows),
        **{name: text for task in [*row.tasks, "mean", "norm"] for name, text in _pair(task, shares.get(task))},
        **{name: text for task in row.unseen for name, text in _pair(f"unseen {task}", line.unseen.get(task))},
        "scale": _joined([each.scale for each in line.rows]),
        "scale_source": row.scale_source,
        "scale_criterion": row.search.get("criterion"),
        "scales_scored": row.search.get("scored"),
        "needs": row.needs,
        "router": row.router,
        "granularity": row.granularity,
        "adaptation": row.adaptation,
        "opened": "; ".join(f"{split}: {', '.join(who)}" for split, who in row.opened.items()) or None,
        **dict(_pair("routed_right", line.routed_right)),
        **dict(_pair("energy", line.energy)),
        "collapsed": " ".join(dict.fromkeys(task for each in line.rows for task in each.collapsed)) or None,
        "family": row.family,
        "stored_bytes": row.stored_bytes,
        "params": row.params,
        "macs": row.macs,
        "merge_seconds": _joined([each.seconds.get("merge") for each in line.rows]),
        "router_seconds": _joined([each.seconds.get("router") for each in line.rows]),
        "seeds": _joined([each.seed for each in line.rows]),
        "code": " ".join(dict.fromkeys(each.code for each in line.rows)),
        "run_ids": " ".join(each.run_id for each in line.rows),
        "error": first_line(row.error) if line.failed else None,
    }


def _joined(values: Sequence[Any]) -> Any:
    """The one value of all seeds, or all of them in a text."""
    return values[0] if len(set(values)) == 1 else " ".join(map(str, values))


def _pair(name: str, value: Value | None) -> list[tuple[str, float | None]]:
    numbers = (None, None) if value is None else (value.mean, value.deviation)
    mean, deviation = (None if number is None else round(100 * number, 4) for number in numbers)
    return [(name, mean), (f"{name} sd", deviation)]
