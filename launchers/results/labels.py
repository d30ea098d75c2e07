"""Names of table lines: the method, and the knobs that tell its lines apart."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from launchers.rows import Row

Identity = dict[str, Any]
MANY = 4  # knobs in a name, and values of one, that are always told
KINDS = ("name", "_target_")  # of a part of the config; knobs of unlike parts need not be told one by one


def identity(row: Row) -> Identity:
    """What makes a row another line of the table: dotted knobs, and as row.* what they led to; no seeds."""
    told = {name: getattr(row, name) for name in ("method", "family", "needs", "router", "granularity")}
    return {**_flat(row.config), **{f"row.{name}": value for name, value in told.items()}}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Identity:
    """A nested config as dotted names, without its seeds."""
    flat: Identity = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        elif name != "seed":
            flat[prefix + name] = value
    return flat


def labels(rows: Sequence[Row]) -> list[str]:
    """The method names; where one stands for several configs, followed by the knobs that tell them apart.

    Of many knobs those are left out that have their most frequent value, as long as the names still differ.
    """
    identities = [identity(row) for row in rows]
    same: dict[str, list[Identity]] = defaultdict(list)
    for each in identities:
        same[each["row.method"]].append(each)
    knobs = [_telling(each, same[each["row.method"]]) for each in identities]
    usual = {(method, key): _usual(key, rivals) for method, rivals in same.items() for key in {*chain(*rivals)}}
    fewer = [[key for key in each if len(each) <= MANY or own[key] != usual[own["row.method"], key]]
             for own, each in zip(identities, knobs, strict=True)]  # fmt: skip
    short = [_label(*each) for each in zip(identities, fewer, strict=True)]
    count = Counter(short)
    return [name if count[name] == 1 else _label(own, each)
            for name, own, each in zip(short, identities, knobs, strict=True)]  # fmt: skip


def _telling(own: Identity, rivals: Sequence[Identity]) -> list[str]:
    """The knobs that tell a line from its rivals."""
    differing = {key for rival in rivals for key in _differing(own, rival)}
    return [key for key in own if key in differing]


def _usual(key: str, identities: Sequence[Identity]) -> Any:
    """The most frequent value of a knob."""
    texts = Counter(json.dumps(each[key]) for each in identities if key in each)
    return json.loads(texts.most_common(1)[0][0])


def _label(own: Identity, knobs: Sequence[str]) -> str:
    parts = {key: _parts(key) for key in knobs}
    shared = Counter(parts[key][-1] for key in knobs)
    names = {key: ".".join(parts[key][-2:]) if shared[parts[key][-1]] > 1 else parts[key][-1] for key in knobs}
    return " ".join([own["row.method"], *(f"{names[key]}={_short(key, own[key])}" for key in knobs)])


def _differing(own: Identity, rival: Identity) -> list[str]:
    """The knobs that tell two configs of a method apart: of parts of different kind the kind alone."""
    keys = [key for key in own if rival.get(key) != own[key]]
    knobs = [key for key in keys if not key.startswith("row.") and not _explained(key, own, rival)]
    return knobs or [key for key in keys if key.startswith("row.")]


def _explained(key: str, own: Identity, rival: Identity) -> bool:
    """Whether a part around the knob is of another kind, which is told instead."""
    parts = key.split(".")
    for depth in range(1, len(parts)):
        for kind in (".".join([*parts[:depth], name]) for name in KINDS):
            if kind == key:
                return False
            if own.get(kind) != rival.get(kind):
                return True
    return False


def _parts(key: str) -> list[str]:
    """A knob's path; a part's kind goes by the name of the part."""
    parts = key.split(".")
    return parts[:-1] if parts[-1] in KINDS and len(parts) > 1 else parts


def _short(key: str, value: Any) -> str:
    if key.endswith("._target_"):
        return str(value).rpartition(".")[2]
    if isinstance(value, list) and len(value) > MANY and all(isinstance(each, int | float) for each in value):
        return f"{len(value)} from {value[0]} to {value[-1]}"
    return f"{value:g}" if isinstance(value, float) else str(value)
