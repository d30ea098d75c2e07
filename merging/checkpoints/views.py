"""Checkpoints seen in another way: other names and other cuts of the same tensors, read only when asked for."""

import re
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from merging.checkpoints import Checkpoint, Spec
from merging.errors import UserError
from merging.preflight import some

QKV = "qkv"  # the order in which open_clip stacks them; Hugging Face registers k, v, q
FUSED = re.compile(r"(.*\battn\.)in_proj_(weight|bias)")
APART = re.compile(r"(.*\battn\.)([qkv])_proj_(weight|bias)")


class Made(NamedTuple):
    """How a tensor of a view is made of tensors below: as it is, all joined along axis 0, transposed, or a third."""

    keys: tuple[str, ...]
    how: Literal["same", "joined", "transposed", "third"] = "same"
    third: int = 0


def remarks_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What is to be said of how a checkpoint was read, nothing for most."""
    return getattr(checkpoint, "remarks", ())


class View:
    """A checkpoint in another layout. Nothing is read before `tensor`; specs come from the header, the id is its own.

    `remarks`: what is to be said of how it was read. Raises UserError for tensors that cannot be joined or cut.
    """

    def __init__(self, whole: Checkpoint, made: Mapping[str, Made], remarks: tuple[str, ...] = ()):
        self._whole, self._made, self.remarks = whole, dict(made), remarks_of(whole) + remarks
        specs = whole.specs()
        self._specs = {key: self._spec(key, [specs[name] for name in each.keys]) for key, each in self._made.items()}

    def _spec(self, key: str, below: list[Spec]) -> Spec:
        first, made = below[0], self._made[key]
        if made.how == "joined":
            if not first.shape or any(spec.shape[1:] != first.shape[1:] for spec in below):
                shapes = ", ".join(str(tuple(spec.shape)) for spec in below)
                raise UserError(f"{self.name}: {', '.join(made.keys)} of shapes {shapes} do not fit on one another.")
            dtype = reduce(torch.promote_types, (spec.dtype for spec in below))
            return Spec(torch.Size((sum(spec.shape[0] for spec in below), *first.shape[1:])), dtype)
        if made.how == "transposed":
            return Spec(first.shape[::-1], first.dtype)
        if made.how == "third":
            if not first.shape or first.shape[0] % 3:
                raise UserError(
                    f"{self.name}: {made.keys[0]} of shape {tuple(first.shape)} is no stack of query, key and value: "
                    f"its first side is not a multiple of 3."
                )
            return Spec(torch.Size((first.shape[0] // 3, *first.shape[1:])), first.dtype)
        return first

    @property
    def name(self) -> str:
        return self._whole.name

    @property
    def id(self) -> str:
        return self._whole.id

    @property
    def files(self) -> tuple[Path, ...]:
        return self._whole.files

    def specs(self) -> Mapping[str, Spec]:
        return self._specs

    def tensor(self, key: str) -> Tensor:
        """As stored where it can be, else a contiguous copy."""
        made = self._made[key]
        below = [self._whole.tensor(name) for name in made.keys]
        if made.how == "joined":
            return torch.cat(below)
        if made.how == "transposed":
            return below[0].T.contiguous()
        return below[0] if made.how == "same" else below[0].chunk(3)[made.third]

    def release(self) -> None:
        self._whole.release()


class Part(View):
    """The tensors of a checkpoint whose keys start with a prefix, such as the image tower of a CLIP."""

    def __init__(self, whole: Checkpoint, prefix: str):
        super().__init__(whole, {key: Made((key,)) for key in whole.specs() if key.startswith(prefix)})


class Separate(View):
    """Every fused `in_proj_weight` and `in_proj_bias` as three parameters `q_proj_*`, `k_proj_*` and `v_proj_*`."""

    def __init__(self, whole: Checkpoint):
        made: dict[str, Made] = {}
        for key in whole.specs():
            names = separate_names(key)
            made |= {name: Made((key,), "third", i) for i, name in enumerate(names)} or {key: Made((key,))}
        super().__init__(whole, made)


class Overlay:
    """`first`, and of `keys` those that it lacks from `second`: the Hub's experts have no projection, the base has.

    Raises UserError for a key that neither has.
    """

    def __init__(self, first: Checkpoint, second: Checkpoint, keys: Iterable[str]):
        self._first, self._second, self.remarks = first, second, remarks_of(first)
        self._taken = frozenset(keys) - first.specs().keys()
        if missing := sorted(self._taken - second.specs().keys()):
            raise UserError(
                f"Neither {first.name} nor {second.name} has {some(missing)}. Take the second from a whole model."
            )

    @property
    def name(self) -> str:
        return self._first.name

    @property
    def id(self) -> str:
        """Both ids where something is taken from the second."""
        return f"{self._first.id}+{self._second.id}" if self._taken else self._first.id

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self._first.files, *self._second.files)

    def specs(self) -> Mapping[str, Spec]:
        second = self._second.specs()
        return {**self._first.specs(), **{key: second[key] for key in sorted(self._taken)}}

    def tensor(self, key: str) -> Tensor:
        return (self._second if key in self._taken else self._first).tensor(key)

    def release(self) -> None:
        self._first.release()
        self._second.release()


def separate_names(key: str) -> tuple[str, ...]:
    """The three names of a fused projection in the order q, k, v; none for any other parameter."""
    match = FUSED.fullmatch(key)
    return tuple(f"{match[1]}{part}_proj_{match[2]}" for part in QKV) if match else ()


def fused_name(key: str) -> str:
    """The name of the fused projection that a separate one belongs to, any other name unchanged."""
    match = APART.fullmatch(key)
    return f"{match[1]}in_proj_{match[3]}" if match else key
