"""What tells one object from another, in names of rows and keys of caches: what it is made of, never where it lies."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from merging.errors import UserError
from merging.files import sha256

OURS = ("merging.", "tasks.", "launchers.")  # no two of their classes share a name, so that modules may be moved
WHERE = {"identity": False}  # metadata of a field that says where something lies or runs
Json = Any  # None, booleans, finite numbers, text, lists and mappings


def identity(value: object, where: str = "") -> Json:
    """The identity of a value, as JSON.

    Of a dataclass: its class, the class's `version` where it has one, and its fields, without those declared with
    `field(metadata={"identity": False})`: paths, devices, numbers of workers. An object with an `id` of its content is
    that id, a file (`Path`) the sha256 of its bytes, a tensor that of dtype, shape and numbers; a method `identity`
    wins over all of these. Raises UserError for a number that is not finite, naming the keys that lead to it (`where`),
    and for what is none of these.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):  # JSON has no word for it
            raise UserError(f"{where.lstrip('.') or 'The value'} is {value!r}, which is no finite number.")
        return value
    if isinstance(value, Mapping):
        return {str(key): identity(inner, f"{where}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [identity(inner, f"{where}.{index}") for index, inner in enumerate(value)]
    if isinstance(value, set | frozenset):
        return sorted(map(identity, value), key=json.dumps)
    if isinstance(value, Path):
        return sha256(value)
    return _of_object(value, where)


def fingerprint(value: object, digits: int = 64) -> str:
    """The first hex digits of the sha256 of an identity; the order of keys does not count, that of a list does."""
    text = json.dumps(identity(value), sort_keys=True)
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:digits]


def _of_object(value: Any, where: str) -> Json:
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        return _name(value)
    if callable(stated := getattr(value, "identity", None)):
        return stated()
    if isinstance(content := getattr(value, "id", None), str):
        return content
    if isinstance(value, partial):
        return [_name(value.func), identity(value.args), identity(value.keywords)]
    if isinstance(value, Enum):
        return f"{_name(type(value))}.{value.name}"
    if type(value).__module__.partition(".")[0] == "torch":
        return _of_torch(value)
    if is_dataclass(value):
        kept = [option.name for option in fields(value) if option.metadata.get("identity", True)]
    elif hasattr(value, "__dict__") and type(value).__module__ != "builtins":
        kept = sorted(name for name in vars(value) if not name.startswith("_"))
    else:
        raise UserError(
            f"A {type(value).__name__} ({value!r}) tells rows and cached results apart, but it does not say what it is "
            "made of. Make its class a frozen dataclass, or give it a method `identity` that returns JSON."
        )
    version = getattr(type(value), "version", None)
    named = {"class": _name(type(value)), **({} if version is None else {"version": version})}
    return named | {name: identity(getattr(value, name), f"{where}.{name}") for name in kept}


def _of_torch(value: Any) -> Json:
    import torch  # here, because rows are found without it

    from merging.checkpoints import digest

    return digest(value) if isinstance(value, torch.Tensor) else str(value)  # torch.dtype, torch.device, torch.Size


def _name(of: Any) -> str:
    """The name of a class or function; of one from outside with its module."""
    return of.__qualname__ if of.__module__.startswith(OURS) else f"{of.__module__}.{of.__qualname__}"
