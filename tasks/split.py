"""Labelled samples of one task that serve one purpose."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Texts(Sequence):
    """Texts, or pairs of them; taken by a slice or by indices [n], as rows of a tensor are."""

    items: tuple[str | tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, int):
            return self.items[which]
        chosen = self.items[which] if isinstance(which, slice) else (self.items[i] for i in which.tolist())
        return Texts(tuple(chosen))


Inputs = Tensor | Mapping[str, Tensor] | Texts  # images; token ids and their mask by name; or what gives these
HELD = 1 << 26  # bytes of prepared inputs in memory at once
SPLITS = ("train", "val", "calibration", "test")  # calibration is used without its labels


class Uncached:
    """A dataclass that is sent to another process without what it has cached."""

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Split:
    """Samples of one task that serve one purpose."""

    name: str
    inputs: Inputs  # images uint8 [N, 3, H, W], texts, or what a tokenizer gives: {"input_ids": [N, L], ...}
    labels: Tensor  # int64 [N], token ids [N, L], or floating-point numbers [N]
    stored_id: str | None = None  # the fingerprint where it is known, so that samples on disk need not be read for it

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples per task."""
        return (len(self),)

    def take(self, indices: Tensor) -> tuple[Inputs, Tensor]:
        """Inputs and labels [n] of some samples; only these are read."""
        return take(self.inputs, indices), self.labels[indices]

    @cached_property
    def id(self) -> str:
        """Fingerprint: sha256 over inputs and labels, the first 16 hex digits."""
        if self.stored_id is not None:
            return self.stored_id
        digest = hashlib.sha256()
        if isinstance(self.inputs, Texts):
            digest.update(json.dumps(self.inputs.items).encode())
        else:
            named = {"": self.inputs} if isinstance(self.inputs, Tensor) else self.inputs
            for name in sorted(named):
                digest.update(name.encode())
                digest.update(named[name].contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()[:16]


def count_of(inputs: Inputs) -> int:
    """The number of samples."""
    return len(next(iter(inputs.values()))) if isinstance(inputs, Mapping) else len(inputs)


def held(batches: Iterable[Inputs]) -> Iterator[list[Inputs]]:
    """Prepared batches in lists that take about HELD bytes, one at least."""
    some, size = list[Inputs](), 0
    for batch in batches:
        tensors = batch.values() if isinstance(batch, Mapping) else [batch]
        some, size = [*some, batch], size + sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
        if size >= HELD:
            yield some
            some, size = [], 0
    if some:
        yield some


def mapped(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """`function` of every tensor of some inputs; texts have none."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Texts):
        return inputs
    return {name: function(tensor) for name, tensor in inputs.items()}


def take(inputs: Inputs, which: Tensor | slice) -> Inputs:
    """Some samples of inputs."""
    return mapped(lambda tensor: tensor[which], inputs) if isinstance(inputs, Mapping) else inputs[which]


def gather(splits: Sequence[Split], indices: Tensor) -> Inputs:
    """Inputs of several splits counted through, in the order of `indices` [n]; only these are read."""
    ends = torch.tensor([len(split) for split in splits]).cumsum(0)
    owners = torch.bucketize(indices, ends, right=True)
    pieces = {
        owner: take(splits[owner].inputs, indices[owners == owner] - ends[owner] + len(splits[owner]))
        for owner in owners.unique().tolist()
    }
    back = owners.argsort(stable=True).argsort()
    first = splits[0].inputs
    if isinstance(first, Texts):
        return Texts(tuple(item for piece in pieces.values() for item in piece))[back]  # type: ignore[union-attr]
    if isinstance(first, Tensor):
        return torch.cat(list(pieces.values()))[back] if pieces else first[:0]  # type: ignore[arg-type]
    return {name: torch.cat([piece[name] for piece in pieces.values()])[back] for name in first}  # type: ignore[call-overload]
