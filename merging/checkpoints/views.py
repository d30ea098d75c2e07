"""Checkpoints seen in another way: other names and other cuts of the same tensors, read only when asked for."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from merging.checkpoints.base import Adapted, Change, Checkpoint, Over, Spec
from merging.errors import UserError
from merging.preflight import some


class Made(NamedTuple):
    """How a tensor of a view is made of tensors below: as it is, transposed, all joined along `axis`, or a third."""

    keys: tuple[str, ...]
    how: Literal["same", "joined", "transposed", "third"] = "same"
    third: int = 0
    axis: int = 0


def remarks_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What is to be said of how a checkpoint was read, nothing for most."""
    return getattr(checkpoint, "remarks", ())


def all_remarks(names: Sequence[str], checkpoints: Sequence[Checkpoint]) -> tuple[str, ...]:
    """The remarks on several, each with the names of those that it is true of."""
    of: dict[str, list[str]] = {}
    for name, checkpoint in zip(names, checkpoints, strict=True):
        for remark in remarks_of(checkpoint):
            of.setdefault(remark, []).append(name)
    return tuple(f"{', '.join(those)}: {remark}" for remark, those in of.items())


class View(Over):
    """A checkpoint in another layout. Nothing is read before `tensor`; specs come from the header, the id is its own.

    `remarks`: what is to be said of how it was read. Raises UserError for tensors that cannot be joined or cut.
    """

    def __init__(self, whole: Checkpoint, made: Mapping[str, Made], remarks: tuple[str, ...] = ()):
        super().__init__(whole)
        self.whole, self.made, self.remarks = whole, dict(made), remarks_of(whole) + remarks
        specs = whole.specs()
        self._specs = {key: self._spec(way, [specs[name] for name in way.keys]) for key, way in self.made.items()}

    def _spec(self, made: Made, below: list[Spec]) -> Spec:
        shape, dtype = below[0]
        if made.how == "transposed":
            return Spec(shape[::-1], dtype)
        if made.how == "same":
            return below[0]
        sizes, axis = [*shape], made.axis
        if made.how == "joined":
            others = {(*spec.shape[:axis], *spec.shape[axis + 1 :]) for spec in below}
            if not shape or len(others) > 1 or any(len(spec.shape) != len(shape) for spec in below):
                shapes = ", ".join(str(tuple(spec.shape)) for spec in below)
                raise UserError(f"{self.name}: {', '.join(made.keys)} of shapes {shapes} do not fit on one another.")
            sizes[axis] = sum(spec.shape[axis] for spec in below)
            return Spec(torch.Size(sizes), reduce(torch.promote_types, (spec.dtype for spec in below)))
        if not shape or sizes[axis] % 3:
            raise UserError(
                f"{self.name}: {made.keys[0]} of shape {tuple(shape)} is no stack of query, key and value: its "
                f"side {axis} is not a multiple of 3."
            )
        sizes[axis] //= 3
        return Spec(torch.Size(sizes), dtype)

    @property
    def adapts(self) -> Checkpoint | None:
        return getattr(self.whole, "adapts", None)

    def specs(self) -> Mapping[str, Spec]:
        return self._specs

    def tensor(self, key: str) -> Tensor:
        """As stored where it can be, else a contiguous copy."""
        found = self._read(key, lambda below, name: below.tensor(name), torch.cat)
        return found.contiguous() if self.made[key].how == "transposed" else found

    def change(self, key: str) -> Change:
        read: Callable[[Adapted, str], Change] = lambda below, name: below.change(name)  # noqa: E731
        return self._read(key, read, Change.joined)

    def _read(self, key: str, read: Callable[[Any, str], Any], join: Callable[[list, int], Any]) -> Any:
        """What `read` gives of tensors below, put together in the way of `key`."""
        made = self.made[key]
        if made.how == "third":
            return _third(self.whole, made, read)
        below = [read(self.whole, name) for name in made.keys]
        if made.how == "joined":
            return join(below, made.axis)
        return below[0].T if made.how == "transposed" else below[0]


def _third(whole: Checkpoint, made: Made, read: Callable[[Any, str], Any]) -> Any:
    """A third of a tensor; of one that a view joined from three, it is one of these, and the others are not read."""
    if isinstance(whole, View):
        inner = whole.made[made.keys[0]]
        if inner.how == "same":
            return _third(whole.whole, made._replace(keys=inner.keys), read)
        shapes = {whole.whole.specs()[key].shape for key in inner.keys}
        if inner.how == "joined" and len(inner.keys) == 3 and inner.axis == made.axis and len(shapes) == 1:
            return read(whole.whole, inner.keys[made.third])
    return read(whole, made.keys[0]).chunk(3, made.axis)[made.third]


def renamed(
    checkpoint: Checkpoint, names: Mapping[str, str], remarks: tuple[str, ...] = (), turned: Collection[str] = ()
) -> View:
    """The tensors of `names` (stored name -> new name), those of `turned` transposed, and what is to be said of it.

    Raises UserError for a new name given twice.
    """
    made: dict[str, Made] = {}
    for key, name in names.items():
        if name in made:
            raise UserError(f"{checkpoint.name} holds {name} twice: as {made[name].keys[0]} and as {key}.")
        made[name] = Made((key,), "transposed" if key in turned else "same")
    return View(checkpoint, made, remarks)


def same_source(first: Checkpoint | None, second: Checkpoint) -> bool:
    """Whether two checkpoints are views of the same stored numbers."""
    while isinstance(first, View):
        first = first.whole
    while isinstance(second, View):
        second = second.whole
    if first is None or first is second:
        return first is second
    return first.files == second.files if first.files or second.files else first.id == second.id


class Part(View):
    """The tensors of a checkpoint whose keys start with a prefix, such as the image tower of a CLIP."""

    def __init__(self, whole: Checkpoint, prefix: str):
        super().__init__(whole, {key: Made((key,)) for key in whole.specs() if key.startswith(prefix)})


class Overlay(Over):
    """`first`, and of `keys` those that it lacks from `second`: the Hub's experts have no projection, the base has.

    Raises UserError for a key that neither has.
    """

    def __init__(self, first: Checkpoint, second: Checkpoint, keys: Iterable[str]):
        super().__init__(first, second)
        self._first, self._second, self.remarks = first, second, remarks_of(first)
        self._taken = frozenset(keys) - first.specs().keys()
        if missing := sorted(self._taken - second.specs().keys()):
            raise UserError(
                f"Neither {first.name} nor {second.name} has {some(missing)}. Take the second from a whole model."
            )

    @property
    def id(self) -> str:
        """Both ids where something is taken from the second."""
        return f"{self._first.id}+{self._second.id}" if self._taken else self._first.id

    def specs(self) -> Mapping[str, Spec]:
        second = self._second.specs()
        return {**self._first.specs(), **{key: second[key] for key in sorted(self._taken)}}

    def tensor(self, key: str) -> Tensor:
        return (self._second if key in self._taken else self._first).tensor(key)
