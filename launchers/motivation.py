"""What DuetMerging builds on, measured: `python -m launchers.motivation [overrides of duet]`. The report draws it."""

import json
import logging
import statistics
import sys
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from launchers.program import Program
from merging.errors import UserError
from merging.files import write_text
from merging.identity import fingerprint

FOLDER = "motivation"  # below output
log = logging.getLogger(__name__)
PROGRAM = Program("python -m launchers.motivation")


@dataclass(frozen=True)
class Measured:
    """One file of facts about experts; see merging.motivation for `blocks` and `matrices`."""

    run_id: str
    suite: str
    family: str
    tasks: list[str]
    seed: int
    split: str  # whose images the neurons saw
    ratio: float  # of neurons that a mask keeps
    mass: float
    blocks: dict[str, dict[str, Any]]
    matrices: dict[str, dict[str, Any]]
    checkpoints: dict[str, str]
    code: str

    def pairs(self, block: str) -> list[float]:
        """Jaccard indices of different tasks' masks."""
        overlap = self.blocks[block]["overlap"]
        return [overlap[one][other] for one, other in combinations(range(len(self.tasks)), 2)]


def run(config: DictConfig) -> Measured:
    """Measure, write the file, print its means. Raises UserError for a method without neurons and as `duet`."""
    from launchers.code_version import code_version
    from launchers.job import resolved, setup_of
    from merging import motivation
    from merging.methods import Duet
    from merging.preflight import check_range

    method, decides = instantiate(config.method, _convert_="all"), resolved(config)
    check_range("mass", config.mass, 0.0, 1.0, open_low=True)
    if not isinstance(method, Duet):
        raise UserError("This measures the masks of method.neurons: choose method=duet or one of its presets.")
    setup = setup_of(config, decides)
    named = {"motivation": [decides["method"]["neurons"], config.mass], "suite": decides["suite"], "seed": config.seed}
    blocks = motivation.blocks(setup.experts, setup.context, method.neurons, config.mass)
    matrices = motivation.matrices(setup.experts)
    measured = Measured(
        run_id=fingerprint([named, setup.checkpoints], 12),
        suite=setup.grid.suite.name,
        family=setup.source.family,
        tasks=list(setup.experts.tasks),
        seed=config.seed,
        split="calibration",
        ratio=method.neurons.ratio,
        mass=config.mass,
        blocks={block: asdict(facts) for block, facts in blocks.items()},
        matrices={key: asdict(facts) for key, facts in matrices.items()},
        checkpoints=setup.checkpoints,
        code=code_version(),
    )
    path = write_text(
        Path(config.output) / FOLDER / f"{measured.run_id}.json", json.dumps(asdict(measured), allow_nan=False)
    )
    show(measured, Console(width=None if sys.stdout.isatty() else 120))
    log.info("written to %s; python -m launchers.report draws it", path)
    return measured


def show(measured: Measured, console: Console) -> None:
    """A line a block: active neurons, overlap of the masks, and what leading directions hold of its two matrices."""
    page = Table("block", "active %", "Jaccard", "at random", box=box.HORIZONTALS)
    for block, facts in measured.blocks.items():
        active, pairs = [100 * share for share in facts["active"]], measured.pairs(block)
        overlap = f"{statistics.fmean(pairs):.3f} (largest {max(pairs):.3f})" if pairs else "-"
        spread = f"{statistics.fmean(active):.1f} ({min(active):.1f} to {max(active):.1f})"
        page.add_row(block, spread, overlap, f"{facts['chance']:.3f}")
    console.print(page)
    energy = Table("matrix", *(f"{mode}: half the ranks" for mode in ("task", "out", "in")), box=box.HORIZONTALS)
    for key, facts in measured.matrices.items():
        energy.add_row(key, *(f"{100 * half(curve):.1f} %" for curve in facts["modes"].values()))
    console.print(energy)


def half(curve: dict[str, list[float]]) -> float:
    """The energy that half of all directions hold; of a flat spectrum half."""
    full = curve["ranks"][-1]
    return next(share for rank, share in zip(curve["ranks"], curve["energy"], strict=True) if 2 * rank >= full)


def read(folder: Path) -> list[Measured]:
    """All files of a folder by suite and seed; what is none of them is named in a warning and left out."""
    files = []
    for path in sorted(folder.glob("*.json")):
        try:
            files.append(Measured(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError) as error:
            log.warning("skipped %s: %s", path, error)
    return sorted(files, key=lambda file: (file.suite, file.family, file.seed, file.run_id))


@hydra.main(config_path="pkg://conf", config_name="motivation", version_base="1.3")
def job(config: DictConfig) -> None:
    """What Hydra calls."""
    from launchers.options import MotivationOptions, check

    def checked() -> None:
        check(config, HydraConfig.get().overrides.task, MotivationOptions)
        run(config)

    PROGRAM.attempt(checked)


def main() -> None:
    """The command."""
    sys.exit(PROGRAM.run(job))


if __name__ == "__main__":
    main()
