"""Whether every axis of an experiment exists and every value builds, told before anything runs."""

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import conf
from launchers.sweeps.axes import (
    GROUPS,
    Sweep,
    alone,
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
    changed |= {_root(each.get_key_element()) for each in parsed(sweep.fixed) if not is_group(each.get_key_element())}
    first = [f"{key}={values[0]}" for key, values in sweep.axes.items() if is_group(key)]
    start = [*sweep.fixed, *(() if _are_chosen(first, composed(sweep.fixed)) else first)]
    for root in dict.fromkeys(map(_root, sweep.axes)):
        own = [key for key in sweep.axes if _root(key) == root]
        knobs = {key: sweep.axes[key] for key in own if not is_group(key)}
        groups = [_overrides(key, sweep.axes[key]) for key in own if is_group(key)]
        if not knobs and root not in changed and all(map(_is_shipped, itertools.chain(*groups))):
            continue
        others = [each for each in first if _root(each) != root]
        for chosen in itertools.product(*groups):
            overrides = [*sweep.fixed, *others, *chosen]
            if set(chosen) <= set(first):
                config = composed(start)
            elif root in changed or not _stands_alone(root, chosen, composed(start)):
                config = composed(overrides)
            else:
                config = _exchanged(composed(start), root, chosen[0].partition("=")[2])
            _check_choice(root, config, knobs, overrides)
    return math.prod(map(len, sweep.axes.values()))


def problem(arguments: Sequence[str]) -> str | None:
    """What is wrong with the experiment of a command line, in one paragraph; None also where there is none to check."""
    if any(each.startswith(ELSEWHERE) for each in arguments):
        return None
    if not any(each.startswith("experiment=") and each != "experiment=null" for each in arguments):
        return None
    try:
        check(read([each for each in arguments if not each.startswith("-")]))
    except UserError as error:
        return str(error)
    except HydraException:  # Hydra says what it cannot read
        return None
    return None


def _check_choice(root: str, config: DictConfig, knobs: Mapping[str, Sequence[str]], overrides: list[str]) -> None:
    """One choice of the groups under a root, with the values of the knobs there."""
    for key in knobs:
        check_exists(config, key)
    parts, built, changed = [root] if root in PARTS else PARTS, set(), config.copy()
    for tried in _combinations(knobs):
        for each in map(_override, tried):
            if isinstance(each.value(), dict):  # is merged with what was there
                changed = config.copy()
            OmegaConf.update(changed, each.get_key_element(), each.value(), force_add=False)
        _build(changed, parts, tried or overrides, built)


@lru_cache(maxsize=64)
def _override(text: str) -> Override:
    return parsed([text])[0]


def _combinations(knobs: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """All of them; where they are many every value once, beside the first ones of the others."""
    if math.prod(map(len, knobs.values())) <= MANY:
        return list(map(list, itertools.product(*(_overrides(key, values) for key, values in knobs.items()))))
    first = {key: values[0] for key, values in knobs.items()}
    return [[f"{name}={each}" for name, each in (first | {key: value}).items()]
            for key, values in knobs.items() for value in values]  # fmt: skip


def _build(config: DictConfig, parts: Iterable[str], knobs: Sequence[str], built: set[str]) -> None:
    """Every part that was not `built` with the same values."""
    from launchers.options import check_part  # here, because it imports pydantic, which `--help` does without

    for part in parts:
        try:
            said = part + json.dumps(OmegaConf.to_container(config[part], resolve=True), default=str)
            if said not in built:
                check_part(part, json.loads(said.removeprefix(part)))
                instantiate(config[part], _convert_="all")
                built.add(said)
        except (InstantiationException, OmegaConfBaseException, UserError) as error:
            cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
            raise UserError(f"{', '.join(knobs)} does not build {part}: {cause}") from error


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


def _are_chosen(choices: Sequence[str], config: DictConfig) -> bool:
    chosen = config.hydra.runtime.choices
    return all(chosen.get(group) == name for group, _, name in (each.partition("=") for each in choices))


def _stands_alone(root: str, chosen: Sequence[str], config: DictConfig) -> bool:
    """Whether a root is one shipped file that nothing else adds to, so that it need not be composed with the others."""
    places = {key.partition("@")[2].split(".")[0] for key in config.hydra.runtime.choices}
    local = (FILES / "local").exists()
    return len(chosen) == 1 and "@" not in chosen[0] and _is_shipped(chosen[0]) and root not in places and not local


def _exchanged(config: DictConfig, group: str, name: str) -> DictConfig:
    """The same with another file of a group, which is much quicker than composing anew."""
    changed = config.copy()
    OmegaConf.update(changed, group, alone(group, name), merge=False, force_add=True)
    return changed


def _overrides(key: str, values: Iterable[str]) -> list[str]:
    return [f"{key}={value}" for value in values]


def _root(key: str) -> str:
    return re.split(r"[.@=]", key)[0]
