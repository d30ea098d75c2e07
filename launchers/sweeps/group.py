"""One name for all runs of a sweep: the same in every process, and when the sweep is started again."""

import hashlib
import re
from pathlib import Path

from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

LONGEST = 100  # characters; W&B takes 128
PLACES = {"hydra", "output", "save", "redo", "cache_gb", "tracker", "local"}  # what no sweep is named by


def group_of(hydra: HydraConf) -> str | None:
    """The experiment's name; of a bare `duet -m` its overrides, without those that say where; None for a single run."""
    experiment = hydra.runtime.choices.get("experiment")
    if experiment or hydra.mode is None or hydra.mode.name != "MULTIRUN":
        return experiment
    folder = Path(hydra.sweep.dir)
    named = " ".join(sorted(filter(_names, _overrides(folder / "multirun.yaml")))) or folder.name
    if len(named) <= LONGEST:
        return named
    return f"{named[: LONGEST - 9]}-{hashlib.sha256(named.encode()).hexdigest()[:8]}"


def _overrides(file: Path) -> list[str]:
    """Those of the whole sweep, where Hydra's sweeper has left them."""
    if not file.exists():
        return []
    return list(OmegaConf.load(file).hydra.overrides.task)


def _names(override: str) -> bool:
    key = OverridesParser.create().parse_override(override).key_or_group
    return re.split("[.@/]", key)[0] not in PLACES and key not in ("engine.device", "experts.workers")
