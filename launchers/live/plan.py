"""The cells of a sweep before they begin: how many, what each is, which cost alike."""

import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from launchers.live.eta import Kinds
from launchers.sweeps.axes import parsed

MANY = 100_000  # cells that are listed one by one
SAME_EXPERTS = {"method", "scale", "router", "tracker", "engine", "redo", "save", "output"}
Choices = tuple[str, ...]  # the swept overrides of a cell: ("seed=0", "method=ties")


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep: how many (None: not known), what is swept, and what each is if that is known."""

    total: int | None = None
    axes: tuple[str, ...] = ()
    cells: tuple[Choices, ...] = ()


def kinds(choices: Choices) -> Kinds:
    """What tells the cost of a cell: all it is but for what changes the experts; its method."""
    own = tuple(each for each in choices if _root(each) in SAME_EXPERTS)
    return own, next((each for each in choices if each.startswith("method=")), own)


def group(choices: Choices) -> Choices:
    """What cells that share experts have in common."""
    return tuple(each for each in choices if _root(each) not in SAME_EXPERTS)


def planned(config: DictConfig) -> Plan:
    """The cells of Hydra's configuration of a sweep, in its order: the last axis is the fastest."""
    params, own = config.hydra.sweeper.get("params") or {}, config.hydra.overrides.task
    axes = {each.get_key_element(): each for each in parsed([*(f"{k}={v}" for k, v in params.items()), *own])}
    axes = {key: each for key, each in axes.items() if each.is_sweep_override()}
    trials = config.hydra.sweeper.get("n_trials")
    if trials is not None or not all(each.is_discrete_sweep() for each in axes.values()):
        return Plan(trials, tuple(axes))
    values = [[f"{key}={value}" for value in each.sweep_string_iterator()] for key, each in axes.items()]
    total = math.prod(map(len, values))
    return Plan(total, tuple(axes), tuple(itertools.product(*values)) if total <= MANY else ())


def plan_of(folder: Path) -> Plan:
    """The plan that Hydra left in a sweep's folder, where it did."""
    file = folder / "multirun.yaml"
    config = OmegaConf.load(file) if file.exists() else None
    return planned(config) if isinstance(config, DictConfig) else Plan()


def _root(choice: str) -> str:
    return re.split(r"[.@=]", choice)[0]
