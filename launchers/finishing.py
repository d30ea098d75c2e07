"""The row of a cell: found, or computed by one process alone and written, its failure too."""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from launchers import rows
from launchers.cells import Cell, OnTask
from launchers.claims import Taken, claim
from launchers.rows import Row
from merging.context import Log, silent
from merging.errors import UserError

log = logging.getLogger(__name__)


def finish(
    cell: Cell,
    folder: Path,
    on_task: OnTask,
    redo: bool = False,
    save: str | None = None,
    found_level: int = logging.INFO,
    log_step: Log = silent,
) -> Row:
    """The cell's row: found if finished before, else computed and written. A failure is written too, then raised.

    Raises Taken where another process computes it just now.
    """
    anew = redo or save is not None
    done = None if anew else rows.find(folder, cell.run_id)
    if done is None:
        with claim(folder, cell.run_id):
            done = None if anew else rows.find(folder, cell.run_id, logging.DEBUG)  # finished since by another process
            if done is None:
                return _computed(cell, folder, lambda: cell.compute(on_task, save, log_step))
    where = folder / f"{cell.run_id}.json"
    log.log(found_level, "%s: found in %s (redo=true computes it again)", cell.label, where)
    _tidy(cell, folder)
    return done


def _computed(cell: Cell, folder: Path, compute: Callable[[], Row]) -> Row:
    """The row, written to its file. A failure is written too, unless a good row is there, then raised."""
    try:
        row = compute()
    except Exception as error:
        if rows.find(folder, cell.run_id, logging.DEBUG) is None:
            try:
                rows.write(replace(cell.row(), status="error", error=f"{type(error).__name__}: {error}"), folder)
            except UserError as unwritten:
                log.error("The failure of %s has no row: %s", cell.label, unwritten)
        raise
    rows.write(row, folder)
    cell.journal.close()
    return row


def _tidy(cell: Cell, folder: Path) -> None:
    """Remove what a process left behind that was killed just after it wrote the row."""
    journal = cell.journal.folder
    if (folder / f"{cell.run_id}.claim").exists() or (journal is not None and journal.exists()):
        with contextlib.suppress(Taken), claim(folder, cell.run_id):
            cell.journal.close()
