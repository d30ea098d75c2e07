"""Whether every axis of an experiment exists and every value builds, before anything runs."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import conf
from launchers.sweeps.axes import GROUPS, Sweep, check_exists, choices, composed, is_group, names, parsed, read, unknown
from merging.errors import UserError

PARTS = ("backbone", "experts", "suite", "method", "scale", "router", "engine", "tracker")  # what is built
ELSEWHERE = ("--config", "-c")  # flags that bring in folders which are not looked into here


def problem(arguments: Sequence[str]) -> str | None:
    """What is wrong with the choices of a command line, in one paragraph, its experiment's too; None for nothing."""
    if lacking := next(filter(None, map(_lacking, arguments)), None):
        return lacking
    if any(argument.startswith(ELSEWHERE) for argument in arguments):
        return None
    if not any(re.match("experiment=(?!null$)", argument) for argument in arguments):
        return None
    try:
        check(read([argument for argument in arguments if not argument.startswith("-")]))
    except UserError as error:
        return str(error)
    except HydraException:  # Hydra says what it cannot read
        pass
    return None


def _lacking(argument: str) -> str | None:
    """That an override leaves a part of the configuration out which every run needs."""
    try:
        override = parsed([argument])[0]
    except HydraException:  # a flag, or Hydra says what it cannot read
        return None
    group = override.get_key_element().lstrip("~")
    empty = override.is_delete() or (not override.is_sweep_override() and override.value() is None)
    return (
        f"There is no {group}, which every run needs. Choose one: {group}=<name>." if empty and group in PARTS else None
    )


def check(sweep: Sweep) -> int:
    """How many cells there are. Raises UserError where an axis or key does not exist or a value does not build.

    Every value is tried once, beside the first ones of the other axes, but for shipped files that nothing changes.
    """
    keys = [*sweep.axes, *(override.get_key_element() for override in parsed(sweep.fixed))]
    changed = {*_changed(composed(choices(sweep.fixed))), *(_root(key) for key in keys if not is_group(key))}
    built: set[str] = set()
    for axis, cell in _cells(sweep):
        if _is_shipped(cell.get(axis, "")) and _root(axis) not in changed:
            continue
        groups, options = ([override for key, override in cell.items() if is_group(key) is chooses]
                           for chooses in (True, False))  # fmt: skip
        config = composed([*sweep.fixed, *groups]).copy()
        for override in parsed(options):
            check_exists(config, override.get_key_element())
            OmegaConf.update(config, override.get_key_element(), override.value(), force_add=False)
        _build(config, [*cell.values()] or sweep.fixed, built)
    return math.prod(map(len, sweep.axes.values()))


def _cells(sweep: Sweep) -> Iterator[tuple[str, dict[str, str]]]:
    """The first cell, then those that differ from it in one axis: that axis, and key -> override."""
    first = {key: f"{key}={values[0]}" for key, values in sweep.axes.items()}
    yield "", first
    for key, values in sweep.axes.items():
        for value in values[1:]:
            yield key, first | {key: f"{key}={value}"}


def _changed(config: DictConfig) -> list[str]:
    """The parts that an experiment file changes beyond its choices.

    Raises UserError for a key of its own that nothing refers to: Hydra would add it silently.
    """
    closed = GROUPS - {"experiment", "local", "hydra"}
    chosen = {group: name for group, name in config.hydra.runtime.choices.items() if group.split("@")[0] in closed}
    plain = composed(f"{group}={name}" for group, name in chosen.items())
    text = OmegaConf.to_yaml(config, resolve=False)
    for key in map(str, config):
        if key not in plain and f"${{{key}" not in text:
            raise UserError(f"The experiment has a key too many. {unknown([key], names(plain))}")
    return [part for part in PARTS if OmegaConf.to_yaml(config[part]) != OmegaConf.to_yaml(plain[part])]


def _is_shipped(choice: str) -> bool:
    return Path(conf.__path__[0], _root(choice), f"{choice.rpartition('=')[2]}.yaml").exists()


def _root(key: str) -> str:
    return re.split(r"[.@=]", key)[0]


def _build(config: DictConfig, overrides: Iterable[str], built: set[str]) -> None:
    """Every part that was not `built` with the same values."""
    from launchers.options import check_part  # here, because it imports pydantic, which `--help` does without

    for part in PARTS:
        try:
            values: Any = OmegaConf.to_container(config[part], resolve=True)
            key = part + json.dumps(values, default=str)
            if key not in built:
                check_part(part, values)
                instantiate(config[part], _convert_="all")
                built.add(key)
        except (InstantiationException, OmegaConfBaseException, UserError) as error:
            cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
            raise UserError(f"{', '.join(overrides)} does not build {part}: {cause}") from error
