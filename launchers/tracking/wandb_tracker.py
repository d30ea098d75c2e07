"""Weights & Biases as the tracker of a run, online or offline."""

import contextlib
import logging
import netrc
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlparse

from launchers.results.table import records
from launchers.rows import Row
from launchers.tracking.tracker import Figures, Tracker

Mode = Literal["auto", "online", "offline", "disabled"]
STARTING = 5  # seconds that the server may take to open a run, or to answer a request
QUIET = 600.0  # seconds for which a server that did not answer in time is left alone
ROW_CONFIG = ("method", "family", "checkpoints", "splits", "code", "needs", "router", "granularity", "adaptation",
              "opened", "collapsed", "scale_source", "search")  # fmt: skip
log = logging.getLogger(__name__)
_UNANSWERED: dict[str, float] = {}  # server -> until when it is left alone: jobs of one process wait for it once


def client() -> Any:
    """The wandb package, its time-outs set: by default a request is repeated for minutes."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's own telemetry can hold up the process's end
    os.environ.setdefault("WANDB_HTTP_TIMEOUT", str(STARTING))
    import wandb

    return wandb


def server() -> str:
    """The address of the W&B server."""
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")


def default_mode() -> str:
    """WANDB_MODE if set; else online with an API key, a token or a login for the server; else offline."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online"
    file = Path(os.environ.get("NETRC", Path.home() / ("_netrc" if os.name == "nt" else ".netrc")))
    try:  # `wandb login` writes there
        return "online" if (urlparse(server()).hostname or "") in netrc.netrc(file).hosts else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


@dataclass
class WandbTracker(Tracker):
    """Weights & Biases. A failure there is one warning per run: it stops no experiment and loses no data on disk."""

    pictures: ClassVar[bool] = True
    project: str = "duet-merging"
    entity: str | None = None
    mode: Mode = "auto"
    group: str | None = None
    tags: Sequence[str] = ()
    folder: str = "outputs/runs"
    model: bool = False
    timeout: float = 30
    _run: Any = field(default=None, init=False, repr=False)  # wandb's
    _metrics: set[str] = field(default_factory=set, init=False, repr=False)  # with an axis of their own
    _failed: bool = field(default=False, init=False, repr=False)
    _warned: bool = field(default=False, init=False, repr=False)

    def __enter__(self) -> "WandbTracker":
        self._run, self._metrics, self._failed, self._warned = None, set(), False, False
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._run is None:
            return
        folder, run, self._run = Path(self._run.dir).parent, self._run, None
        try:
            run.finish(exit_code=int(kind is not None or self._failed))
        except Exception as error:
            _UNANSWERED[server()] = time.monotonic() + QUIET
            self._warned = False  # this warning says how to lose nothing
            self._warn(f"did not take everything in time. Send it later with `wandb sync {folder}`", error)

    def start(self, config: Mapping[str, Any], run_id: str, name: str, group: str | None = None) -> None:
        mode = default_mode() if self.mode == "auto" else self.mode
        group = self.group or os.environ.get("WANDB_RUN_GROUP") or group
        settings = {"config": dict(config), "id": run_id, "name": name, "group": group}
        if mode == "online":
            if time.monotonic() >= _UNANSWERED.get(server(), 0.0) and self._opened_online(settings):
                return
            mode = "offline"
        with self._guard(f"could not start {mode}"):
            self._open(mode, settings)

    def log(self, values: Mapping[str, float], step: int) -> None:
        if self._run is None:
            return
        with self._guard("lost a step"):
            for metric in values.keys() - self._metrics:  # an axis of its own: W&B refuses its own steps to fall
                self._run.define_metric(metric, step_metric="step")
                self._metrics.add(metric)
            self._run.log({"step": step, **values})

    def log_task(self, task: str, accuracy: float, method: str | None = None) -> None:
        if self._run is None:
            return
        with self._guard(f"lost {task}"):
            self._run.log({f"{method or 'accuracy'}/{task}": accuracy})

    def model_file(self, run_id: str) -> str | None:
        return f"{self.folder}/wandb/models/{run_id}.safetensors" if self.model else None

    def finish(self, row: Row, table_rows: Sequence[Row], figures: Figures, model: str | None = None) -> None:
        if self._run is None:
            return
        self._failed = row.status != "ok"
        with self._guard("lost the result"):
            self._log_result(row, table_rows)
        with self._guard("lost the figures or the table"):
            lines = records(table_rows).round(4).astype(object)
            cells = lines.where(lines.notna(), None).to_numpy().tolist()
            images = {name: client().Image(str(path)) for name, path in figures.items()}
            self._run.log({**images, "table": client().Table(list(lines), cells, allow_mixed_types=True)})
        if self.model and model is not None:
            with self._guard("lost the model"):
                self._log_model(row, Path(model), temporary=model == self.model_file(row.run_id))

    def _opened_online(self, settings: dict[str, Any]) -> bool:
        try:
            self._open("online", settings)
        except Exception as error:
            _UNANSWERED[server()] = time.monotonic() + QUIET
            log.warning("W&B cannot be used now, going on offline. Send the runs later with `wandb sync "
                        "%s/wandb/offline-run-*`. %s: %s: %s", self.folder, server(), type(error).__name__,
                        error)  # fmt: skip
            client().teardown()  # its service would keep the run's id for the attempt that failed
            return False
        return True

    def _open(self, mode: str, settings: dict[str, Any]) -> None:
        wandb = client()
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        settings = {**settings, "project": self.project, "entity": self.entity}
        if os.environ.get("WANDB_SWEEP_ID"):  # the agent has set the others already
            settings = {name: settings[name] for name in ("config", "name", "group")}
        self._run = wandb.init(
            **settings, mode=mode, tags=list(self.tags), dir=self.folder, resume="allow",
            reinit="create_new",  # jobs of one process must not share a run
            settings=wandb.Settings(init_timeout=STARTING, finish_timeout=self.timeout, finish_timeout_raises=True,
                                    silent=True, console="off"),
        )  # fmt: skip
        log.info("W&B %s: %s", mode, self._run.url if mode == "online" else self._run.dir)

    def _log_result(self, row: Row, table_rows: Sequence[Row]) -> None:
        experts = [other for other in table_rows if other.method == "expert"]
        lines = records([row, *experts]).round(4)
        line = lines[lines["run_ids"] == row.run_id].iloc[0].dropna()
        summary = {name: getattr(row, name) for name in ("status", "error", "scale", "macs", "params", "stored_bytes")}
        summary |= {f"seconds/{phase}": seconds for phase, seconds in row.seconds.items()}
        summary |= {f"accuracy/{task}": accuracy for task, accuracy in row.accuracy.items()}
        summary |= {f"unseen/{task}": score.value for task, score in row.unseen.items() if score is not None}
        summary |= {f"routing_accuracy/{task}": share for task, share in row.routing.get("accuracy", {}).items()}
        summary |= {name: line[name] / 100 for name in ("routing_accuracy", "energy") if name in line}
        means = {f"accuracy/{name}": line[name] / 100 for name in ("mean", "norm") if name in line}
        self._run.config.update({"row": {name: getattr(row, name) for name in ROW_CONFIG}}, allow_val_change=True)
        self._run.log(means)
        self._run.summary.update(summary | means)

    def _log_model(self, row: Row, file: Path, temporary: bool) -> None:
        """Read from its file while it is sent; an offline run is sent from there later. A temporary one goes then."""
        facts = {"method": row.method, "run_id": row.run_id, "stored_bytes": row.stored_bytes}
        artifact = client().Artifact(f"{row.method}-{row.run_id}", "model", metadata=facts)
        if file.is_dir():
            artifact.add_dir(str(file.resolve()), policy="immutable")  # no copy
        else:
            artifact.add_file(str(file.resolve()), name="model.safetensors", policy="immutable")
        sent = self._run.log_artifact(artifact)
        if self._run.settings.mode == "online":
            sent.wait(timeout=int(self.timeout))
            if temporary:
                file.unlink()

    @contextlib.contextmanager
    def _guard(self, failure: str) -> Iterator[None]:
        """Hours of work do not hang on W&B: an error becomes a warning, the first of a run only."""
        try:
            yield
        except Exception as error:
            self._warn(failure, error)

    def _warn(self, failure: str, error: Exception) -> None:
        if not self._warned:
            log.warning("W&B %s: %s: %s", failure, type(error).__name__, error)
        self._warned = True
