"""The layouts of torch.save (zip, and legacy before 1.6) and of pickle.dump, read by merging.inert."""

import io
import math
import mmap
import struct
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from merging.inert import Constructor, Global, Machine, Shell

MAGIC = 0x1950A86A20F9469CFC6C  # the first object of a legacy file
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}  # fmt: skip
MOST_MODULES = 10_000  # a module that holds another twice, forty levels deep, would have 2^40
WRAPPED = ("state_dict", "model_state_dict", "model")  # where training scripts put the weights in a dict


class Map(mmap.mmap):
    """A mapped file in the form that zipfile wants."""

    def seekable(self) -> bool:
        return True


@dataclass(eq=False)
class Storage:
    """Where the numbers of tensors lie: `count` elements in `memory` from byte `start`; legacy files say it late."""

    dtype: torch.dtype
    count: int
    memory: Map | bytes | None = None
    start: int = 0

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize

    def flat(self) -> Tensor:
        """All elements [count]; a copy where they are not aligned (legacy) or must not be written to (plain)."""
        assert self.memory is not None
        if self.start % self.dtype.itemsize or isinstance(self.memory, bytes):
            copied = bytearray(memoryview(self.memory)[self.start : self.start + self.bytes])
            return torch.frombuffer(copied, dtype=self.dtype)
        return torch.frombuffer(self.memory, dtype=self.dtype, count=self.count, offset=self.start)


class View(NamedTuple):
    """A tensor to be: a strided window into a storage, as the file claims it until `check`."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def check(self) -> None:
        """Raises ValueError for a shape that cannot be, and for numbers that the storage or the file does not have."""
        shape, stride, storage = self.shape, self.stride, self.storage
        sides = math.prod(max(1, size) for size in shape)
        if len(shape) != len(stride) or min((self.offset, *shape, *stride)) < 0 or sides >= 1 << 62:
            raise ValueError("a tensor has an impossible shape")
        last = self.offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if math.prod(shape) and max(last + 1, sides) > storage.count:
            raise ValueError("a tensor claims more numbers than its storage has")
        if math.prod(shape) and (storage.memory is None or storage.start + storage.bytes > len(storage.memory)):
            raise ValueError("it lacks a part of its numbers")

    def tensor(self) -> Tensor:
        """The numbers; after `check`."""
        if math.prod(self.shape) == 0:
            return torch.empty(self.shape, dtype=self.storage.dtype)
        return self.storage.flat().as_strided(self.shape, self.stride, self.offset)


def _view(storage: object, offset: int, shape: tuple, stride: tuple, *_: object) -> View:
    whole = all(type(number) is int for number in (offset, *shape, *stride))
    if not isinstance(storage, Storage) or not whole:
        raise ValueError("a tensor is made from something that is no storage")
    return View(storage, offset, shape, stride)


def _first(value: object, *_: object) -> object:
    return value


@dataclass
class Reader:
    """One file, or a file inside a plain pickle (`nested`)."""

    memory: Map | bytes
    nested: bool = False
    storages: dict[str, Storage] = field(default_factory=dict)

    @cached_property
    def machine(self) -> Machine:
        constructors: dict[Global, Constructor] = {
            Global("torch._utils", "_rebuild_tensor"): _view,
            Global("torch._utils", "_rebuild_tensor_v2"): _view,
            Global("torch._utils", "_rebuild_parameter"): _first,
            Global("torch._utils", "_rebuild_parameter_with_state"): _first,
            Global("torch", "Size"): tuple,
            Global("torch.storage", "_load_from_bytes"): self._inner,
            Global("torch._tensor", "_rebuild_from_type_v2"): self._typed,
        }
        return Machine(constructors, self._persistent)

    def root(self) -> object:
        """The object in the file, with a View for every tensor."""
        if bytes(self.memory[:4]) == b"PK\x03\x04":
            return self._zip()
        stream = io.BytesIO(self.memory) if isinstance(self.memory, bytes) else self.memory
        value = self.machine.run(stream)  # type: ignore[arg-type]
        return self._legacy(stream) if value == MAGIC else value  # type: ignore[arg-type]

    def _persistent(self, name: object) -> object:
        """A class from ("module", class, its file, its source), or a storage from ("storage", type, key, ...)."""
        if not isinstance(name, tuple) or not name or name[0] not in ("module", "storage"):
            raise ValueError("it refers to something that is neither a class nor a storage")
        return name[1] if name[0] == "module" else self._storage(*name[1:])

    def _storage(self, type_: object, key: object, _device: object, count: object, *window: object) -> Storage:
        if not isinstance(type_, Global) or type_.name not in STORAGES or any(window):
            raise ValueError("it refers to something that is no storage of numbers")
        if not isinstance(key, str) or type(count) is not int or count < 0:
            raise ValueError("a storage has no name or no size")
        fresh = Storage(STORAGES[type_.name], count)
        storage = self.storages.setdefault(key, fresh)
        if (storage.dtype, storage.count) != (fresh.dtype, fresh.count):
            raise ValueError(f"its storage {key} is of two types")
        return storage

    def _inner(self, content: object) -> object:
        """A storage that a plain pickle holds as a torch file of its own."""
        if self.nested:
            raise ValueError("it hides a file in a file in a file")
        if not isinstance(content, bytes | bytearray):
            raise ValueError("it holds numbers in something that is no bytes")
        return Reader(bytes(content), nested=True).root()

    def _typed(self, function: object, _type: object, arguments: object, _state: object) -> object:
        return self.machine.call(function, arguments)

    def _zip(self) -> object:
        if self.nested:
            raise ValueError("it hides an archive in a pickle")
        with zipfile.ZipFile(self.memory) as archive:  # type: ignore[arg-type]
            records = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            if "constants.pkl" in records:
                raise ValueError("it is a TorchScript program, not a checkpoint")
            if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
                raise ValueError("it was written on a big-endian machine")
            if records["data.pkl"].compress_type != zipfile.ZIP_STORED:
                raise ValueError("its records are compressed, which torch.save never does")
            root = self.machine.run(io.BytesIO(archive.read(records["data.pkl"])))
        for key, storage in self.storages.items():
            storage.memory, storage.start = self.memory, self._start(records[f"data/{key}"], storage)
        return root

    def _start(self, entry: zipfile.ZipInfo, storage: Storage) -> int:
        """Where the bytes of an uncompressed record begin."""
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != storage.bytes:
            raise ValueError(f"its record {entry.filename} has not the size it claims")
        name, extra = struct.unpack("<HH", self.memory[entry.header_offset + 26 : entry.header_offset + 30])
        return entry.header_offset + 30 + name + extra

    def _legacy(self, stream: BinaryIO) -> object:
        """After the magic number: protocol, system, the object, the storages' keys, then count and bytes of each."""
        self.machine.run(stream)
        self.machine.run(stream)
        root, keys = self.machine.run(stream), self.machine.run(stream)
        for key in keys:  # type: ignore[attr-defined]
            storage = self.storages[key]
            (count,) = struct.unpack("<q", stream.read(8))
            if count != storage.count:
                raise ValueError(f"its storage {key} has {count} numbers and claims {storage.count}")
            storage.start, storage.memory = stream.tell(), self.memory
            stream.seek(storage.start + storage.bytes)
        return root


def views(root: object) -> dict[str, View]:
    """Named tensors of a state dict, of one inside a training script's dict, or of a whole module.

    Raises ValueError for tensors in a form that is not known: none is skipped.
    """
    if isinstance(root, Shell):
        return dict(_walk(root))
    if not isinstance(root, dict):
        raise ValueError(f"it holds a {type(root).__name__}, neither a module nor a state dict")
    inner = next((root[name] for name in WRAPPED if isinstance(root.get(name), dict | Shell)), None)
    if isinstance(inner, Shell):
        return dict(_walk(inner))
    named = ((key, value) for key, value in (root if inner is None else inner).items() if isinstance(key, str))
    return dict(_tensors(named))


def _tensors(named: Iterable[tuple[str, object]]) -> Iterator[tuple[str, View]]:
    """Those that are tensors; numbers, text and the like are left out."""
    for key, value in named:
        if isinstance(value, Shell) and "_rebuild" in value.name:
            raise ValueError(f"its tensor {key} is made by {value.name}, which is not known here")
        if isinstance(value, View):
            yield key, value


def _walk(root: Shell) -> Iterator[tuple[str, View]]:
    """What `state_dict()` of the module would give: parameters, persistent buffers, then submodules."""
    waiting = [(root, "")]
    for _ in range(MOST_MODULES):
        if not waiting:
            return
        module, prefix = waiting.pop()
        hidden = module.attributes.get("_non_persistent_buffers_set") or ()
        for kind in ("_parameters", "_buffers"):
            kept = ((name, each) for name, each in _named(module, kind) if kind != "_buffers" or name not in hidden)
            yield from _tensors((prefix + name, each) for name, each in kept)
        inner = [(each, f"{prefix}{name}.") for name, each in _named(module, "_modules") if isinstance(each, Shell)]
        waiting.extend(reversed(inner))
    raise ValueError(f"it has more than {MOST_MODULES} modules, or one that holds itself")


def _named(module: Shell, kind: str) -> list[tuple[str, object]]:
    named = module.attributes.get(kind) or {}
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"the {kind} of a {module.name} have no names")
    return list(named.items())
