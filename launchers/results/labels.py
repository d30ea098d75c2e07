"""Names of table lines: the method, and the hyperparameters that tell its lines apart."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
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


def value_at(config: Any, name: str) -> Any:
    """The value at a dotted place of a configuration, None where there is no such place."""
    for part in name.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def labels(identities: Sequence[Identity]) -> list[str]:
    """The method names; where one stands for several configs, followed by the hyperparameters that tell them apart.

    Of many hyperparameters those are left out that have their most frequent value, as long as the names still differ.
    """
    methods: dict[str, list[Identity]] = defaultdict(list)
    for options in identities:
        methods[options["row.method"]].append(options)
    short, whole = [], []
    for options in identities:
        rivals = methods[options["row.method"]]
        differing = {key for rival in rivals for key in _differing(options, rival)}
        keys = [key for key in options if key in differing]
        unusual = [key for key in keys if len(keys) <= MANY or options[key] != _usual(key, rivals)]
        whole.append(_label(options, keys))
        short.append(_label(options, unusual))
    count = Counter(short)
    return [name if count[name] == 1 else full for name, full in zip(short, whole, strict=True)]


def _usual(key: str, identities: Sequence[Identity]) -> Any:
    """The most frequent value of a hyperparameter."""
    texts = Counter(json.dumps(options[key]) for options in identities if key in options)
    return json.loads(texts.most_common(1)[0][0])


def _differing(options: Identity, rival: Identity) -> list[str]:
    """The hyperparameters that tell two configs of a method apart: of parts of different kind the kind alone."""
    keys = [key for key in options if rival.get(key) != options[key]]
    chosen = [key for key in keys if not key.startswith("row.") and not _explained(key, options, rival)]
    return chosen or [key for key in keys if key.startswith("row.")]


def _explained(key: str, options: Identity, rival: Identity) -> bool:
    """Whether a part around the hyperparameter is of another kind, which is named instead."""
    parts = key.split(".")
    kinds = [".".join([*parts[:depth], name]) for depth in range(1, len(parts)) for name in KINDS]
    unlike = next((kind for kind in kinds if options.get(kind) != rival.get(kind)), key)
    return unlike != key


def _label(options: Identity, keys: Sequence[str]) -> str:
    paths = {key: key.removesuffix("._target_").removesuffix(".name").split(".") for key in keys}
    count = Counter(path[-1] for path in paths.values())
    named = {key: ".".join(path[-2:] if count[path[-1]] > 1 else path[-1:]) for key, path in paths.items()}
    return " ".join([options["row.method"], *(f"{named[key]}={_short(key, options[key])}" for key in keys)])


def _short(key: str, value: Any) -> str:
    if key.endswith("._target_"):
        return str(value).rpartition(".")[2]
    if isinstance(value, list) and len(value) > MANY and all(isinstance(entry, int | float) for entry in value):
        return f"{len(value)} from {value[0]} to {value[-1]}"
    return f"{value:g}" if isinstance(value, float) else str(value)
