"""What happens around the jobs of a run or sweep: the output folder is checked first, the table is shown last."""

import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from launchers import rows
from launchers.live import ENDED, LISTED, watch
from launchers.results import table, writers
from launchers.results.frame import summarise
from launchers.results.plot import Plot, declared, drawings
from launchers.rows import Row
from launchers.sweeps.axes import parsed
from merging.errors import UserError
from merging.files import write_text

log = logging.getLogger(__name__)
ROOM = 1 << 20  # bytes that must be free for what Hydra, a row and a table write


@contextlib.contextmanager
def one_paragraph() -> Iterator[None]:
    """Exits with the text of a UserError; Hydra would show a traceback before jobs, and only warn after them."""
    try:
        yield
    except UserError as error:
        sys.exit(str(error))


class Report(Callback):
    """Checks the output folder first; shows the table and its figures when the run, or the whole sweep, has ended.

    A sweep is also shown while it runs, unless `live` is False: hydra.callbacks.report.live=false.
    """

    def __init__(self, live: bool = True):
        self.live = live

    @one_paragraph()
    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        check_output(config)
        plot_of(config)

    @one_paragraph()
    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        check_output(config)
        check_saves(config)
        plot_of(config)
        if self.live:
            watch.start(config)

    @one_paragraph()
    def on_job_end(self, config: DictConfig, **_: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            with contextlib.suppress(OSError):  # where the disk is full the job's own error says so
                (Path(config.hydra.runtime.output_dir) / ENDED).touch()
            if config.hydra.launcher._target_.endswith(".BasicLauncher"):
                check_output(config)  # Hydra's own files of the next job would end in a traceback

    @one_paragraph()
    def on_run_end(self, config: DictConfig, **_: Any) -> None:
        show(Path(config.hydra.run.dir), plot_of(config))

    @one_paragraph()
    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        watch.stop()
        show(Path(config.hydra.sweep.dir), plot_of(config))


def check_output(config: DictConfig) -> None:
    """Raises UserError unless `output` names a folder, and files can be made there and in its results, which may be a
    disk of its own."""
    if not isinstance(config.output, str) or not config.output:
        raise UserError(f"output={config.output or ''} names no folder. Write output=<folder>, such as output=outputs.")
    check_writable("output", folder := Path(config.output))
    if (results := folder / "results").exists():
        check_writable("output", results)


def plot_of(config: DictConfig) -> Plot | None:
    """The figure that the configuration declares. Raises UserError for one that cannot be drawn."""
    raw: Any = OmegaConf.to_container(config, resolve=False)
    return None if raw.get("plot") is None else declared(raw["plot"], "this command")


def check_saves(config: DictConfig) -> None:
    """Raises UserError if every job of a sweep would write its model to the same place."""
    raw: Any = OmegaConf.to_container(config, resolve=False)
    overrides = parsed(raw["hydra"]["overrides"]["task"])
    swept = [override.key_or_group for override in overrides if override.is_sweep_override()]
    forms = {"save": "models/{}.safetensors", "push": "user/{}"}
    for name, form in forms.items():
        if isinstance(raw.get(name), str) and "${" not in raw[name] and name not in swept:
            ways = [
                f"'{name}={form.format('${hydra:' + what + '}')}'" for what in ("job.num", "runtime.choices.method")
            ]
            raise UserError(
                f"{name}={raw[name]} would be overwritten by every job of this sweep. Name a file or a folder per job: "
                f"{' or '.join(ways)}."
            )


def check_writable(option: str, folder: Path) -> None:
    """Raises UserError naming the option unless files can be made in `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(ROOM))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"Cannot write to {option}={folder}: {error.strerror}. Free some space or name a folder that you may write "
            "to, then run the same command again; finished rows are kept."
        ) from error


def show(folder: Path, plot: Plot | None = None) -> None:
    """Print one table of all rows made under `folder`, failed ones too; write it and its figures there."""
    listed = sorted({file for job in folder.rglob(LISTED) for file in json.loads(job.read_text())})
    made: list[Row] = rows.read([file for file in listed if Path(file).exists()])
    if not made:
        return
    sheets = table.sheets(made)
    writers.show(sheets, Console(width=None if sys.stdout.isatty() else writers.WIDTH))
    write_text(folder / "table.md", writers.markdown(sheets))
    pictures = ", ".join(f"{name} {path}" for name, path in draw(made, folder, plot).items())
    log.info("table %s, %s, rows %s", folder / "table.md", pictures, Path(listed[0]).parent)


def draw(made: list[Row], folder: Path, plot: Plot | None = None) -> dict[str, Path]:
    """The figures of a table, by name: heatmap.png, routing.png where gates routed, plot.png if one is declared."""
    from launchers.results import heat  # here: importing matplotlib takes longer than all of `duet --help`

    summaries = summarise(made)
    figures = {"heatmap": heat.score_map(summaries)}
    if pairs := [pair for summary in summaries for pair in heat.routed(summary)]:
        figures["routing"] = heat.routing_map(pairs)
    if plot is not None and plot.kind != "scores":
        for number, drawn in enumerate(drawings(plot, "plot", summaries)):
            figures[f"plot-{number}" if number else "plot"] = drawn
    return {name: drawn.write(folder / f"{name}.png", dpi=200) for name, drawn in figures.items()}
