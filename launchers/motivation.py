"""What DuetMerging builds on, measured: `python -m launchers.motivation [overrides of duet]`. The report draws it."""

import json
import logging
import sys
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

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


def run(config: DictConfig) -> None:
    """Measure, write the file, print its means. Raises UserError for a method without neurons and as `duet`."""
    from launchers.cells import code_version
    from launchers.job import built, resolved, setup_of
    from launchers.options import MOTIVATION, check
    from merging import motivation
    from merging.methods import Duet
    from merging.preflight import check_range

    check(config, HydraConfig.get().overrides.task, MOTIVATION)
    method, decides = instantiate(config.method, _convert_="all"), resolved(config)
    check_range("mass", config.mass, 0.0, 1.0, open_low=True)
    if not isinstance(method, Duet):
        raise UserError("This measures the masks of method.neurons: choose method=duet or one of its presets.")
    setup = setup_of(config, decides, *built(config))
    named = {"motivation": [decides["method"]["neurons"], config.mass], "suite": decides["suite"], "seed": config.seed}
    blocks = motivation.blocks(setup.experts, setup.context, method.neurons, config.mass)
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
        matrices={key: asdict(facts) for key, facts in motivation.matrices(setup.experts).items()},
        checkpoints=setup.checkpoints,
        code=code_version(),
    )
    path = Path(config.output) / FOLDER / f"{measured.run_id}.json"
    write_text(path, json.dumps(asdict(measured), allow_nan=False))
    print(summary(measured))
    log.info("written to %s; python -m launchers.report draws it", path)


def summary(measured: Measured) -> str:
    """A line a block: active neurons and overlap of the masks, means over tasks."""
    from pandas import DataFrame

    blocks = {block: {"active %": 100 * fmean(facts["active"]), "Jaccard": fmean(measured.pairs(block) or [0]),
                      "at random": facts["chance"]} for block, facts in measured.blocks.items()}  # fmt: skip
    return DataFrame(blocks).T.round(3).to_string()


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
    PROGRAM.attempt(lambda: run(config))


def main() -> None:
    """The command."""
    sys.exit(PROGRAM.run(job))


if __name__ == "__main__":
    main()
