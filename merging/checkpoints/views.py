"""Checkpoints seen in another way: other names and other cuts of the same tensors, read only when asked for."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from merging.checkpoints.base import Change, Checkpoint, Flat, Spec
from merging.errors import UserError
from merging.preflight import some


@dataclass(frozen=True)
class Piece:
    """A tensor of a view before it is read. `read("tensor")` gives it, `read("change")` its Change."""

    source: str  # name of the checkpoint
    key: str  # under which it is stored, of a joined one the first
    spec: Spec
    read: Callable[[str], Any]
    joined: tuple["Piece", ...] = ()  # those that it is put together from
    axis: int = 0  # along which
    flat: Flat | None = None  # where reading all of it would make it

    @property
    def turned(self) -> "Piece":
        """The transposed matrix, contiguous."""
        return Piece(self.source, self.key, Spec(self.spec.shape[::-1], self.spec.dtype), partial(_turned, self.read))

    def third(self, index: int, axis: int) -> "Piece":
        """One of three equal blocks along an axis; where they were joined the others are not read.

        Raises UserError for a side that is no multiple of 3.
        """
        if len({piece.spec.shape for piece in self.joined}) == 1 and len(self.joined) == 3 and self.axis == axis:
            return self.joined[index]
        sizes = [*self.spec.shape]
        if not sizes or sizes[axis] % 3:
            raise UserError(
                f"{self.source}: {self.key} of shape {tuple(sizes)} is no stack of query, key and value: its side "
                f"{axis} is not a multiple of 3."
            )
        sizes[axis] //= 3
        spec = Spec(torch.Size(sizes), self.spec.dtype)
        return Piece(self.source, self.key, spec, partial(_third, self.read, index, axis))


# Of pieces, what reads one: functions by name, as a checkpoint goes to other processes with the heads fitted on it.
def _stored(checkpoint: Checkpoint, key: str, what: str) -> Any:
    return getattr(checkpoint, what)(key)


def _turned(read: Callable[[str], Any], what: str) -> Any:
    value = read(what).T
    return value.contiguous() if isinstance(value, Tensor) else value


def _third(read: Callable[[str], Any], index: int, axis: int, what: str) -> Any:
    return read(what).chunk(3, axis)[index]


def _joined(pieces: Sequence[Piece], axis: int, what: str) -> Any:
    return {"tensor": torch.cat, "change": Change.joined}[what]([piece.read(what) for piece in pieces], axis)


def join_pieces(pieces: Sequence[Piece], axis: int) -> Piece:
    """Tensors one after the other along an axis. Raises UserError for shapes that do not fit."""
    shapes = [piece.spec.shape for piece in pieces]
    if len({(*shape[:axis], None, *shape[axis + 1 :]) for shape in shapes}) > 1 or not shapes[0]:
        names, sizes = ", ".join(piece.key for piece in pieces), ", ".join(str(tuple(shape)) for shape in shapes)
        raise UserError(f"{pieces[0].source}: {names} of shapes {sizes} do not fit on one another.")
    whole = [*shapes[0]]
    whole[axis] = sum(shape[axis] for shape in shapes)
    dtype = reduce(torch.promote_types, (piece.spec.dtype for piece in pieces))
    read = partial(_joined, pieces, axis)
    return Piece(pieces[0].source, pieces[0].key, Spec(torch.Size(whole), dtype), read, tuple(pieces), axis)


def pieces_of(checkpoint: Checkpoint) -> Mapping[str, Piece]:
    """The tensors of a checkpoint as pieces of a view; those of a view are its own."""
    if isinstance(checkpoint, View):
        return checkpoint.pieces
    return {key: Piece(checkpoint.name, key, spec, partial(_stored, checkpoint, key))
            for key, spec in checkpoint.specs().items()}  # fmt: skip


class View(Checkpoint):
    """Pieces of one checkpoint or of several, `below`, under new names. Nothing is read before `tensor`.

    The id of several is the sha256 of all their ids.
    """

    def __init__(self, pieces: Mapping[str, Piece], *below: Checkpoint, remarks: tuple[str, ...] = ()):
        self.pieces, self.below = dict(pieces), below
        self.name, self.remarks = below[0].name, below[0].remarks + remarks
        self.files = tuple(path for checkpoint in below for path in checkpoint.files)
        self.adapts = below[0].adapts if len(below) == 1 else None
        self._specs = {key: piece.spec for key, piece in pieces.items()}

    @property
    def id(self) -> str:
        ids = [checkpoint.id for checkpoint in self.below]
        return ids[0] if len(ids) == 1 else hashlib.sha256(" ".join(ids).encode()).hexdigest()

    def specs(self) -> Mapping[str, Spec]:
        return self._specs

    def tensor(self, key: str) -> Tensor:
        return self.pieces[key].read("tensor")

    def flat(self, key: str) -> Tensor | Flat:
        return super().flat(key) if (flat := self.pieces[key].flat) is None else flat

    def change(self, key: str) -> Change:
        return self.pieces[key].read("change")

    def release(self) -> None:
        for checkpoint in self.below:
            checkpoint.release()


def renamed(
    checkpoint: Checkpoint, names: Mapping[str, str], remarks: tuple[str, ...] = (), turned: Collection[str] = ()
) -> View:
    """The tensors of `names` (stored name -> new name), those of `turned` transposed, and what is to be said of it.

    Raises UserError for a new name given twice.
    """
    pieces, stored = {}, pieces_of(checkpoint)
    for key, name in names.items():
        if name in pieces:
            raise UserError(f"{checkpoint.name} holds {name} twice: as {pieces[name].key} and as {key}.")
        pieces[name] = stored[key].turned if key in turned else stored[key]
    return View(pieces, checkpoint, remarks=remarks)


def selected(checkpoint: Checkpoint, keys: Iterable[str], remarks: tuple[str, ...] = ()) -> View:
    """Some tensors of a checkpoint, in this order."""
    stored = pieces_of(checkpoint)
    return View({key: stored[key] for key in keys}, checkpoint, remarks=remarks)


def below(checkpoint: Checkpoint, prefix: str) -> View:
    """The tensors whose keys start with a prefix, such as the image tower of a CLIP."""
    return selected(checkpoint, (key for key in checkpoint.specs() if key.startswith(prefix)))


def completed(first: Checkpoint, second: Checkpoint, keys: Iterable[str]) -> View:
    """`first`, and of `keys` those that it lacks from `second`: the Hub's experts have no projection, the base has.

    Raises UserError for a key that neither has.
    """
    stored, others = pieces_of(first), pieces_of(second)
    lacking = sorted(set(keys) - stored.keys())
    if missing := [key for key in lacking if key not in others]:
        raise UserError(
            f"Neither {first.name} nor {second.name} has {some(missing)}. Take the second from a whole model."
        )
    return View({**stored, **{key: others[key] for key in lacking}}, first, *([second] if lacking else []))


def same_source(first: Checkpoint, second: Checkpoint) -> bool:
    """Whether two checkpoints are views of the same stored numbers."""
    first, second = source_of(first), source_of(second)
    if first is second:
        return True
    return first.files == second.files if first.files or second.files else first.id == second.id


def source_of(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint below views of it."""
    while isinstance(checkpoint, View) and len(checkpoint.below) == 1:
        checkpoint = checkpoint.below[0]
    return checkpoint
