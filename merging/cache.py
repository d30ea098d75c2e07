"""The only cache: content-keyed, atomic, checksummed, capped. Deleting its folder loses time and nothing else."""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from merging.files import remove_abandoned, write_atomically
from merging.identity import identity

if TYPE_CHECKING:
    from torch import Tensor

GIB = 1 << 30


class Cache:
    """Values by key under `folder`; the least recently used are dropped beyond `cap_bytes`.

    The key names all that it was made from and the code that made it, so that an entry never goes stale.
    """

    def __init__(self, folder: str | Path, cap_bytes: int = 20 * GIB):
        self.folder, self.cap_bytes = Path(folder), cap_bytes
        self._written = 0  # bytes since the folder was last measured
        self._tidy = False

    def path(self, key: str) -> Path:
        """Where the entry of `key` lies, present or not."""
        digest = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / digest[:2] / digest[2:34]

    def get(self, key: str) -> bytes | None:
        """The stored bytes, or None; an entry that fails its checksum is removed."""
        self._remove_abandoned()
        path = self.path(key)
        try:
            stored = path.read_bytes()
        except OSError:  # absent, or not readable: storing it again says why
            return None
        checksum, payload = stored[:8], memoryview(stored)[8:]
        if checksum != b"%08x" % zlib.crc32(payload):
            with contextlib.suppress(OSError):  # gone already, or not ours: storing it again says why
                path.unlink()
            return None
        with contextlib.suppress(OSError):  # another process may trim it just now
            os.utime(path)
        return bytes(payload)

    def put(self, key: str, payload: bytes) -> None:
        """Store bytes under `key`, then make room."""

        def write(file) -> None:
            file.write(b"%08x" % zlib.crc32(payload))
            file.write(payload)

        self._remove_abandoned()
        write_atomically(self.path(key), write, durable=False)  # a torn entry fails its checksum
        self._written += len(payload)
        if self._written == len(payload) or self._written > self.cap_bytes // 16:
            self._trim()
            self._written = 1

    def text(self, key: str, make: Callable[[], str]) -> str:
        """The string stored under `key`, made and stored if absent or damaged."""
        stored = self.get(key)
        if stored is not None:
            return stored.decode()
        self.put(key, (value := make()).encode())
        return value

    def tensors(
        self,
        key: str,
        make: "Callable[[], dict[str, Tensor]]",
        enough: "Callable[[dict[str, Tensor]], bool]" = lambda stored: True,
    ) -> "dict[str, Tensor]":
        """The named tensors stored under `key`, made and stored if absent, damaged or not `enough`."""
        from safetensors.torch import load, save  # here, because what is remembered as text is read without torch

        stored = self.get(key)
        if stored is not None and enough(tensors := load(stored)):
            return tensors
        value = {name: tensor.contiguous() for name, tensor in make().items()}
        self.put(key, save(value))
        return value

    def _remove_abandoned(self) -> None:
        """What killed writers left behind, also of entries that another process has stored since: once is enough."""
        for folder in () if self._tidy else self.folder.glob("??"):
            with contextlib.suppress(OSError):  # gone, or not ours
                remove_abandoned(folder)
        self._tidy = True

    def _trim(self) -> None:
        """Drop the least recently used entries until the folder fits under the cap."""
        entries = []
        for path in self.folder.glob("??/[!.]*"):  # no temporary files: their writers live
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process trimmed it
                continue
            entries.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.cap_bytes:
                return
            with contextlib.suppress(OSError):  # gone already, or somebody else's
                path.unlink()
                total -= size


def key_of(what: str, made_by: str, *parts: object) -> str:
    """A cache key: what it is, the `code` that makes it, and the identity of all parts that it is made from."""
    return json.dumps([what, made_by, *identity(parts), version("torch").split("+")[0]], sort_keys=True)


@cache
def code(modules: tuple[str, ...], libraries: tuple[str, ...] = ()) -> str:
    """sha256 of the source of modules and whole packages, and of the versions of libraries, by their names."""
    hashed = hashlib.sha256()
    for spec in map(find_spec, modules):  # which imports none of them
        folders = (spec.submodule_search_locations if spec is not None else None) or ()
        alone = [Path(spec.origin)] if spec is not None and spec.origin and not folders else []
        for path in alone or sorted(path for folder in folders for path in Path(folder).rglob("*.py")):
            hashed.update(path.name.encode() + path.read_bytes())
    hashed.update("".join(f"{name} {version(name)}" for name in libraries).encode())
    return hashed.hexdigest()[:16]


def modules_of(method: object) -> tuple[str, ...]:
    """The modules of a method and those inside it, by name: a user's own lie outside of this library."""
    inner = [getattr(method, option.name) for option in fields(method)] if is_dataclass(method) else []
    names = {name for option in inner if is_dataclass(option) for name in modules_of(option)}
    return tuple(sorted({type(method).__module__, *names}))
