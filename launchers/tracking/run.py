"""One open run of Weights & Biases."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from launchers.results.export import records
from launchers.rows import Row
from launchers.tracking import reach
from launchers.tracking.reach import Rest

log = logging.getLogger(__name__)
Figures = Mapping[str, str | Path]
TOLD = ("method", "family", "checkpoints", "splits", "code", "needs", "router", "granularity", "adaptation",
        "opened", "collapsed", "scale_source", "search")  # fmt: skip


class WandbRun:
    """What a run is told. Any failure becomes a warning, the first only: hours of work do not hang on it."""

    def __init__(self, run: Any, online: bool, timeout: float) -> None:
        self._run, self._online, self._timeout = run, online, timeout
        self._failed, self._quiet = False, False
        self._stepped: set[str] = set()
        self._last: list[Callable[[], object]] = []  # what waits for an answer of the server

    def log(self, values: Mapping[str, float], step: int) -> None:
        """A step of training."""
        with self._never_stops("lost a step"):
            for new in values.keys() - self._stepped:  # an axis of its own: W&B refuses its own steps to fall
                self._run.define_metric(new, step_metric="step")
                self._stepped.add(new)
            self._run.log({"step": step, **values})

    def log_task(self, name: str, accuracy: float) -> None:
        """A task just scored."""
        with self._never_stops(f"lost {name}"):
            self._run.log({name: accuracy})

    def finish(self, row: Row, table_rows: Sequence[Row], figures: Figures) -> None:
        """The row, its table and the pictures of that table."""
        self._failed = row.status != "ok"
        with self._never_stops("lost the result"):
            self._result(row, table_rows)
        with self._never_stops("lost the figures"):
            self._pictures(figures)
        self._last.append(partial(self._table, table_rows))

    def add_model(self, row: Row, file: str, passing: bool) -> None:
        """The merged model as an artifact; of a `passing` file nothing is left once it was sent."""
        self._last.append(partial(self._model, row, Path(file), passing))

    def end(self, failed: bool) -> None:
        """End the run. Online the rest is sent in the background where that takes long."""
        exit_code = int(failed or self._failed)
        if self._online:
            told = f"Send it later with `wandb sync {Path(self._run.dir).parent}`."
            Rest(partial(self._close, exit_code), self._timeout, partial(self._cut_off, told)).start()
        else:
            self._close(exit_code)

    def _close(self, exit_code: int) -> None:
        for send in () if self._online and reach.silence() else self._last:
            with self._never_stops("lost the table or the model"):
                send()
        with self._never_stops(f"has no whole record; `wandb sync {Path(self._run.dir).parent}` sends it later"):
            self._run.finish(exit_code=exit_code)

    def _cut_off(self, told: str) -> None:
        self._warn("did not take everything in time. " + told)

    def _result(self, row: Row, table_rows: Sequence[Row]) -> None:
        experts = [other for other in table_rows if other.method == "expert"]
        own = next(record for record in records([row, *experts]) if row.run_id in record["run_ids"])
        facts = {"status": row.status, "error": row.error, "scale": row.scale, "macs": row.macs, "params": row.params}
        facts |= {"stored_bytes": row.stored_bytes, **{f"seconds/{what}": each for what, each in row.seconds.items()}}
        facts |= {f"accuracy/{task}": accuracy for task, accuracy in row.accuracy.items()}
        facts |= {f"unseen/{task}": accuracy for task, accuracy in row.unseen.items() if accuracy is not None}
        facts |= {f"routed_right/{task}": share for task, share in row.routing.get("accuracy", {}).items()}
        facts |= {what: own[what] / 100 for what in ("routed_right", "energy") if own[what] is not None}
        means = {f"accuracy/{what}": own[what] / 100 for what in ("mean", "norm") if own[what] is not None}
        self._run.config.update({"row": {name: getattr(row, name) for name in TOLD}}, allow_val_change=True)
        self._run.log(means)
        self._run.summary.update(facts | means)

    def _pictures(self, figures: Figures) -> None:
        import wandb

        if figures:
            self._run.log({name: wandb.Image(str(path)) for name, path in figures.items()})

    def _table(self, rows: Sequence[Row]) -> None:
        import wandb

        lines = records(rows)
        names = list(dict.fromkeys(name for line in lines for name in line))
        cells: Any = [[line.get(name) for name in names] for line in lines]
        self._run.log({"table": wandb.Table([*names], cells, allow_mixed_types=True)})

    def _model(self, row: Row, file: Path, passing: bool) -> None:
        """Read from its file while it is sent; an offline run is sent from there later."""
        import wandb

        facts = {"method": row.method, "run_id": row.run_id, "stored_bytes": row.stored_bytes}
        artifact = wandb.Artifact(f"{row.method}-{row.run_id}", "model", metadata=facts)
        artifact.add_file(str(file.resolve()), name="model.safetensors", policy="immutable")  # no copy
        sent = self._run.log_artifact(artifact)
        if self._online:
            sent.wait(timeout=int(self._timeout))
            if passing:
                file.unlink()

    def _warn(self, what: str) -> None:
        if not self._quiet:
            log.warning("W&B %s", what)
        self._quiet = True

    @contextlib.contextmanager
    def _never_stops(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._warn(f"{what}: {type(error).__name__}: {error}")
