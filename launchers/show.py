"""One run explained: `python -m launchers.show <run id or a prefix> [--results outputs/results]`."""

import argparse
import difflib
import inspect
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from launchers.cli_help import readable
from launchers.results.command import one_paragraph
from launchers.results.frame import REFERENCES, RESULTS, rows_of, same_experts, summarise
from launchers.results.notes import scale_source
from launchers.results.writers import WIDTH, Cell, Column, draw, render
from launchers.rows import Row, value
from merging.errors import UserError


def pick(rows: Sequence[Row], prefix: str, where: str = RESULTS) -> Row:
    """The one row whose run id begins with `prefix`. Raises UserError for none and for several."""
    matching = {row.run_id: row for row in rows if row.run_id.startswith(prefix.lower())}
    if len(matching) == 1:
        return next(iter(matching.values()))
    if matching:
        listed = "; ".join(f"{row.run_id} {row.method} seed {row.seed}" for row in [*matching.values()][:8])
        raise UserError(f"{len(matching)} runs in {where} begin with {prefix!r}: {listed}. Give more digits.")
    near = difflib.get_close_matches(prefix, [row.run_id for row in rows], 1, 0.5)
    guess = f"Did you mean {near[0]}?" if near else f"The newest is {rows[-1].run_id} ({rows[-1].method})."
    raise UserError(
        f"There is no run {prefix} in {where}. {guess} The names of the files there are the run ids; "
        "python -m launchers.report lists them beside their lines."
    )


def explain(row: Row, rows: Sequence[Row], console: Console, output: str = "outputs") -> None:
    """Print what was merged, how, with which data, what it cost, what came out and how to repeat it."""
    related = [other for other in rows if same_experts(other) == same_experts(row) and other.status == "ok"]
    experts = [other for other in related if other.method == "expert"]
    lines = [line for summary in summarise([*experts, row]) for line in summary.lines.to_dict("records")]
    line = next(line for line in lines if line["run_ids"] == row.run_id)
    title, *facts = _facts(row, rows, line).splitlines()
    console.print(Text.assemble((f"\n{row.method}", "bold"), f"{title}\n"))
    for fact in facts:
        name, _, sentence = fact.partition("|")
        if name:
            console.print(Text.assemble((f"{name:6}", "bold cyan"), sentence))
        elif sentence:
            console.print(Padding(Text(sentence), (0, 0, 0, 6)))
    tables = [_scores(row, line)] if row.status == "ok" else []
    tables += [_unseen(row, related)] if row.unseen and row.status == "ok" else []
    for table in tables:
        console.print(Padding(table, (1, 0, 0, 6)))
    console.print(Text("Repeat it", "bold cyan"))
    console.print(Text(command(row, output)), soft_wrap=True)
    console.print(Text(_caveat(row), "dim"))


def command(row: Row, output: str = "outputs") -> str:
    """The line for a shell that computes the row, or finds it."""
    folder = [] if output == "outputs" else [f"output={readable(output)}"]
    return shlex.join(["duet", *(row.overrides or ()), *folder])


def _facts(row: Row, rows: Sequence[Row], line: Mapping[str, Any]) -> str:
    """The sentences of page/show.txt; the base's costs come from another row."""
    backbone = row.config.get("backbone")
    bases = (other for other in rows if other.method == "base" and other.config.get("backbone") == backbone)
    target = str((row.config.get("method") or {}).get("_target_", ""))
    try:
        docstring = (inspect.getdoc(get_class(target)) or target).splitlines()[0]
    except (ImportError, ValueError):  # a class of another version
        docstring = target
    return render("show.txt", row=row, line=line, base=next(bases, None), docstring=docstring,
                  scale_source=scale_source)  # fmt: skip


def _scores(row: Row, line: Mapping[str, Any]) -> Table:
    """Per task: score, share of the expert's, samples that went to their own expert; the last line is their mean."""
    shares = {task: line[f"norm {task}"] / 100 for task in row.tasks if not isnan(line[f"norm {task}"])}
    columns = {"score %": row.accuracy, "of the expert %": shares, "validation %": row.validation,
               "routing accuracy %": row.routing.get("accuracy")}  # fmt: skip
    known = {name: [scores.get(task) for task in row.tasks] for name, scores in columns.items() if scores}
    means = {name: [*shares, statistics.fmean(share for share in shares if share is not None)]
             for name, shares in known.items()}  # fmt: skip
    texts = {name: _percents(shares) for name, shares in means.items()}
    return _table({"task": [*row.tasks, "mean"], **texts}, frozenset([len(row.tasks) - 1]))


def _unseen(row: Row, related: Sequence[Row]) -> Table:
    """Per held-out task: score, that of the base and of its own expert."""
    references = {f"{other.method} %": other.unseen for other in related if other.method in REFERENCES}
    columns = {name: _percents([value(scores.get(task)) for task in row.unseen])
               for name, scores in ({"score %": row.unseen} | references).items()}  # fmt: skip
    return _table({"unseen task": row.unseen, **columns})


def _table(columns: Mapping[str, Any], breaks: frozenset[int] = frozenset()) -> Table:
    return draw([Column(header, tuple(map(Cell, texts))) for header, texts in columns.items()], breaks=breaks)


def _percents(shares: Sequence[float | None]) -> list[str]:
    return ["-" if share is None else f"{100 * share:.1f}" for share in shares]


def _caveat(row: Row) -> str:
    """What the command may not repeat."""
    from launchers.cells import code_version  # here, because it imports torch

    if row.overrides is None:
        return f"The row is older than the commands in rows: this is the default run. It was written by {row.code}."
    if row.code != (now := code_version()):
        return f"The row was written by {row.code}; this is {now}, whose defaults may be others."
    return "Where the row exists it is found; redo=true computes it again."


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits 1 with one paragraph when there is no such run."""
    parser = argparse.ArgumentParser("python -m launchers.show", description="Explain one run.")
    parser.add_argument("run_id", help="the run's id, or its first digits")
    parser.add_argument("--results", default=RESULTS, help=f"folder of rows ({RESULTS})")
    chosen = parser.parse_args(arguments)
    folder = Path(chosen.results)
    with one_paragraph():
        rows = rows_of([chosen.results])
        row = pick(rows, chosen.run_id.removesuffix(".json"), chosen.results)
    output = str(folder.parent) if folder.name == "results" else "outputs"
    explain(row, rows, Console(width=None if sys.stdout.isatty() else WIDTH), output)


if __name__ == "__main__":
    main()
