"""One run explained: `python -m launchers.show <run id or a prefix> [--results outputs/results]`."""

import argparse
import difflib
import inspect
import logging
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from launchers.quoting import readable
from launchers.results.frame import REFERENCES, Line, same_experts, summarise
from launchers.results.labels import identity
from launchers.results.notes import scale_source
from launchers.results.table import RESULTS, WIDTH, rows_of
from launchers.rows import Row, value
from launchers.sweeps.axes import choices, composed, is_group, parsed
from merging.errors import UserError
from tasks.score import Score


def pick(rows: Sequence[Row], prefix: str, where: str = RESULTS) -> Row:
    """The one row whose run id begins with `prefix`. Raises UserError for none and for several."""
    found = {row.run_id: row for row in rows if row.run_id.startswith(prefix.lower())}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        listed = "; ".join(f"{row.run_id} {row.method} seed {row.seed}" for row in [*found.values()][:8])
        raise UserError(f"{len(found)} runs in {where} begin with {prefix}: {listed}. Give more digits.")
    near = difflib.get_close_matches(prefix, [row.run_id for row in rows], 1, 0.5)
    guess = f"Did you mean {near[0]}?" if near else f"The newest is {rows[-1].run_id} ({rows[-1].method})."
    raise UserError(
        f"There is no run {prefix} in {where}. {guess} The names of the files there are the run ids; "
        "python -m launchers.report lists them beside their lines."
    )


def explain(row: Row, rows: Sequence[Row], console: Console, output: str = "outputs") -> None:
    """Print what was merged, how, with which data, what it cost, what came out and how to repeat it."""
    line = _line(row, rows)
    console.print(Text.assemble((f"\n{row.method}", "bold"), f" on {row.suite}, run {row.run_id}: {_verdict(line)}\n"))
    facts = {
        "What": _what(row, rows),
        "How": _how(row),
        "Data": _data(row),
        "Cost": _cost(row, rows),
        "From": _origin(row),
    }
    for name, sentences in facts.items():
        console.print(Text.assemble((f"{name:6}", "bold cyan"), sentences[0]))
        for sentence in sentences[1:]:
            console.print(Padding(Text(sentence), (0, 0, 0, 6)))
    if row.overrides:
        console.print(_changes(row.overrides))
    if not line.failed:
        console.print(_scores(row, line))
    if not line.failed and row.unseen:
        console.print(_unseen(row, rows))
    console.print(Text("Repeat it", "bold cyan"))
    console.print(Text(command(row, output)), soft_wrap=True)
    console.print(Text(_caveat(row), "dim"))


def command(row: Row, output: str = "outputs") -> str:
    """The line for a shell that computes the row, or finds it."""
    place = [] if output == "outputs" else [f"output={readable(output)}"]
    return shlex.join(["duet", *(row.overrides or ()), *place])


def _line(row: Row, rows: Sequence[Row]) -> Line:
    experts = [other for other in rows if other.method == "expert" and other.status == "ok"]
    (line,) = (
        line for summary in summarise([row, *experts]) for line in summary.lines
        if any(each.run_id == row.run_id for each in line.rows)
    )  # fmt: skip
    if len(line.rows) == 1:
        return line
    return _line(row, [])  # an expert row beside those of other seeds


def _verdict(line: Line) -> str:
    if line.mean is None:
        return f"failed, {line.rows[0].error}"
    relative = "" if line.norm is None else f", {100 * line.norm.mean:.1f} % of the experts'"
    return f"mean accuracy {100 * line.mean.mean:.1f} %{relative}"


def _what(row: Row, rows: Sequence[Row]) -> list[str]:
    base = row.checkpoints.get("base", "unknown")[:12]
    return [
        f"{len(row.tasks)} experts of the family {row.family}: {', '.join(row.tasks)}.",
        f"Base checkpoint {base}; experts " + ", ".join(row.checkpoints.get(task, "?")[:8] for task in row.tasks) + ".",
        *_alike(row, rows),
    ]


def _alike(row: Row, rows: Sequence[Row]) -> list[str]:
    """How alike these experts are, where a row of theirs tells."""
    known = (each for each in rows if each.similarity and each.checkpoints == row.checkpoints)
    pairs = [(cosine, one, other) for each in known for one, line in zip(each.tasks, each.similarity, strict=True)
             for other, cosine in zip(each.tasks, line, strict=True) if one < other]  # fmt: skip
    if not pairs:
        return []
    most, one, other = max(pairs)
    mean = statistics.fmean(cosine for cosine, _, _ in pairs)
    return [f"Cosine between their task vectors: {mean:.3f} on average, {most:.3f} for {one} and {other}."]


def _how(row: Row) -> list[str]:
    said = [f"{row.method}: {_docstring(row.config.get('method') or {})}"]
    if row.scale is not None:
        said.append(f"Scale {row.scale:.3g}, {scale_source(row)}.")
    if row.router != "none":
        told = " (told the true task of every image)" if row.router == "oracle" else ""
        said.append(f"Router {row.router}{told}, one set of weights per {row.granularity}.")
    if row.collapsed:
        said.append(f"Suspected of collapse: {', '.join(row.collapsed)}.")
    return said


def _docstring(method: Mapping[str, Any]) -> str:
    target = str(method.get("_target_", ""))
    try:
        return (inspect.getdoc(get_class(target)) or target).splitlines()[0]
    except (ImportError, ValueError):  # a class of another version
        return target


def _data(row: Row) -> list[str]:
    sizes = {task: f"{split.get('size', '?')}" for task, split in row.splits.items()}
    names = " and ".join(sorted({str(split.get("name")) for split in row.splits.values()})) or "an unknown"
    images = f"{next(iter(sizes.values()))} images a task" if len({*sizes.values()}) == 1 else (
        ", ".join(f"{task} {size}" for task, size in sizes.items()))  # fmt: skip
    labelled = row.needs == "labels"
    seen = {"none": "It saw no image before.", "test": "It saw the unlabelled test images before (transductive)."}
    return [
        f"Scored on the {names} split ({images}), seed {row.seed}.",
        f"The method needs {row.needs} besides weights. "
        + seen.get(
            row.adaptation, f"It saw the {'labelled' if labelled else 'unlabelled'} {row.adaptation} images before."
        )
        + "".join(
            f" {split.capitalize()} images were opened by {', '.join(who)}." for split, who in row.opened.items()
        ),
        *row.remarks,
    ]


def _cost(row: Row, rows: Sequence[Row]) -> list[str]:
    backbone = row.config.get("backbone")
    bases = [other for other in rows if other.method == "base" and other.config.get("backbone") == backbone]
    said = []
    if row.stored_bytes:
        more = f", {row.stored_bytes / bases[0].stored_bytes:.2f} x the base" if bases else ""
        parameters = f"; {row.params:,} numbers for what is mixed and for the gates" if row.params else ""
        said.append(f"{row.stored_bytes / 1e6:.1f} MB to store{more}{parameters}.")
    times = f", {row.macs / bases[0].macs:.2f} x the base" if bases and bases[0].macs else ""
    said.append(f"{row.macs / 1e9:.3g} G multiply-accumulates per image{times}.")
    spent = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in row.seconds.items())
    return [*said, f"{spent}; {sum(row.seconds.values()):.1f} s in all." if spent else "No time was recorded."]


def _origin(row: Row) -> list[str]:
    return [f"code {row.code}, {row.created}, {row.run_id}.json"]


def _changes(overrides: Sequence[str]) -> Padding:
    """The choices and options of the command, beside what `duet` has by default."""
    table = Table("choice or option", "this run", "default", box=SIMPLE_HEAD, pad_edge=False, header_style="bold cyan")
    usual = composed(()).hydra.runtime.choices
    try:
        config = composed(choices(overrides))
    except (UserError, HydraException):  # a choice that is gone
        config = composed(())
    for override in parsed(overrides):
        key = override.get_key_element()
        default = usual.get(key) if is_group(key) else OmegaConf.select(config, key.lstrip("+~"))
        told = "-" if default is None else str(default)
        table.add_row(Text(key), Text(override.get_value_element_as_str()), Text(told, "dim"))
    return Padding(table, (1, 0, 0, 6))


def _scores(row: Row, line: Line) -> Padding:
    """Per task: accuracy, share of the expert's, images that went to their own part; the last line is their mean."""
    table = Table("task", box=SIMPLE_HEAD, pad_edge=False, header_style="bold cyan")
    columns = {"accuracy %": row.accuracy}
    if line.normalised:
        columns["of the expert %"] = {task: value.mean for task, value in line.normalised.items()}
    if row.validation:
        columns["validation %"] = row.validation
    if row.routing:
        columns["routed right %"] = row.routing["accuracy"]
    for name in columns:
        table.add_column(name, justify="right")
    for task in row.tasks:
        last = task == row.tasks[-1]
        table.add_row(task, *(_percent(scores.get(task)) for scores in columns.values()), end_section=last)
    table.add_row("mean", *(_percent(statistics.fmean(scores.values())) for scores in columns.values()))
    return Padding(table, (1, 0, 0, 6))


def _unseen(row: Row, rows: Sequence[Row]) -> Padding:
    """Per held-out task: accuracy, that of the base and of its own expert, and whose parts the gates gave it."""
    table = Table("unseen task", box=SIMPLE_HEAD, pad_edge=False, header_style="bold cyan")
    peers = [each for each in rows if each.status == "ok" and same_experts(each) == same_experts(row)]
    references = {each.method: _values(each.unseen) for each in peers}
    columns = {"accuracy %": _values(row.unseen)} | {
        f"{name} %": references[name] for name in REFERENCES if name in references
    }
    for name in columns:
        table.add_column(name, justify="right")
    borrowed = row.routing.get("unseen", {})
    if borrowed:
        table.add_column("mean weights")
    for task in row.unseen:
        weights = zip(row.tasks, borrowed.get(task, ()), strict=False)
        most = sorted(weights, key=lambda each: -abs(each[1]))[:3]
        told = ", ".join(f"{name} {100 * weight:.0f} %" for name, weight in most)
        table.add_row(task, *(_percent(scores.get(task)) for scores in columns.values()), *[told] * bool(borrowed))
    return Padding(table, (1, 0, 0, 6))


def _values(scores: Mapping[str, Score | None]) -> dict[str, float | None]:
    return {task: value(score) for task, score in scores.items()}


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _caveat(row: Row) -> str:
    """Whether the command is the same run with the configuration of today."""
    from launchers.job import config_of  # here, because it imports torch

    if row.overrides is None:
        return f"The row is older than the commands in rows: this is the default run. It was written by {row.code}."
    try:
        config = composed(row.overrides)
        now = config_of(config, row.method, row.method != config.hydra.runtime.choices.method)
    except (UserError, HydraException, OmegaConfBaseException, ImportError) as error:
        return f"This version of the configuration cannot compose it: {str(error).splitlines()[0]} See {row.code}."
    then, today = identity(row), identity(replace(row, config=now))
    changed = sorted(key for key in then.keys() | today.keys() if then.get(key, ...) != today.get(key, ...))
    if not changed:
        return "It is the same run: where the row exists it is found; redo=true computes it again."
    return f"The row was written by another version of the configuration ({row.code}), with other {', '.join(changed)}."


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits 1 with one paragraph when there is no such run."""
    parser = argparse.ArgumentParser("python -m launchers.show", description="Explain one run.")
    parser.add_argument("run_id", help="the run's id, or its first digits")
    parser.add_argument("--results", default=RESULTS, help=f"folder of rows ({RESULTS})")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    folder = Path(chosen.results)
    try:
        rows = rows_of([chosen.results])
        row = pick(rows, chosen.run_id.removesuffix(".json"), chosen.results)
    except UserError as error:
        sys.exit(f"error: {error}")
    output = str(folder.parent) if folder.name == "results" else "outputs"
    explain(row, rows, Console(width=None if sys.stdout.isatty() else WIDTH), output)


if __name__ == "__main__":
    main()
