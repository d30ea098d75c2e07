"""Names of table lines: the method, and the hyperparameters that tell its lines apart."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from launchers.rows import Row

Identity = dict[str, Any]
MANY = 4  # hyperparameters in a name, and values of one, that are always named
KINDS = ("name", "_target_")  # of a part of the config; what unlike parts hold need not be named one by one


def identity(row: Row) -> Identity:
    """What makes a row another line of the table: dotted options, and as row.* what they led to; no seeds."""
    facts = {name: getattr(row, name) for name in ("method", "family", "needs", "router", "granularity")}
    return {**_flat(row.config), **{f"row.{name}": value for name, value in facts.items()}}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Identity:
    """A nested config as dotted names, without its seeds."""
    flat: Identity = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        elif name != "seed":
            flat[prefix + name] = value
    return flat


def labels(identities: Sequence[Identity]) -> list[str]:
    """The method names; where one stands for several configs, followed by the hyperparameters that tell them apart.

    Of many hyperparameters those are left out that have their most frequent value, as long as the names still differ.
    """
    same: dict[str, list[Identity]] = defaultdict(list)
    for own in identities:
        same[own["row.method"]].append(own)
    telling = [_telling(own, same[own["row.method"]]) for own in identities]
    usual = {(method, key): _usual(key, rivals) for method, rivals in same.items() for key in {*chain(*rivals)}}
    fewer = [[key for key in keys if len(keys) <= MANY or own[key] != usual[own["row.method"], key]]
             for own, keys in zip(identities, telling, strict=True)]  # fmt: skip
    short = [_label(own, keys) for own, keys in zip(identities, fewer, strict=True)]
    count = Counter(short)
    return [name if count[name] == 1 else _label(own, keys)
            for name, own, keys in zip(short, identities, telling, strict=True)]  # fmt: skip


def _telling(own: Identity, rivals: Sequence[Identity]) -> list[str]:
    """The hyperparameters that tell a line from its rivals."""
    differing = {key for rival in rivals for key in _differing(own, rival)}
    return [key for key in own if key in differing]


def _usual(key: str, identities: Sequence[Identity]) -> Any:
    """The most frequent value of a hyperparameter."""
    texts = Counter(json.dumps(own[key]) for own in identities if key in own)
    return json.loads(texts.most_common(1)[0][0])


def _label(own: Identity, keys: Sequence[str]) -> str:
    parts = {key: _parts(key) for key in keys}
    shared = Counter(path[-1] for path in parts.values())
    names = {key: ".".join(path[-2:]) if shared[path[-1]] > 1 else path[-1] for key, path in parts.items()}
    return " ".join([own["row.method"], *(f"{names[key]}={_short(key, own[key])}" for key in keys)])


def _differing(own: Identity, rival: Identity) -> list[str]:
    """The hyperparameters that tell two configs of a method apart: of parts of different kind the kind alone."""
    keys = [key for key in own if rival.get(key) != own[key]]
    options = [key for key in keys if not key.startswith("row.") and not _explained(key, own, rival)]
    return options or [key for key in keys if key.startswith("row.")]


def _explained(key: str, own: Identity, rival: Identity) -> bool:
    """Whether a part around the hyperparameter is of another kind, which is named instead."""
    parts = key.split(".")
    for depth in range(1, len(parts)):
        for kind in (".".join([*parts[:depth], name]) for name in KINDS):
            if kind == key:
                return False
            if own.get(kind) != rival.get(kind):
                return True
    return False


def _parts(key: str) -> list[str]:
    """The path of a hyperparameter; a part's kind goes by the name of the part."""
    parts = key.split(".")
    return parts[:-1] if parts[-1] in KINDS and len(parts) > 1 else parts


def _short(key: str, value: Any) -> str:
    if key.endswith("._target_"):
        return str(value).rpartition(".")[2]
    if isinstance(value, list) and len(value) > MANY and all(isinstance(entry, int | float) for entry in value):
        return f"{len(value)} from {value[0]} to {value[-1]}"
    return f"{value:g}" if isinstance(value, float) else str(value)
