"""Live tracking of a run. Use a tracker in a `with` block: one block, one run, also when jobs share a process."""

import contextlib
import logging
import netrc
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol
from urllib.parse import urlparse

from launchers.export import records
from launchers.rows import Row
from merging.errors import UserError

MODES = ("auto", "online", "offline", "disabled")
log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What a run tells the world while it goes: start, then any number of logs, then finish, inside `with`."""

    pictures: ClassVar[bool]

    def __enter__(self) -> "Tracker": ...

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None: ...

    def start(self, config: Mapping[str, Any], run_id: str, name: str) -> None:
        """Open the run; the same `run_id` continues the same run. `config` is resolved and JSON-able."""
        ...

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log a step of training or adapting; steps of one name should rise."""
        ...

    def log_task(self, task: str, accuracy: float, method: str | None = None) -> None:
        """Log the accuracy (a fraction) of a task just scored; name the method unless it is the run's own."""
        ...

    def finish(self, row: Row, table_rows: Sequence[Row], figures: Mapping[str, str | Path]) -> None:
        """Log the result of this run, the table it belongs to and the pictures of that table, by name."""
        ...


class NoTracker:
    """Tells nobody."""

    pictures: ClassVar[bool] = False  # whether `finish` wants figures

    def __enter__(self) -> "NoTracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        pass

    def start(self, config: Mapping[str, Any], run_id: str, name: str) -> None:
        pass

    def log(self, values: Mapping[str, float], step: int) -> None:
        pass

    def log_task(self, task: str, accuracy: float, method: str | None = None) -> None:
        pass

    def finish(self, row: Row, table_rows: Sequence[Row], figures: Mapping[str, str | Path]) -> None:
        pass


@dataclass
class WandbTracker:
    """Weights & Biases. Whatever goes wrong there is warned of once and never stops the experiment."""

    pictures: ClassVar[bool] = True
    project: str = "duet-merging"
    entity: str | None = None
    mode: str = "auto"
    group: str | None = None
    tags: Sequence[str] = ()
    folder: str = "outputs/runs"
    timeout: float = 60
    _run: Any = field(default=None, init=False, repr=False)
    _failed: bool = field(default=False, init=False, repr=False)
    _warned: bool = field(default=False, init=False, repr=False)
    _stepped: set[str] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"tracker.mode is {self.mode!r}; it must be one of {', '.join(MODES)}.")

    def __enter__(self) -> "WandbTracker":
        self._run, self._failed, self._warned, self._stepped = None, False, False, set()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._never_stops("ended without a whole record"):
            if self._run is not None:
                self._run.finish(exit_code=int(kind is not None or self._failed))
        self._run = None

    def start(self, config: Mapping[str, Any], run_id: str, name: str) -> None:
        mode = default_mode() if self.mode == "auto" else self.mode
        with self._never_stops(f"could not start {mode}" + ", trying offline" * (mode == "online")):
            self._run = self._open(mode, config, run_id, name)
        if self._run is None and mode == "online":
            with self._never_stops("could not start offline either"):
                self._run = self._open("offline", config, run_id, name)

    def log(self, values: Mapping[str, float], step: int) -> None:
        with self._never_stops("lost a step"):
            if self._run is None:
                return
            for new in values.keys() - self._stepped:  # an axis of its own: W&B refuses its own steps to fall
                self._run.define_metric(new, step_metric="step")
                self._stepped.add(new)
            self._run.log({"step": step, **values})

    def log_task(self, task: str, accuracy: float, method: str | None = None) -> None:
        with self._never_stops(f"lost the accuracy on {task}"):
            if self._run is not None:
                self._run.log({f"{method or 'accuracy'}/{task}": accuracy})

    def finish(self, row: Row, table_rows: Sequence[Row], figures: Mapping[str, str | Path]) -> None:
        self._failed = row.status != "ok"
        if self._run is None:
            return
        with self._never_stops("lost the result"):
            self._result(row, table_rows)
        with self._never_stops("lost the figures"):
            self._pictures(figures)
        with self._never_stops("lost the table"):  # last: it alone asks the server something
            self._table(table_rows)

    def _open(self, mode: str, config: Mapping[str, Any], run_id: str, name: str) -> Any:
        import wandb

        Path(self.folder).mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=mode,  # type: ignore[arg-type]
            group=self.group,
            tags=list(self.tags),
            dir=self.folder,
            config=dict(config),
            id=run_id,
            name=name,
            resume="allow",
            reinit="create_new",  # jobs of one process must not share a run
            settings=wandb.Settings(init_timeout=self.timeout, finish_timeout=self.timeout, silent=True, console="off"),
        )
        log.info("W&B %s: %s", mode, run.url if mode == "online" else run.dir)
        return run

    def _result(self, row: Row, table_rows: Sequence[Row]) -> None:
        experts = [other for other in table_rows if other.method == "expert"]
        own = next(record for record in records([row, *experts]) if row.run_id in record["run_ids"])
        facts = {"status": row.status, "error": row.error, "scale": row.scale, "macs": row.macs, "params": row.params}
        facts |= {"stored_bytes": row.stored_bytes, **{f"seconds/{what}": each for what, each in row.seconds.items()}}
        facts |= {f"accuracy/{task}": accuracy for task, accuracy in row.accuracy.items()}
        facts |= {f"routed_right/{task}": share for task, share in row.routing.get("accuracy", {}).items()}
        facts |= {what: own[what] / 100 for what in ("routed_right", "energy") if own[what] is not None}
        means = {f"accuracy/{what}": own[what] / 100 for what in ("mean", "norm") if own[what] is not None}
        told = ("method", "family", "checkpoints", "splits", "code", "needs", "router", "granularity", "adaptation",
                "collapsed", "scale_source")  # fmt: skip
        self._run.config.update({"row": {name: getattr(row, name) for name in told}}, allow_val_change=True)
        self._run.log(means)
        self._run.summary.update(facts | means)

    def _pictures(self, figures: Mapping[str, str | Path]) -> None:
        import wandb

        if figures:
            self._run.log({name: wandb.Image(str(path)) for name, path in figures.items()})

    def _table(self, rows: Sequence[Row]) -> None:
        import wandb

        lines = records(rows)
        names = list(dict.fromkeys(name for line in lines for name in line))
        cells: Any = [[line.get(name) for name in names] for line in lines]
        self._run.log({"table": wandb.Table([*names], cells, allow_mixed_types=True)})

    @contextlib.contextmanager
    def _never_stops(self, what: str) -> Iterator[None]:
        """Any failure of the tracker becomes a warning, the first of a run only: hours of work do not hang on it."""
        try:
            yield
        except Exception as error:
            if not self._warned:
                log.warning("W&B %s: %s: %s", what, type(error).__name__, error)
            self._warned = True


def default_mode() -> str:
    """WANDB_MODE if set; else online with an API key, a token or a login for the server; else offline."""
    if (told := os.environ.get("WANDB_MODE", "")) in MODES[1:]:
        return told
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online"
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    file = Path(os.environ.get("NETRC", Path.home() / ("_netrc" if os.name == "nt" else ".netrc")))
    try:  # `wandb login` writes there
        return "online" if host in netrc.netrc(file).hosts else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"
