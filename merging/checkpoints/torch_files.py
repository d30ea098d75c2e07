"""The layouts of torch.save (zip, and legacy before 1.6) and of pickle.dump, read by merging.checkpoints.inert."""

import io
import math
import struct
import zipfile
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from merging.checkpoints.base import Map
from merging.checkpoints.inert import Constructor, Global, Machine, Unsupported

MAGIC = 0x1950A86A20F9469CFC6C  # the first object of a legacy file
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}  # fmt: skip


@dataclass(eq=False)
class Storage:
    """Where the numbers of tensors lie: `count` elements in `memory` from byte `start`; legacy files say it late."""

    dtype: torch.dtype
    count: int
    memory: Map | memoryview | None = None
    start: int = 0

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize

    def flat(self) -> Tensor:
        """All elements [count]; a copy where they are not aligned (legacy) or lie in a plain pickle."""
        assert self.memory is not None
        if self.start % self.dtype.itemsize or isinstance(self.memory, memoryview):
            copied = bytearray(memoryview(self.memory)[self.start : self.start + self.bytes])
            return torch.frombuffer(copied, dtype=self.dtype)
        return torch.frombuffer(self.memory, dtype=self.dtype, count=self.count, offset=self.start)


class Strided(NamedTuple):
    """A tensor to be: a strided window into a storage, as the file claims it until `check`."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def claimed(cls, storage: object, offset: int, shape: tuple, stride: tuple, *_: object) -> "Strided":
        """What torch's own function takes to make a tensor."""
        whole = all(type(number) is int for number in (offset, *shape, *stride))
        if not isinstance(storage, Storage) or not whole:
            raise ValueError("a tensor is made from something that is no storage")
        return cls(storage, offset, shape, stride)

    @property
    def is_weight(self) -> bool:
        return self.storage.dtype.is_floating_point and len(self.shape) > 0

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


@dataclass
class Reader:
    """One file, or a file inside a plain pickle (`nested`)."""

    memory: Map | memoryview
    nested: bool = False
    storages: dict[str, Storage] = field(default_factory=dict)

    def root(self) -> Any:
        """The object in the file, with a Strided for every tensor."""
        if bytes(self.memory[:4]) == b"PK\x03\x04":
            return self._zip()
        stream: Any = io.BytesIO(self.memory) if isinstance(self.memory, memoryview) else self.memory
        value = self._next(stream)
        return self._legacy(stream) if value == MAGIC else value

    def _next(self, stream: BinaryIO) -> Any:
        """The object of the next pickle in a stream."""
        constructors: dict[str, Constructor] = {
            "torch._utils._rebuild_tensor": Strided.claimed,
            "torch._utils._rebuild_tensor_v2": Strided.claimed,
            "torch._utils._rebuild_parameter": lambda value, *_: value,
            "torch._utils._rebuild_parameter_with_state": lambda value, *_: value,
            "torch.Size": tuple,
            "torch.storage._load_from_bytes": self._inner,
            "torch._tensor._rebuild_from_type_v2": lambda function, _, made_of, __: machine.call(function, made_of),
        }
        machine = Machine(stream, constructors, self._persistent)
        return machine.load()

    def _persistent(self, name: object) -> object:
        """A class from ("module", class, its file, its source), or a storage from ("storage", type, key, ...)."""
        if not isinstance(name, tuple) or not name or name[0] not in ("module", "storage"):
            raise ValueError("it refers to something that is neither a class nor a storage")
        return name[1] if name[0] == "module" else self._storage(*name[1:])

    def _storage(self, kind: object, key: object, _device: object, count: object, *window: object) -> Storage:
        dtype = STORAGES.get(kind.rpartition(".")[2]) if isinstance(kind, Global) else None
        if dtype is None or any(window):
            raise ValueError("it refers to something that is no storage of numbers")
        if not isinstance(key, str) or type(count) is not int or count < 0:
            raise ValueError("a storage has no name or no size")
        storage = self.storages.setdefault(key, Storage(dtype, count))
        if (storage.dtype, storage.count) != (dtype, count):
            raise ValueError(f"its storage {key} is of two types")
        return storage

    def _inner(self, content: object) -> object:
        """A storage that a plain pickle holds as a torch file of its own."""
        if self.nested:
            raise ValueError("it hides a file in a file in a file")
        if not isinstance(content, bytes | bytearray | memoryview):
            raise ValueError("it holds numbers in something that is no bytes")
        return Reader(memoryview(content), nested=True).root()

    def _zip(self) -> object:
        if self.nested:
            raise ValueError("it hides an archive in a pickle")
        with zipfile.ZipFile(self.memory) as archive:  # type: ignore[arg-type]
            records = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
                raise Unsupported("it was written on a big-endian machine")
            if records["data.pkl"].compress_type != zipfile.ZIP_STORED:
                raise Unsupported("its records are compressed, which torch.save never does")
            root = self._next(io.BytesIO(archive.read(records["data.pkl"])))
        for key, storage in self.storages.items():
            entry = records[f"data/{key}"]
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != storage.bytes:
                raise ValueError(f"its record {entry.filename} has not the size it claims")
            name, extra = struct.unpack("<HH", self.memory[entry.header_offset + 26 : entry.header_offset + 30])
            storage.memory, storage.start = self.memory, entry.header_offset + 30 + name + extra
        return root

    def _legacy(self, stream: BinaryIO) -> object:
        """After the magic number: protocol, system, the object, the storages' keys, then count and bytes of each."""
        _, _, root, keys = (self._next(stream) for _ in range(4))
        for key in keys:
            storage = self.storages[key]
            (count,) = struct.unpack("<q", stream.read(8))
            if count != storage.count:
                raise ValueError(f"its storage {key} has {count} numbers and claims {storage.count}")
            storage.start, storage.memory = stream.tell(), self.memory
            stream.seek(storage.start + storage.bytes)
        return root
