"""Safetensors files: the header is read at once, weights on demand; written tensor by tensor."""

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from merging.cache import Cache
from merging.checkpoints.base import OneFile, Spec, raw_bytes
from merging.checkpoints.file_kinds import expect, reading
from merging.errors import UserError
from merging.files import write_atomically

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsFile(OneFile):
    """A safetensors file; tensors are views of its map, valid as long as they live.

    Raises UserError for a file that is missing, truncated, corrupt or of an unknown dtype, from its header alone.
    """

    def __init__(self, path: str | Path, cache: Cache | None = None):
        path, self._specs, self._starts = Path(path), {}, {}
        try:
            with reading(path):
                super().__init__(path, cache)
                self._read_header()
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            if path.stat().st_size not in range(1, 9):  # long enough to tell what it is, or empty
                expect(path, "safetensors")
            raise UserError(
                f"{path} is not a readable safetensors file ({error}). It may be truncated or damaged: "
                f"copy or download it again, or convert the weights with safetensors.torch.save_file."
            ) from error

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        """To another process goes the path: it maps the file itself."""
        return SafetensorsFile, (self.path,)

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

    def specs(self) -> Mapping[str, Spec]:
        return self._specs

    def tensor(self, key: str) -> Tensor:
        """The tensor as stored; no byte is read before it is used."""
        shape, dtype = self._specs[key]
        if shape.numel() == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=shape.numel(), offset=self._starts[key]).view(shape)


def write_safetensors(
    path: str | Path,
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, Tensor | Iterable[Tensor]]],
    metadata: Mapping[str, str],
    finished: Callable[[], Mapping[str, str]] | None = None,
) -> Path:
    """Write tensors one at a time, in the order of `specs`, whole or in flat pieces: memory holds one of them. Atomic.

    `finished` gives the metadata when the tensors are written, at most as long as the draft in `metadata`. Raises
    UserError, before anything is written, for a dtype that safetensors does not have.
    """
    for key, spec in specs.items():
        if spec.dtype not in NAMES:
            raise UserError(
                f"Cannot write {path}: {key} is of {spec.dtype}, which a safetensors file cannot hold. Convert it to "
                f"one of {', '.join(map(str, NAMES))}, or leave it out."
            )
    encoded = _header(specs, metadata)

    def write(file: BinaryIO) -> None:
        file.write(encoded)
        for expected, (key, tensor) in zip(specs, tensors, strict=True):
            spec, written = specs[expected], 0
            for piece in (tensor,) if isinstance(tensor, Tensor) else tensor:
                whole = piece.ndim == 1 or piece.shape == spec.shape
                if key != expected or not whole or piece.dtype != spec.dtype:
                    raise ValueError(f"{key} {piece.dtype} {tuple(piece.shape)} does not match the header of {path}")
                written += file.write(raw_bytes(piece))
            if written != spec.bytes:
                raise ValueError(f"{key} of {written} bytes does not match the header of {path}, {spec.bytes}")
        if finished is not None:
            last = _header(specs, finished(), len(encoded))
            assert len(last) == len(encoded), "the metadata outgrew their draft"
            file.seek(0)
            file.write(last)

    return write_atomically(path, write)


def _header(specs: Mapping[str, Spec], metadata: Mapping[str, str], length: int = 0) -> bytes:
    """The beginning of a file, up to its tensors; filled with spaces up to `length` bytes or the next multiple of 8."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for key, spec in specs.items():
        header[key] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [end, end + spec.bytes]}
        end += spec.bytes
    encoded = json.dumps(header).encode()
    encoded = encoded.ljust(max(length - 8, len(encoded) + -len(encoded) % 8))
    return struct.pack("<Q", len(encoded)) + encoded
