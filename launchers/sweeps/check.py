"""Whether every axis of an experiment exists and every value builds, before anything runs."""

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import conf
from launchers.sweeps.axes import (
    GROUPS,
    Sweep,
    check_exists,
    choices,
    composed,
    is_group,
    names,
    parsed,
    read,
    unknown,
)
from merging.errors import UserError

PARTS = ("backbone", "experts", "suite", "method", "scale", "router", "engine", "tracker")  # what is built
MANY = 64  # combinations of values tried in full
FILES = Path(conf.__path__[0])
ELSEWHERE = ("--config", "-c")  # flags that bring in folders which are not looked into here


def check(sweep: Sweep) -> int:
    """How many cells there are. Raises UserError where an axis or key does not exist or a value does not build.

    The values under one part of the configuration are tried together, those of different parts are not; choices of
    shipped files that nothing else changes are not tried.
    """
    changed = _check_keys(composed(choices(sweep.fixed)))
    keys = [override.get_key_element() for override in parsed(sweep.fixed)]
    changed |= {_root(key) for key in keys if not is_group(key)}
    first = [f"{key}={values[0]}" for key, values in sweep.axes.items() if is_group(key)]
    for root in dict.fromkeys(map(_root, sweep.axes)):
        axes = {key: _overrides(key, values) for key, values in sweep.axes.items() if _root(key) == root}
        groups = [overrides for key, overrides in axes.items() if is_group(key)]
        options = {key: overrides for key, overrides in axes.items() if not is_group(key)}
        if not options and root not in changed and all(map(_is_shipped, itertools.chain(*groups))):
            continue
        others = [choice for choice in first if _root(choice) != root]
        for chosen in itertools.product(*groups):
            _check_choice(root, [*sweep.fixed, *others, *chosen], options)
    return math.prod(map(len, sweep.axes.values()))


def problem(arguments: Sequence[str]) -> str | None:
    """What is wrong with the experiment of a command line, in one paragraph; None also where there is none to check."""
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


def _check_choice(root: str, overrides: list[str], options: Mapping[str, Sequence[str]]) -> None:
    """One choice of the groups under a root, with the values of the options there."""
    config = composed(overrides)
    for key in options:
        check_exists(config, key)
    parts, built, changed = [root] if root in PARTS else PARTS, set[str](), config.copy()
    for values in _combinations(options):
        for override in parsed(values):
            if isinstance(override.value(), dict):  # is merged with what was there
                changed = config.copy()
            OmegaConf.update(changed, override.get_key_element(), override.value(), force_add=False)
        _build(changed, parts, values or overrides, built)


def _combinations(options: Mapping[str, Sequence[str]]) -> Iterable[Sequence[str]]:
    """All of them; where they are many every value once, beside the first ones of the others."""
    if math.prod(map(len, options.values())) <= MANY:
        return itertools.product(*options.values())
    first = {key: overrides[0] for key, overrides in options.items()}
    return [[*(first | {key: override}).values()] for key, overrides in options.items() for override in overrides]


def _build(config: DictConfig, parts: Iterable[str], overrides: Sequence[str], built: set[str]) -> None:
    """Every part that was not `built` with the same values."""
    from launchers.options import check_part  # here, because it imports pydantic, which `--help` does without

    for part in parts:
        try:
            values = OmegaConf.to_container(config[part], resolve=True)
            key = part + json.dumps(values, default=str)
            if key not in built:
                check_part(part, json.loads(key.removeprefix(part)))
                instantiate(config[part], _convert_="all")
                built.add(key)
        except (InstantiationException, OmegaConfBaseException, UserError) as error:
            cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
            raise UserError(f"{', '.join(overrides)} does not build {part}: {cause}") from error


def _check_keys(config: DictConfig) -> set[str]:
    """The parts that an experiment file changes beyond its choices.

    Raises UserError where it names what they do not have: Hydra would add it silently.
    """
    closed = GROUPS - {"experiment", "local", "hydra"}
    chosen = {group: name for group, name in config.hydra.runtime.choices.items() if group.split("@")[0] in closed}
    plain = composed([f"{group}={name}" for group, name in chosen.items()])
    own, other = _plain(config), _plain(plain)
    text = OmegaConf.to_yaml(config, resolve=False)
    for path, known in _additions(own, other):
        if len(path) > 1 or f"${{{path[0]}" not in text:  # a new key that something refers to is meant
            raise UserError(f"The experiment has a key too many. {unknown(path, known)}")
    return {part for part in PARTS if own[part] != other[part]}


def _plain(config: DictConfig) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(config, resolve=False)
    return {key: value for key, value in values.items() if key != "hydra"}


def _additions(own: dict[str, Any], other: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple]:
    """Keys of `own` that `other` lacks: (their path, keys that `other` has there). Empty mappings are open."""
    for key, value in own.items() if other else ():
        if key not in other:
            yield (*path, str(key)), names(other)
        elif isinstance(value, dict) and isinstance(other[key], dict):
            yield from _additions(value, other[key], (*path, str(key)))


def _is_shipped(choice: str) -> bool:
    group, name = re.split("[@=]", choice)[0], choice.rpartition("=")[2]
    return (FILES / group / f"{name}.yaml").exists()


def _overrides(key: str, values: Iterable[str]) -> list[str]:
    return [f"{key}={value}" for value in values]


def _root(key: str) -> str:
    return re.split(r"[.@=]", key)[0]
