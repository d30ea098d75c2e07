"""Writes safetensors files tensor by tensor, their header first or last."""

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from merging.checkpoints import NAMES, Spec, raw_bytes
from merging.errors import UserError
from merging.files import write_atomically


def write_safetensors(
    path: str | Path,
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    finished: Callable[[], Mapping[str, str]] | None = None,
) -> Path:
    """Write tensors one at a time, in the order of `specs`, so that memory holds one of them. Atomic.

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
            if key != expected or Spec(tensor.shape, tensor.dtype) != specs[key]:
                raise ValueError(f"{key} {tensor.dtype} {tuple(tensor.shape)} does not match the header of {path}")
            file.write(raw_bytes(tensor))
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
