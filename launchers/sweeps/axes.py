"""What a command line and its experiment sweep, and the name of the sweep."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf

import conf
from merging.errors import UserError

GROUPS = {path.name for path in Path(conf.__path__[0]).iterdir() if path.is_dir()}
Value = str | int | float | bool | None | list[Any] | dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """What is swept: `fixed` overrides, and the values of every axis as Hydra writes them, in order.

    Of an axis in `intervals`, which a search alone can sweep, the values are its ends.
    """

    fixed: tuple[str, ...]
    axes: Mapping[str, tuple[str, ...]]
    intervals: frozenset[str] = frozenset()


def read(arguments: Sequence[str]) -> Sweep:
    """The sweep of a command line: what its experiment sweeps, changed or added to by its own overrides.

    Raises UserError where Hydra cannot compose it, with the nearest name.
    """
    overrides = parsed(arguments)
    fixed = tuple(override.input_line or "" for override in overrides if not override.is_sweep_override())
    axes = axes_of(composed(fixed).hydra.sweeper.get("params"), overrides)
    intervals = frozenset(key for key, override in axes.items() if isinstance(override.value(), IntervalSweep))
    return Sweep(fixed, {key: values_of(override) for key, override in axes.items()}, intervals)


def axes_of(params: Mapping[str, Any] | None, overrides: Sequence[Override]) -> dict[str, Override]:
    """The axes of an experiment's `params` and of a command line, which wins, as in Hydra's sweeper."""
    declared = parsed(f"{key}={values}" for key, values in (params or {}).items())
    last = {override.get_key_element(): override for override in (*declared, *overrides)}
    return {key: override for key, override in last.items() if override.is_sweep_override() or override in declared}


def values_of(axis: Override) -> tuple[str, ...]:
    """The values of an axis as text; of an interval its ends."""
    if not axis.is_sweep_override():
        return (axis.get_value_element_as_str(),)
    value = axis.value()
    return (str(value.start), str(value.end)) if isinstance(value, IntervalSweep) else (*axis.sweep_string_iterator(),)


def parsed(overrides: Iterable[str]) -> list[Override]:
    """Hydra's own reading of overrides."""
    return OverridesParser.create().parse_overrides(list(overrides))


def value_of(text: str) -> Value:
    """A swept value as Python reads it."""
    return parsed([f"x={text}"])[0].value()  # type: ignore[return-value]


def composed(overrides: Iterable[str]) -> DictConfig:
    """The configuration with Hydra's own part, not to be changed.

    Raises UserError with the nearest name where a choice or key is unknown.
    """
    return _composed(tuple(overrides))


@lru_cache(maxsize=64)
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    try:
        with initialize_config_module("conf", version_base="1.3"):
            return compose("config", list(overrides), return_hydra_config=True)
    except MissingConfigException as error:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        raise UserError(unknown([group, name], list(error.options or []), f"{group}={name}")) from error
    except HydraException:
        groups = choices(overrides)
        if len(groups) < len(overrides):
            config = composed(groups)
            for override in parsed(set(overrides) - set(groups)):
                if not override.is_add():
                    check_exists(config, override.get_key_element())
        raise


def check_exists(config: DictConfig, key: str) -> None:
    """Raises UserError with the nearest name unless the configuration has this key."""
    path: list[str] = []
    for name in key.split("."):
        part = OmegaConf.select(config, ".".join(path)) if path else config
        if isinstance(part, DictConfig) and name not in part.keys():  # noqa: SIM118  # `in` is False without a value
            raise UserError(unknown([*path, name], names(part)))
        path.append(name)


def unknown(path: Sequence[str], known: Sequence[str], written: str | None = None) -> str:
    """That there is no such key, the nearest one and all there are."""
    near = difflib.get_close_matches(path[-1], known, 1)
    guess = f" Did you mean {near[0]}?" if near else ""
    where = ".".join(path[:-1]) or "The configuration"
    return (
        f"There is no {written or '.'.join(path)}.{guess} {where} has{': ' + ', '.join(known) if known else ' none'}."
    )


def names(keys: Iterable[Any]) -> list[str]:
    """The keys that a person may set."""
    return [str(key) for key in keys if key != "hydra" and not str(key).startswith("_")]


def choices(overrides: Iterable[str]) -> list[str]:
    """Those that choose files of conf/, and Hydra's own."""
    return [override.input_line or "" for override in parsed(overrides)
            if is_group(key := override.get_key_element()) or key.startswith(("hydra.", "hydra/"))]  # fmt: skip


def is_group(key: str) -> bool:
    """Whether a key chooses a file of conf/."""
    return key.split("@")[0] in GROUPS


def group_of(hydra: HydraConf) -> str | None:
    """One name for all runs of a sweep: its experiment's, of a bare `duet -m` its folder's; None for one run."""
    experiment = hydra.runtime.choices.get("experiment")
    if experiment or hydra.mode is None or hydra.mode.name != "MULTIRUN":
        return experiment
    return Path(hydra.sweep.dir).name
