"""Whether every axis of an experiment exists and every value builds, before anything runs."""

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
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
MANY = 64  # combinations of values tried in full
ELSEWHERE = ("--config", "-c")  # flags that bring in folders which are not looked into here


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


def check(sweep: Sweep) -> int:
    """How many cells there are. Raises UserError where an axis or key does not exist or a value does not build.

    The values under one part of the configuration are tried together, those of different parts are not; choices of
    shipped files that nothing else changes are not tried.
    """
    changed = _changed(composed(choices(sweep.fixed)))
    keys = [override.get_key_element() for override in parsed(sweep.fixed)]
    set_by_hand = {*changed, *(_root(key) for key in keys if not is_group(key))}
    first = [f"{key}={values[0]}" for key, values in sweep.axes.items() if is_group(key)]
    for root in dict.fromkeys([*map(_root, sweep.axes), *changed]):
        axes = {key: [f"{key}={value}" for value in values] for key, values in sweep.axes.items() if _root(key) == root}
        groups = [overrides for key, overrides in axes.items() if is_group(key)]
        options = {key: overrides for key, overrides in axes.items() if not is_group(key)}
        if options or root in set_by_hand or not all(map(_is_shipped, itertools.chain(*groups))):
            others = [choice for choice in first if _root(choice) != root]
            for chosen in itertools.product(*groups):
                _check_choice(root, [*sweep.fixed, *others, *chosen], options)
    return math.prod(map(len, sweep.axes.values()))


def _changed(config: DictConfig) -> list[str]:
    """The parts that an experiment file changes beyond its choices.

    Raises UserError for a key of its own that nothing refers to: Hydra would add it silently.
    """
    closed = GROUPS - {"experiment", "local", "hydra"}
    chosen = {group: name for group, name in config.hydra.runtime.choices.items() if group.split("@")[0] in closed}
    plain = composed([f"{group}={name}" for group, name in chosen.items()])
    text = OmegaConf.to_yaml(config, resolve=False)
    for key in config:
        if key not in plain and f"${{{key}" not in text:
            raise UserError(f"The experiment has a key too many. {unknown([str(key)], names(plain))}")
    whole, other = (OmegaConf.to_container(made, resolve=False) for made in (config, plain))
    return [part for part in PARTS if whole[part] != other[part]]  # type: ignore[index,call-overload]


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
            values: Any = OmegaConf.to_container(config[part], resolve=True)
            key = part + json.dumps(values, default=str)
            if key not in built:
                check_part(part, values)
                instantiate(config[part], _convert_="all")
                built.add(key)
        except (InstantiationException, OmegaConfBaseException, UserError) as error:
            cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
            raise UserError(f"{', '.join(overrides)} does not build {part}: {cause}") from error


def _is_shipped(choice: str) -> bool:
    return Path(conf.__path__[0], _root(choice), f"{choice.rpartition('=')[2]}.yaml").exists()


def _root(key: str) -> str:
    return re.split(r"[.@=]", key)[0]
