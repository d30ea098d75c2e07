"""The exact `duet` command of a row: choices of groups first, then the knobs that differ from them."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import conf
from launchers import rows
from launchers.job import resolved
from launchers.rows import Row
from merging.errors import UserError

Config = dict[str, Any]
GROUPS = ("backbone", "experts", "suite", "method", "scale", "router")  # of conf/ that change a number
DEEP = 4  # methods inside methods, and one look more
ABSENT = object()  # null is a value


@dataclass(frozen=True)
class Repeat:
    """How to run a row again with the configuration of today."""

    overrides: tuple[str, ...]  # of `duet`, not quoted for a shell
    choices: dict[str, tuple[str, str]]  # group -> this run's choice, the default one, where they differ
    knobs: dict[str, tuple[Any, Any]]  # dotted name -> this run's value, that of the choice, ABSENT where there is none
    newer: tuple[str, ...]  # knobs that exist now and that the row does not have
    run_id: str  # of what the overrides compose to

    def exact(self, row: Row) -> bool:
        """Whether the command is the same run: older rows lack knobs of today."""
        return self.run_id == row.run_id


def repeat(row: Row) -> Repeat:
    """Find the overrides that compose to the row's configuration. Raises UserError where no choice fits the row."""
    start, seed = _composed(())[1], [f"seed={row.seed}"] if row.seed != _seed() else []
    wanted = {group: _nearest(group, row, start) for group in GROUPS if isinstance(row.config.get(group), Mapping)}
    chosen = [f"{group}={name}" for group, name in wanted.items() if name != start.get(group)]
    try:
        for _ in range(DEEP):
            before, inside = _composed((*chosen, *seed))
            deeper = [f"{key}={name}" for key, name in _inner(row.config, inside) if name != inside[key]]
            if not deeper:
                break
            chosen += deeper
        wrong, newer = _compare(row.config, resolved(before))
        plain: Any = OmegaConf.to_container(before, resolve=True)
        knobs = {key: (value, _value(plain, key)) for key, value in wrong.items()}
        overrides = (*chosen, *seed, *(_override(key, *values) for key, values in knobs.items()))
        after = resolved(_composed(overrides)[0])
    except (HydraException, OmegaConfBaseException, ImportError, KeyError, ValueError) as error:
        raise UserError(
            f"The run {row.run_id} ({row.method}) cannot be put together with this version of the configuration: "
            f"{str(error).splitlines()[0]} Check out the code that wrote it: {row.code}."
        ) from error
    differ = {group: (name, start[group]) for group, name in wanted.items() if name != start.get(group)}
    return Repeat(overrides, differ, knobs, tuple(newer), rows.run_id(after, row.checkpoints, row.contents))


@lru_cache(16)
def _composed(overrides: tuple[str, ...]) -> tuple[DictConfig, dict[str, str]]:
    """The configuration, and what is chosen for every group, those inside a method included: "method@method.rest"."""
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", list(overrides), return_hydra_config=True)
    own = OmegaConf.masked_copy(config, [str(name) for name in config if name != "hydra"])
    return own, dict(config.hydra.runtime.choices)


@cache
def _seed() -> int:
    return OmegaConf.load(Path(conf.__path__[0]) / "config.yaml").seed


def _nearest(group: str, row: Row, start: Mapping[str, str]) -> str:
    """The option that the row's part of the configuration was made of."""
    options = _options(group)
    if group == "method":
        if row.method not in options:
            raise UserError(
                f"The run {row.run_id} used the method {row.method}, which conf/method does not have. "
                f"Check out the code that wrote it: {row.code}."
            )
        return row.method
    return _like(options, row.config[group]) or start[group]


def _inner(config: Config, choices: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """For every group inside a method: its key and the option that the configuration holds there."""
    for key in choices:
        group, _, path = key.partition("@")
        part: Any = config
        for name in path.split(".") if path else ():
            part = part.get(name) if isinstance(part, Mapping) else None
        if path and isinstance(part, Mapping) and (name := _like(_options(group), part, choices[key])):
            yield key, name


@cache
def _options(group: str) -> dict[str, Config]:
    files = sorted((Path(conf.__path__[0]) / group).glob("*.yaml"))
    return {path.stem: dict(OmegaConf.to_container(OmegaConf.load(path), resolve=False) or {}) for path in files}  # type: ignore[arg-type]


def _like(options: Mapping[str, Config], part: Mapping[str, Any], usual: str | None = None) -> str | None:
    """The option of this name, else the most alike of those that build the same class."""
    named = part.get("name", part.get("family"))
    if named in options:
        return named
    rivals = [name for name, option in options.items() if option.get("_target_") == part.get("_target_")]
    if usual in rivals:
        return usual
    leaves = _flat(part)

    def alike(name: str) -> int:
        return sum(_same(leaves.get(key, ABSENT), value) for key, value in _flat(options[name]).items())

    return max(rivals, key=alike, default=None)


def _value(config: Config, key: str) -> Any:
    part: Any = config
    for name in key.split("."):
        part = part.get(name, ABSENT) if isinstance(part, Mapping) else ABSENT
    return part


def _compare(wanted: Config, found: Config) -> tuple[dict[str, Any], list[str]]:
    """Knobs to set or (ABSENT) delete, and the knobs of `found` that `wanted` knows nothing of."""
    knobs: dict[str, Any] = {}
    newer: list[str] = []

    def walk(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str) -> None:
        other_kind = one.get("_target_") != other.get("_target_")
        for name in [*one, *(name for name in other if name not in one)]:
            key, ours, theirs = f"{prefix}{name}", one.get(name, ABSENT), other.get(name, ABSENT)
            if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
                walk(ours, theirs, f"{key}.")
            elif ours is ABSENT and not other_kind:
                newer.append(key)
            elif not _same(ours, theirs) and not (prefix == "" and ours is None):  # no router is every router
                knobs[key] = ours

    walk(wanted, found, "")
    return knobs, newer


def _same(one: Any, other: Any) -> bool:
    """Equal in a run id: 1 is not 1.0."""
    if one is ABSENT or other is ABSENT:
        return one is other
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _flat(part: Mapping[str, Any], prefix: str = "") -> Config:
    flat: Config = {}
    for name, value in part.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _override(key: str, value: Any, before: Any) -> str:
    if value is ABSENT:
        return f"~{key}"
    return f"{'+' if before is ABSENT else ''}{key}={spelled(value)}"


def spelled(value: Any) -> str:
    """A value in the grammar of Hydra's command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{spelled(str(key))}:{spelled(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(spelled, value)) + "]"
    if not isinstance(value, str):
        return repr(value)
    return value if _bare(value) else _quoted(value)


def _bare(text: str) -> bool:
    """Whether a text means itself without quotes, also inside a list or mapping."""
    if not re.fullmatch(r"[\w./@%+-]+", text, re.ASCII):
        return False
    try:
        (found,) = OverridesParser.create().parse_override(f"key=[{text}]").value()  # type: ignore[misc]
    except HydraException:
        return False
    return isinstance(found, str) and found == text


def _quoted(text: str) -> str:
    """In single quotes; backslashes are doubled only where a quote follows."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"
