"""`duet`: compose -> check -> merge -> choose the scale -> score -> rows -> table. The only module that knows Hydra."""

import json
import logging
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException, InstantiationException
from hydra.experimental.callback import Callback
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from launchers import export, rows, table
from launchers.cells import Cell, Setup, finish, needs_of
from launchers.claims import Taken, owner
from launchers.hints import hint
from launchers.plots import heatmap
from launchers.preflight import foresee
from launchers.routing_figure import routing_figure
from launchers.rows import Row
from merging.adapt import Oracle
from merging.cache import GIB, Cache
from merging.errors import UserError
from merging.methods import Base, Expert
from tasks.grid import Fixed, Grid, Search
from tasks.suite import calibration

log = logging.getLogger(__name__)
DECIDES = ("backbone", "experts", "suite", "method", "scale", "router", "engine", "seed")  # what changes a number
LISTED = "rows.json"  # in a job's folder: the row files it makes or finds


def run(config: DictConfig) -> list[str]:
    """One Hydra job: the base, the chosen method and the experts. Returns the row files."""
    folder, here = Path(config.output) / "results", Path(HydraConfig.get().runtime.output_dir)
    if config.save is not None:
        check_writable("save", Path(config.save).parent)
    with instantiate(config.tracker) as tracker:
        wanted = cell(config)
        references = [reference(config, label) for label in ("base", "expert") if label != wanted.label]
        files = [str((folder / f"{each.run_id}.json").resolve()) for each in (wanted, *references)]
        (here / LISTED).write_text(json.dumps(files))
        if elsewhere(wanted, folder):
            return files
        tracker.start(wanted.config, wanted.run_id, f"{wanted.label} {wanted.setup.grid.suite.name}")
        found = [
            finish(each, folder, partial(tracker.log_task, method=each.label), found_level=logging.DEBUG)
            for each in references
            if not elsewhere(each, folder)
        ]
        row = finish(wanted, folder, tracker.log_task, config.redo, config.save, log_step=tracker.log)
        shown = sorted([row, *found], key=lambda each: each.created)
        tracker.finish(row, shown, draw(shown, here) if tracker.pictures else {})
    return files


def elsewhere(wanted: Cell, folder: Path) -> bool:
    """Whether another process computes the cell just now; says so."""
    by = owner(folder, wanted.run_id)
    if by is not None:
        log.info("%s: being computed by %s; run the same command again for its row", wanted.label, by)
    return by is not None


def cell(config: DictConfig) -> Cell:
    """The cell that the configuration names."""
    decides = resolved(config)
    label = HydraConfig.get().runtime.choices["method"]
    method, scale, router = (instantiate(config[part]) for part in ("method", "scale", "router"))
    return Cell(label, method, scale, router, decides, setup_of(config, decides))


def reference(config: DictConfig, label: str) -> Cell:
    """The base or the experts on the same setup; no knob of the run's own method touches them."""
    method = {"base": Base, "expert": Expert}[label]()
    decides = resolved(config) | {"method": {"_target_": f"merging.methods.{type(method).__name__}"}, "scale": None,
                                  "router": None}  # fmt: skip
    return Cell(label, method, Fixed(), Oracle(), decides, setup_of(config, decides))


def resolved(config: DictConfig) -> dict[str, Any]:
    """The part of the configuration that decides the numbers, as plain values."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    decides = {name: plain[name] for name in DECIDES}
    decides["experts"].pop("workers", None)
    decides["suite"].pop("store", None)
    if decides["method"]["_target_"].endswith((".Base", ".Expert")):
        decides["scale"] = None
    if not any(getattr(get_class(target), "routed", False) for target in targets(decides["method"])):
        decides["router"] = None  # what is static, or brings its own gate, is the same under every router
    decides["engine"].pop("device")
    if ((decides["router"] or {}).get("gate") or {}).get("granularity") not in ("batch", "mixed"):
        decides["engine"].pop("batch")  # an image then does not depend on those beside it
    return decides


def targets(method: dict[str, Any]) -> list[str]:
    """The classes of a method's configuration: its own and those of the methods inside it."""
    inner = [each for value in method.values() if isinstance(value, dict) for each in targets(value)]
    return [method["_target_"], *inner] if "_target_" in method else inner


def setup_of(config: DictConfig, decides: dict[str, Any]) -> Setup:
    """Experts and grid of this backbone, suite and seed, shared by the jobs of one process."""
    engine, shared = instantiate(config.engine), ("backbone", "experts", "suite")
    key = json.dumps([config.output, repr(engine), *(decides[name] for name in shared)], sort_keys=True)
    if key not in _SETUPS:
        store = Cache(Path(config.output) / ".cache", int(config.cache_gb * GIB))
        suite, backbone = instantiate(config.suite), instantiate(config.backbone, _convert_="all")
        source = instantiate(config.experts)
        foresee(suite, source, backbone, engine, looked_at(config, decides))
        unlabelled = cache(partial(calibration, suite, backbone, device=engine.place))
        experts = replace(source.open(suite, backbone, store), calibration=unlabelled)
        grid, unfinished = Grid(suite, backbone, engine), store.folder / "unfinished"
        _SETUPS[key] = Setup(experts, grid, source.family, unfinished, getattr(source, "remarks", ()))
    return _SETUPS[key]


_SETUPS: dict[str, Setup] = {}


def looked_at(config: DictConfig, decides: dict[str, Any]) -> list[str]:
    """The splits that this job reads."""
    searched = isinstance(instantiate(config.scale), Search) and decides["scale"] is not None
    learned = decides["router"] is not None or needs_of(instantiate(config.method)) == "inputs"
    return ["test", *["val"] * searched, *["calibration"] * learned]


class Report(Callback):
    """Checks the output folder first; shows the table and its figures when the run, or the whole sweep, has ended."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        check_output(Path(config.output))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        check_output(Path(config.output))
        check_saves(config)

    def on_run_end(self, config: DictConfig, **_: Any) -> None:
        show(Path(config.hydra.run.dir))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        show(Path(config.hydra.sweep.dir))


def check_output(folder: Path) -> None:
    """Exits with one paragraph unless files can be made in `folder`; Hydra would show a traceback."""
    try:
        check_writable("output", folder)
    except UserError as error:
        sys.exit(str(error))


def check_saves(config: DictConfig) -> None:
    """Exits with one paragraph if every job of a sweep would write its model to the same file."""
    raw: Any = OmegaConf.to_container(config, resolve=False)
    same = isinstance(raw["save"], str) and "${" not in raw["save"]
    if same and not _swept("save", raw["hydra"]["overrides"]["task"]):
        sys.exit(
            f"save={raw['save']} would be overwritten by every job of this sweep. Name a file per job: "
            "'save=models/${hydra:job.num}.safetensors' or 'save=models/${hydra:runtime.choices.method}.safetensors'."
        )


def _swept(key: str, overrides: list[str]) -> bool:
    parsed = OverridesParser.create().parse_overrides(overrides)
    return any(each.key_or_group == key and each.is_sweep_override() for each in parsed)


def check_writable(knob: str, folder: Path) -> None:
    """Raises UserError naming the knob unless files can be made in `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"Cannot write to {knob}={folder}: {error.strerror}. Name a folder that you may write to."
        ) from error


def show(folder: Path) -> None:
    """Print one table of all rows made under `folder`, failed ones too; write it and its figures there."""
    listed = sorted({file for found in folder.rglob(LISTED) for file in json.loads(found.read_text())})
    made: list[Row] = rows.read([file for file in listed if Path(file).exists()])
    if not made:
        return
    table.show(made, Console(width=None if sys.stdout.isatty() else table.WIDTH))
    (folder / "table.md").write_text(export.markdown(made))
    pictures = ", ".join(f"{name} {path}" for name, path in draw(made, folder).items())
    log.info("table %s, %s, rows %s", folder / "table.md", pictures, Path(listed[0]).parent)


def draw(made: list[Row], folder: Path) -> dict[str, Path]:
    """The figures of a table, by name: heatmap.png, and routing.png where gates routed."""
    found = {"heatmap": heatmap(made, folder / "heatmap.png"), "routing": routing_figure(made, folder / "routing.png")}
    return {name: path for name, path in found.items() if path is not None}


@hydra.main(config_path="pkg://conf", config_name="config", version_base="1.3")
def job(config: DictConfig) -> list[str]:
    """What Hydra calls. A failure is logged, a UserError as one paragraph, and the other jobs of a sweep go on."""
    try:
        return run(config)
    except Taken as taken:  # between the look and the claim
        log.info("being computed by %s; run the same command again for its row", taken)
        return []
    except Exception as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if not _COMMAND.is_here():  # a job sent elsewhere: only Hydra can carry the failure home
            raise CompactHydraException(str(cause)) if isinstance(cause, UserError) else error from None
        _COMMAND.failed += 1
        log.error(cause, exc_info=not isinstance(cause, UserError))
        return []


@dataclass
class _Command:
    """The process in which `main` runs, and how many of its jobs failed."""

    process: int | None = None
    failed: int = 0

    def is_here(self) -> bool:
        return self.process == os.getpid()


_COMMAND = _Command()


def main() -> None:
    """The console script."""
    _COMMAND.process, _COMMAND.failed = os.getpid(), 0
    try:
        job()
    except KeyboardInterrupt:
        print("\nInterrupted. What was finished is kept; run the same command to go on.", file=sys.stderr)
        sys.exit(130)
    except SystemExit as stop:
        if stop.code == 1 and (advice := hint(sys.argv[1:])):
            print(advice, file=sys.stderr)
        raise
    sys.exit(1 if _COMMAND.failed else 0)


if __name__ == "__main__":
    main()
