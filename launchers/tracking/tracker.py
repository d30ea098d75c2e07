"""Live tracking of a run. Use a tracker in a `with` block: one block, one run, also when jobs share a process."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from launchers.rows import Row

Figures = Mapping[str, str | Path]


class Tracker:
    """What a run reports while it goes: `start`, then any number of logs, then `finish`. This one reports nothing."""

    pictures: ClassVar[bool] = False  # whether `finish` uses figures

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        return None

    def start(self, config: Mapping[str, Any], run_id: str, name: str, group: str | None = None) -> None:
        """Open the run, or go on with that of this id, in the group of its sweep. `config` is JSON-able."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log a step of a fit; steps of one name should rise."""

    def log_task(self, task: str, accuracy: float, method: str | None = None) -> None:
        """Log the accuracy (a fraction) of a task just scored; name the method unless it is the run's own."""

    def model_file(self, run_id: str) -> str | None:
        """Where the run is to write its merged model for `finish`, None if it is not wanted."""
        return None

    def finish(self, row: Row, table_rows: Sequence[Row], figures: Figures, model: str | None = None) -> None:
        """Log the result of this run, its table, the pictures of that table by name, and the file of its model."""
