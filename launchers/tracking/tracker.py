"""Live tracking of a run. Use a tracker in a `with` block: one block, one run, also when jobs share a process."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from launchers.rows import Row
from launchers.tracking import reach
from launchers.tracking.reach import Mode, default_mode
from launchers.tracking.run import Figures, WandbRun

STARTING = 10  # seconds that a server which answers may take to open a run
log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What a run tells the world while it goes: start, then any number of logs, then finish, inside `with`."""

    pictures: ClassVar[bool]

    def __enter__(self) -> "Tracker": ...

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None: ...

    def start(self, config: Mapping[str, Any], run_id: str, name: str, group: str | None = None) -> None:
        """Open the run; the same `run_id` continues the same run. `config` is resolved and JSON-able.

        `group` gathers the runs of a sweep unless the tracker has a group of its own.
        """
        ...

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log a step of training or adapting; steps of one name should rise."""
        ...

    def log_task(self, task: str, accuracy: float, method: str | None = None) -> None:
        """Log the accuracy (a fraction) of a task just scored; name the method unless it is the run's own."""
        ...

    def model_file(self, run_id: str) -> str | None:
        """Where the run is to write its merged model for `finish`, None if it is not wanted."""
        ...

    def finish(self, row: Row, table_rows: Sequence[Row], figures: Figures, model: str | None = None) -> None:
        """Log the result of this run, its table, the pictures of that table by name, and the file of its model."""
        ...


class NoTracker:
    """Tells nobody."""

    pictures: ClassVar[bool] = False  # whether `finish` wants figures

    def __enter__(self) -> "NoTracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        pass

    def start(self, config: Mapping[str, Any], run_id: str, name: str, group: str | None = None) -> None:
        pass

    def log(self, values: Mapping[str, float], step: int) -> None:
        pass

    def log_task(self, task: str, accuracy: float, method: str | None = None) -> None:
        pass

    def model_file(self, run_id: str) -> str | None:
        return None

    def finish(self, row: Row, table_rows: Sequence[Row], figures: Figures, model: str | None = None) -> None:
        pass


@dataclass
class WandbTracker:
    """Weights & Biases. Whatever goes wrong there is warned of once and neither stops nor delays the experiment."""

    pictures: ClassVar[bool] = True
    project: str = "duet-merging"
    entity: str | None = None
    mode: Mode = "auto"
    group: str | None = None
    tags: Sequence[str] = ()
    folder: str = "outputs/runs"
    model: bool = False
    timeout: float = 60
    _run: WandbRun | None = field(default=None, init=False, repr=False)

    def __enter__(self) -> "WandbTracker":
        self._run = None
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._run is not None:
            self._run.end(failed=kind is not None)
        self._run = None

    def start(self, config: Mapping[str, Any], run_id: str, name: str, group: str | None = None) -> None:
        mode = default_mode() if self.mode == "auto" else self.mode
        group = self.group or os.environ.get("WANDB_RUN_GROUP") or group
        settings = {"config": dict(config), "id": run_id, "name": name, "group": group}
        if mode == "online":
            if (problem := reach.silence()) is None:
                try:
                    self._run = self._open("online", settings)
                    return
                except Exception as error:
                    problem = f"{type(error).__name__}: {error}"
                    reach.give_up(problem)
            mode = "offline"
            log.warning("W&B cannot be used now, going on offline. Send the runs later with `wandb sync "
                        "%s/wandb/offline-run-*`. %s: %s", self.folder, reach.server(), problem)  # fmt: skip
        try:
            self._run = self._open(mode, settings)
        except Exception as error:
            log.warning("W&B could not start %s: %s: %s", mode, type(error).__name__, error)

    def log(self, values: Mapping[str, float], step: int) -> None:
        if self._run is not None:
            self._run.log(values, step)

    def log_task(self, task: str, accuracy: float, method: str | None = None) -> None:
        if self._run is not None:
            self._run.log_task(f"{method or 'accuracy'}/{task}", accuracy)

    def model_file(self, run_id: str) -> str | None:
        return f"{self.folder}/wandb/models/{run_id}.safetensors" if self.model else None

    def finish(self, row: Row, table_rows: Sequence[Row], figures: Figures, model: str | None = None) -> None:
        if self._run is not None:
            self._run.finish(row, table_rows, figures)
            if self.model and model is not None:
                self._run.add_model(row, model, passing=model == self.model_file(row.run_id))

    def _open(self, mode: str, settings: dict[str, Any]) -> WandbRun:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's own telemetry can hold up the process's end
        import wandb

        Path(self.folder).mkdir(parents=True, exist_ok=True)
        place = {"project": self.project, "entity": self.entity}
        if os.environ.get("WANDB_SWEEP_ID"):  # the agent has told these already
            place, settings = {}, {name: value for name, value in settings.items() if name != "id"}
        run = wandb.init(
            **place,
            **settings,
            mode=mode,  # type: ignore[arg-type]
            tags=list(self.tags),
            dir=self.folder,
            resume="allow",
            reinit="create_new",  # jobs of one process must not share a run
            settings=wandb.Settings(
                init_timeout=min(STARTING, self.timeout),
                finish_timeout=self.timeout,
                finish_timeout_raises=True,
                silent=True,
                console="off",
            ),
        )
        log.info("W&B %s: %s", mode, run.url if mode == "online" else run.dir)
        return WandbRun(run, mode == "online", self.timeout)
