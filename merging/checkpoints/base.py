"""What a checkpoint is, and tensors in memory as one."""

import contextlib
import hashlib
import mmap
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from merging.cache import Cache
from merging.errors import UserError
from merging.files import Content

MERGED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # what stands for the numbers it holds


class Spec(NamedTuple):
    """What a header says of one tensor."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    @property
    def merged(self) -> bool:
        """Whether numbers like these are merged. Integers count or point, float8 waits for its scale: they are kept."""
        return self.dtype in MERGED


class Change(NamedTuple):
    """By how much a parameter, as a matrix [m, n], differs from another checkpoint's: up [m, r] times down [r, n]."""

    up: Tensor
    down: Tensor

    @property
    def T(self) -> "Change":
        """That of the transposed matrix."""
        return Change(self.down.T, self.up.T)

    def chunk(self, count: int, axis: int) -> "list[Change]":
        """Those of equal blocks of rows (axis 0) or columns, without the ranks that do not reach them."""
        if axis == 1:
            return [change.T for change in self.T.chunk(count, 0)]
        blocks = ((up, up.any(0)) for up in self.up.chunk(count))
        return [Change(up[:, used], self.down[used]) for up, used in blocks]

    @staticmethod
    def joined(changes: "list[Change]", axis: int) -> "Change":
        """That of matrices on one another (axis 0) or side by side."""
        if axis == 1:
            return Change.joined([change.T for change in changes], 0).T
        return Change(torch.block_diag(*(change.up for change in changes)), torch.cat([c.down for c in changes]))

    @staticmethod
    def none(shape: torch.Size) -> "Change":
        """That of a parameter that is as it was, a vector [m] being a matrix [m, 1]."""
        rows = shape[0] if shape else 1
        return Change(torch.zeros(rows, 0), torch.zeros(0, shape.numel() // max(rows, 1)))


@dataclass(frozen=True)
class Known:
    """What a merge remembers of an expert: the sha256 of its content, and the files that must not be overwritten."""

    id: str
    files: tuple[Path, ...] = ()


class Checkpoint:
    """Named tensors, read one by one.

    name: for messages. files: those that it is read from. remarks: what is to be said of how it was read. adapts: the
    checkpoint whose parameters plus `change` of low rank it has; None where it has none of low rank.
    """

    name: str
    files: tuple[Path, ...] = ()
    remarks: tuple[str, ...] = ()
    adapts: "Checkpoint | None" = None

    @property
    def id(self) -> str:
        """sha256 of the content."""
        raise NotImplementedError

    def specs(self) -> Mapping[str, Spec]:
        """What headers say of all tensors; none is read."""
        raise NotImplementedError

    def tensor(self, key: str) -> Tensor:
        """As stored, on the CPU."""
        raise NotImplementedError

    def flat(self, key: str) -> "Tensor | Flat":
        """The flattened tensor, of which slices are taken."""
        return self.tensor(key).reshape(-1)

    def change(self, key: str) -> Change:
        """By how much a parameter differs from that of `adapts`."""
        raise NotImplementedError

    def release(self) -> None:
        """Hand the pages read so far back to the system; a later use reads them again."""


@dataclass(frozen=True)
class Flat:
    """A flattened tensor [size] of which only the entries of a slice are put together."""

    size: int
    entries: Callable[[int, int], Tensor]  # from one on, up to another

    def __getitem__(self, which: slice) -> Tensor:
        first, last, _ = which.indices(self.size)
        return self.entries(first, last)


class Map(mmap.mmap):
    """A mapped file in the form that zipfile wants."""

    def seekable(self) -> bool:
        return True


class OneFile(Checkpoint):
    """A checkpoint in a single file, mapped privately: writing to a tensor never reaches it.

    `id` is the sha256 of the file. Raises UserError for one changed since it was opened.
    """

    def __init__(self, path: str | Path, cache: Cache | None):
        self.path, self.name = Path(path), str(path)
        self.files, self._content = (self.path,), Content(self.path, cache)

    @property
    def id(self) -> str:
        return self._content.id

    @cached_property
    def _map(self) -> Map:
        with self.path.open("rb") as file:
            return Map(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def release(self) -> None:
        if "_map" in vars(self):
            self._map.madvise(mmap.MADV_DONTNEED)


class StateDict(Checkpoint):
    """Tensors in memory as a checkpoint; the id covers names, dtypes, shapes and bytes.

    Raises UserError for what is no dense tensor with numbers.
    """

    def __init__(self, tensors: Mapping[str, Tensor], name: str = "a state dict"):
        for key, tensor in tensors.items():
            if reason := _no_numbers(tensor):
                raise UserError(
                    f"{key} of {name} is {reason}. A state dict maps names to dense tensors: give module.state_dict()."
                )
        self._tensors, self.name = {key: tensor.detach() for key, tensor in tensors.items()}, name
        self._specs = {key: Spec(tensor.shape, tensor.dtype) for key, tensor in self._tensors.items()}

    def specs(self) -> Mapping[str, Spec]:
        return self._specs

    def tensor(self, key: str) -> Tensor:
        if (tensor := self._tensors[key]).is_meta:
            raise UserError(f"{key} of {self.name} has no numbers: it is on the meta device. Load the weights first.")
        return tensor.cpu()

    @property
    def id(self) -> str:
        return self._id

    @cached_property
    def _id(self) -> str:
        hashed = hashlib.sha256()
        for key, tensor in sorted(self._tensors.items()):
            hashed.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            hashed.update(raw_bytes(tensor))
        return hashed.hexdigest()


def _no_numbers(tensor: object) -> str | None:
    """Why something in a state dict cannot be read as numbers, None where it can."""
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}, no tensor"
    return "sparse or quantised" if tensor.layout is not torch.strided or tensor.is_quantized else None


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in C order, without a copy where it is contiguous."""
    return tensor.detach().cpu().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().data


def digest(tensor: Tensor) -> str:
    """sha256 of dtype, shape and bytes."""
    hashed = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    hashed.update(raw_bytes(tensor))
    return hashed.hexdigest()


def identify_ahead(checkpoints: Iterable[Checkpoint]) -> None:
    """Compute their ids one after the other, in a thread of its own, while the caller works on.

    A process that ends does not wait for files. For tensors it does: a thread stopped inside of torch aborts it.
    """
    checkpoints = tuple(checkpoints)

    def identify() -> None:
        for checkpoint in checkpoints:
            with contextlib.suppress(Exception):  # raised again where the id is asked for
                _ = checkpoint.id

    threading.Thread(target=identify, daemon=all(checkpoint.files for checkpoint in checkpoints)).start()
