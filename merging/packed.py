"""Matrices in 4 or 8 bits an entry: whole numbers packed into bytes, and a step for every group of inputs."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from merging.checkpoints import Spec
from merging.errors import UserError
from merging.options import Count, Options

STEP = torch.bfloat16  # which has the range of fp32


@dataclass(frozen=True)
class Packed:
    """A parameter of `shape`, step (code - zero) in every entry of the matrix [m, n] as it is applied.

    codes: uint8 [m, ceil(n bits / 8)]. steps: [m, k] of the k groups of inputs. zeros: the codes that stand for 0,
    packed as codes are, uint8 [m, ceil(k bits / 8)]; None where it is the middle one. transposed: stored [n, m].
    """

    codes: Tensor
    steps: Tensor
    zeros: Tensor | None
    shape: torch.Size
    bits: int
    group: int
    transposed: bool = False

    def opened(self) -> Tensor:
        """All its numbers, fp32 [*shape]."""
        matrix = self._rows(0, len(self.codes))
        return (matrix.T.contiguous() if self.transposed else matrix).view(self.shape)

    def entries(self, first: int, last: int) -> Tensor:
        """Entries [first, last) of the flattened parameter; only the rows that hold them are opened."""
        if self.transposed:
            return self.opened().view(-1)[first:last]
        width = self.shape.numel() // len(self.codes)
        top = first // width
        return self._rows(top, -(-last // width)).view(-1)[first - top * width : last - top * width]

    def _rows(self, top: int, bottom: int) -> Tensor:
        """Rows [top, bottom) of the matrix."""
        width, steps = self.shape.numel() // len(self.codes), self.steps[top:bottom].float()
        codes = unpacked(self.codes[top:bottom], self.bits, width).float()
        middle = torch.full_like(steps, 2 ** (self.bits - 1))
        zeros = middle if self.zeros is None else unpacked(self.zeros[top:bottom], self.bits, steps.shape[1]).float()
        return (codes - spread(zeros, self.group, width)) * spread(steps, self.group, width)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        named = {"codes": self.codes, "steps": self.steps, "zeros": self.zeros}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def bytes(self) -> int:
        """Of all that is stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def named(packed: Mapping[str, Packed], prefix: str) -> dict[str, Tensor]:
    """What is stored of parameters, as tensors prefix + parameter / name."""
    return {f"{prefix}{key}/{name}": tensor for key, own in packed.items() for name, tensor in own.tensors.items()}


def told(packed: Mapping[str, Packed], specs: Mapping[str, Spec]) -> str:
    """What `rebuilt` needs beside the tensors, as JSON; specs: what parameters are rounded to when they are opened."""
    fields = ("bits", "group", "transposed")
    facts = {key: {name: getattr(own, name) for name in fields} for key, own in packed.items()}
    rest = {key: {"shape": list(own.shape), "dtype": str(specs[key].dtype)[6:]} for key, own in packed.items()}
    return json.dumps({key: facts[key] | rest[key] for key in packed})


def rebuilt(text: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Packed], dict[str, Spec]]:
    """Parameters from what is `told` and the tensors of `named`, without their prefix; and what they are opened as."""
    facts = json.loads(text)
    shapes = {key: torch.Size(of.pop("shape")) for key, of in facts.items()}
    specs = {key: Spec(shapes[key], getattr(torch, of.pop("dtype"))) for key, of in facts.items()}
    own = {key: {name: tensors.get(f"{key}/{name}") for name in ("steps", "zeros")} for key in facts}
    packed = {key: Packed(tensors[f"{key}/codes"], **own[key], shape=shapes[key], **of) for key, of in facts.items()}
    return packed, specs


@dataclass(frozen=True)
class Grid(Options):
    """Mixin of the methods that round matrices [m, n]: `group` inputs of a row share a step, the last maybe fewer.

    bits: 4 or 8. symmetric: the middle code is 0 and the largest entry of a group the largest code; else steps reach
    from the least entry, or 0, to the greatest, and the code of 0 is stored, too.
    """

    bits: Literal[4, 8] = field(default=4, kw_only=True)
    group: Count = field(default=64, kw_only=True)
    symmetric: bool = field(default=True, kw_only=True)

    def check_width(self, key: str, width: int) -> None:
        """Raises UserError for a layer that is narrower than a group."""
        if width < self.group:
            raise UserError(
                f"{self.prefix}{key} has {width} inputs, and group={self.group} of them are to share a step: the layer "
                f"is narrower than its group. Lower method.group to {width} or less, or leave the layer as it is."
            )

    def grid(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Steps, rounded as they are stored, and codes of 0, [m, k] both, of the groups of weight [m, n]."""
        groups = functional.pad(weight, (0, -weight.shape[1] % self.group)).unflatten(1, (-1, self.group))
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        last = 2**self.bits - 1
        width, codes = (torch.maximum(-low, high), last // 2) if self.symmetric else (high - low, last)
        steps = (width / codes).to(STEP)
        steps = torch.where(steps > 0, steps, 1).to(weight)
        middle = torch.full_like(steps, 2 ** (self.bits - 1))
        return steps, middle if self.symmetric else (-low / steps).round().clamp(0, last)

    def codes(self, weight: Tensor, steps: Tensor, zeros: Tensor) -> Tensor:
        """The nearest codes of entries, as numbers of their dtype; all of one shape."""
        return ((weight / steps).round() + zeros).clamp(0, 2**self.bits - 1)

    def nearest(self, weight: Tensor, shape: Sequence[int] | None = None, transposed: bool = False) -> Packed:
        """Every entry of weight [m, n] at its nearest code; shape, transposed: as the parameter is stored."""
        steps, zeros = self.grid(weight)
        wide = (spread(part, self.group, weight.shape[1]) for part in (steps, zeros))
        return self.packed(self.codes(weight, *wide), steps, zeros, shape, transposed)

    def packed(
        self, codes: Tensor, steps: Tensor, zeros: Tensor, shape: Sequence[int] | None = None, transposed: bool = False
    ) -> Packed:
        """Codes [m, n] with the steps and zeros [m, k] of their groups, as they are stored."""
        stored = torch.Size(codes.shape if shape is None else shape)
        kept = None if self.symmetric else packed(zeros.to(torch.uint8), self.bits).cpu()
        codes = packed(codes.to(torch.uint8), self.bits).cpu()
        return Packed(codes, steps.to(STEP).cpu(), kept, stored, self.bits, self.group, transposed)

    def compensated(self, weight: Tensor, gram: Tensor, damp: float, **stored: Any) -> Packed:
        """GPTQ (Frantar et al., 2023): columns of weight [m, n] one by one, each error made good in those that follow.

        So that |(W - Q) X^T| is small for inputs with X^T X = gram [n, n], of which `damp` of its mean diagonal is
        added. A group's step is chosen when its first column is reached. Computed in the dtype of weight.
        """
        weight, width = weight.clone(), weight.shape[1]
        regular = gram + damp * gram.diagonal().mean() * torch.eye(width).to(gram)
        inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(regular)), upper=True)
        codes, grids = torch.empty_like(weight), []
        for start, stop in _spans(width, self.group):
            steps, zeros = grid = self.grid(weight[:, start:stop])
            grids.append(grid)
            for column in range(start, stop):
                entry = weight[:, column : column + 1]
                code = self.codes(entry, steps, zeros)
                error = (entry - (code - zeros) * steps) / inverse[column, column]
                codes[:, column : column + 1] = code
                weight[:, column + 1 : stop] -= error * inverse[column, column + 1 : stop]
                weight[:, column : column + 1] = error  # what columns behind the group are still to be told
            weight[:, stop:] -= weight[:, start:stop] @ inverse[start:stop, stop:]
        steps, zeros = (torch.cat(parts, 1) for parts in zip(*grids, strict=True))
        return self.packed(codes, steps, zeros, **stored)


def _spans(width: int, group: int) -> Iterator[tuple[int, int]]:
    """First column of every group, and the one behind its last."""
    return ((start, min(start + group, width)) for start in range(0, width, group))


def spread(values: Tensor, group: int, width: int) -> Tensor:
    """One value per group [m, k] as one per input [m, width]."""
    return values.repeat_interleave(group, 1)[:, :width]


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes [m, n] in as few bytes as hold them, uint8 [m, ceil(n bits / 8)], the first in the lowest bits."""
    if bits == 8:
        return codes
    low, high = functional.pad(codes, (0, codes.shape[1] % 2)).unflatten(1, (-1, 2)).unbind(2)
    return low | (high << 4)


def unpacked(stored: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of every row."""
    return stored if bits == 8 else torch.stack([stored & 15, stored >> 4], 2).flatten(1)[:, :count]
