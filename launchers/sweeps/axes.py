"""What a command line and its experiment sweep."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
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
    swept = {_key(override): override for override in overrides if override.is_sweep_override()}
    fixed = [override for override in overrides if not override.is_sweep_override()]
    lines, keys = tuple(override.input_line or "" for override in fixed), {*map(_key, fixed)}
    params = composed(lines).hydra.sweeper.get("params") or {}
    declared = parsed([f"{key}={values}" for key, values in params.items()])
    axes = {_key(override): override for override in declared if _key(override) not in keys}
    axes |= swept  # the command line wins, as in Hydra's sweeper
    intervals = frozenset(key for key, override in axes.items() if isinstance(override.value(), IntervalSweep))
    return Sweep(lines, {key: _values(override) for key, override in axes.items()}, intervals)


def parsed(overrides: Iterable[str]) -> list[Override]:
    """Hydra's own reading of overrides."""
    return OverridesParser.create().parse_overrides(list(overrides))


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
        raise UserError(_unknown_choice(error)) from error
    except HydraException:
        groups = choices(overrides)
        if len(groups) < len(overrides):
            config = composed(groups)
            for override in parsed(set(overrides) - set(groups)):
                if not override.is_add():
                    check_exists(config, _key(override))
        raise


def value_of(text: str) -> Value:
    """A swept value as Python reads it."""
    return parsed([f"x={text}"])[0].value()  # type: ignore[return-value]


def check_exists(config: DictConfig, key: str) -> None:
    """Raises UserError with the nearest name unless the configuration has this key."""
    path: list[str] = []
    for name in key.split("."):
        part = OmegaConf.select(config, ".".join(path)) if path else config
        if isinstance(part, DictConfig) and name not in part:
            raise UserError(unknown([*path, name], names(part)))
        path.append(name)


def unknown(path: Sequence[str], known: Sequence[str], written: str | None = None) -> str:
    """That there is no such key, the nearest one and all there are."""
    near = difflib.get_close_matches(path[-1], known, 1)
    guess = f" Did you mean {near[0]}?" if near else ""
    where = ".".join(path[:-1]) or "The configuration"
    return f"There is no {written or '.'.join(path)}.{guess} {where} has: {', '.join(known)}."


def _unknown_choice(error: MissingConfigException) -> str:
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    return unknown([group, name], list(error.options or []), f"{group}={name}")


def names(keys: Iterable[Any]) -> list[str]:
    """The keys that a person may set."""
    return [str(key) for key in keys if key != "hydra" and not str(key).startswith("_")]


def _values(override: Override) -> tuple[str, ...]:
    """The values of an axis as text; of an interval its ends."""
    if not override.is_sweep_override():
        return (override.get_value_element_as_str(),)
    value = override.value()
    if isinstance(value, IntervalSweep):
        return tuple(str(end) for end in (value.start, value.end))
    return tuple(override.sweep_string_iterator())


def _key(override: Override) -> str:
    return override.get_key_element()


def choices(overrides: Iterable[str]) -> list[str]:
    """Those that choose files of conf/, and Hydra's own."""
    return [override.input_line or "" for override in parsed(overrides)
            if is_group(_key(override)) or _key(override).startswith("hydra.")]  # fmt: skip


def is_group(key: str) -> bool:
    """Whether a key chooses a file of conf/."""
    return key.split("@")[0] in GROUPS
