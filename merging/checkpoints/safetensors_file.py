"""Safetensors files: the header is read at once, weights on demand, the content id only when asked for."""

import json
import mmap
import struct
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from merging.cache import Cache
from merging.checkpoints.base import OneFile, Spec
from merging.checkpoints.file_kinds import expect, reading
from merging.errors import UserError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsFile(OneFile):
    """A safetensors file, memory mapped.

    Tensors are views of a private map: valid as long as they live, and writing to one never reaches the file.
    Raises UserError for a file that is missing, truncated, corrupt or of an unknown dtype, from its header alone.
    """

    def __init__(self, path: str | Path, cache: Cache | None = None):
        self.path = Path(path)
        self._specs: dict[str, Spec] = {}
        self._starts: dict[str, int] = {}
        try:
            with reading(self.path):
                super().__init__(path, cache)
                self._read_header()
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            if self.path.stat().st_size not in range(1, 9):  # long enough to tell what it is, or empty
                expect(self.path, "safetensors")
            raise UserError(
                f"{self.path} is not a readable safetensors file ({error}). It may be truncated or damaged: "
                f"copy or download it again, or convert the weights with safetensors.torch.save_file."
            ) from error

    def _read_header(self) -> None:
        size, *_ = self._content.facts
        with self.path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if 8 + length > size:
                raise ValueError(f"its header claims {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        for key, entry in header.items():
            if (dtype := entry["dtype"]) not in DTYPES:
                raise UserError(
                    f"{self.path} is not a readable safetensors file: {key} is of type {dtype}, and only "
                    f"{', '.join(DTYPES)} are read. Convert its weights to one of them."
                )
            spec = Spec(torch.Size(entry["shape"]), DTYPES[dtype])
            start, end = entry["data_offsets"]
            if min(0, start, *spec.shape) < 0 or end - start != spec.bytes or 8 + length + end > size:
                raise ValueError(f"{key} claims bytes {start} to {end}, the data section has {size - 8 - length}")
            self._specs[key], self._starts[key] = spec, 8 + length + start
        for key, kept in self.metadata.items():  # how safetensors.torch.save_model notes a tied weight that it left out
            if kept in header and key not in header:
                self._specs[key], self._starts[key] = self._specs[kept], self._starts[kept]

    @cached_property
    def _map(self) -> mmap.mmap:
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def specs(self) -> Mapping[str, Spec]:
        return self._specs

    def tensor(self, key: str) -> Tensor:
        """The tensor as stored; no byte is read before it is used."""
        shape, dtype = self._specs[key]
        if shape.numel() == 0:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(self._map, dtype=dtype, count=shape.numel(), offset=self._starts[key])
        return flat.view(shape)

    def release(self) -> None:
        """Hand the pages read so far back to the system; a later use reads them again."""
        if "_map" in self.__dict__:
            self._map.madvise(mmap.MADV_DONTNEED)
