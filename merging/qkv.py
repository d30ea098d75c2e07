"""Query, key and value: which parameters hold the three fused, and everything that cuts or joins them.

Methods may see three parameters where a checkpoint has one; what a merge results in is fused either way.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, overload

import torch
from torch import Tensor

from merging.checkpoints import Change, Checkpoint
from merging.checkpoints.views import Piece, View, join_pieces, pieces_of
from merging.deltas import Delta, Dense, LowRank, Masked, OnDemand, Rows
from merging.errors import UserError
from merging.merged import Merged
from merging.ops import BLOCK
from merging.preflight import some

LETTERS = "qkv"  # the order in which they are stacked
FUSED = (  # the fused name, those of the three, and the axis of a matrix along which they lie
    ("{start}attn.in_proj_{w}", "{start}attn.{p}_proj_{w}", 0),  # torch, open_clip
    ("{start}attn.c_attn.{w}", "{start}attn.c_attn.{p}.{w}", 1),  # GPT-2, whose matrices are [in, out]
)
WILD = {"start": r"(?:.*\.)?", "i": r"\d+", "w": "weight|bias", "p": "[qkv]"}


@cache
def pattern(template: str) -> re.Pattern[str]:
    """What matches the names of a template: {start} whatever comes before, {i} an index, {p} one of q, k and v."""
    literal, *rest = re.split(r"\{(\w+)\}", template)
    wild = (f"(?P<{name}>{WILD[name]}){re.escape(text)}" for name, text in zip(rest[::2], rest[1::2], strict=True))
    return re.compile(re.escape(literal) + "".join(wild))


def translated(name: str, template: str, other: str, **more: str) -> str | None:
    """A name of one template by another, with its further wild cards in `more`; None for what is not of the first."""
    match = pattern(template).fullmatch(name)
    return other.format(**match.groupdict(), **more) if match else None


def separate_names(key: str) -> tuple[str, ...]:
    """The three names of a fused parameter in the order q, k, v; none for any other."""
    names = (translated(key, fused, apart, p=letter) for fused, apart, _ in FUSED for letter in LETTERS)
    return tuple(name for name in names if name)


def fused_name(key: str) -> str:
    """The name of the fused parameter that a separate one belongs to, any other name unchanged."""
    return next((name for fused, apart, _ in FUSED if (name := translated(key, apart, fused))), key)


def fused_axis(key: str) -> int | None:
    """The axis along which a fused parameter holds the three, None for any other; a vector has one axis."""
    axis = next((axis for fused, _, axis in FUSED if pattern(fused).fullmatch(key)), None)
    return 0 if key.endswith("bias") and axis is not None else axis


@overload
def cut(key: str, stack: LowRank) -> tuple[list[LowRank], int] | None: ...
@overload
def cut(key: str, stack: Tensor) -> tuple[list[Tensor], int] | None: ...
def cut(key: str, stack: Tensor | LowRank) -> tuple[list[Any], int] | None:
    """The three blocks of fused matrices [T, m, n], or of their factors, and their axis; None for any others."""
    axis = fused_axis(key)
    if axis is None or tuple(stack.shape)[-2:][axis] % 3:
        return None
    if isinstance(stack, Tensor):
        return list(stack.chunk(3, 1 + axis)), axis
    changes = [Change(*stack.factors(task)).chunk(3, axis) for task in range(stack.parts)]
    blocks = (
        [[change.up for change in block], [change.down for change in block]] for block in zip(*changes, strict=True)
    )
    return [LowRank.of(ups, downs) for ups, downs in blocks], axis


def separated(checkpoint: Checkpoint) -> View:
    """Every fused parameter as three."""
    pieces: dict[str, Piece] = {}
    for key, piece in pieces_of(checkpoint).items():
        names, axis = separate_names(key), fused_axis(key) or 0
        pieces |= {name: piece.third(i, axis) for i, name in enumerate(names)} or {key: piece}
    return View(pieces, checkpoint)


def fused(checkpoint: Checkpoint, stored: Callable[[str], str | None] = str) -> View:
    """Every three separate parameters as one, the inverse.

    stored: what a name is called in the file. Raises UserError where one of three is missing.
    """
    pieces, apart = {}, pieces_of(checkpoint)
    for key, piece in apart.items():
        name = fused_name(key)
        names = separate_names(name) if name != key else ()
        if missing := [other for other in names if other not in apart]:
            lacking = some([str(stored(other)) for other in missing])
            raise UserError(f"{checkpoint.name} has {stored(key)}, but lacks {lacking}. The file is incomplete.")
        if name not in pieces:
            pieces[name] = join_pieces([apart[other] for other in names], fused_axis(name) or 0) if names else piece
    return View(pieces, checkpoint)


@dataclass(frozen=True)
class Joined(Merged):
    """A merge of fused parameters whose `shared` and `fixed` changes are still under the separate names.

    They are joined one parameter at a time, when asked for; a method that works on the result of another one finds in
    them the names that it sees itself. `specs` and `deltas` have the fused names, `energy` the separate ones.
    """

    def pieces(self, key: str) -> tuple[Tensor, Tensor | None]:
        names, axis = separate_names(key), fused_axis(key) or 0
        if not names or key in self.packed:
            return super().pieces(key)
        still, moves = zip(*map(self._separated.pieces, names), strict=True)
        if all(move is None for move in moves):
            return torch.cat(still, axis), None
        filled = [torch.zeros_like(w) if move is None else move for w, move in zip(still, moves, strict=True)]
        return torch.cat(still, axis), torch.cat(filled, axis)

    def block(self, key: str, first: int) -> Tensor:
        weight = self.static(key).reshape(-1)[first : first + BLOCK]
        self.base.release()
        return weight.to(self.specs[key].dtype)

    @cached_property
    def _separated(self) -> Merged:
        return Merged(separated(self.base), self.tasks, {}, self.shared, fixed=self.fixed)


def join_deltas(deltas: Mapping[str, Delta]) -> dict[str, Delta]:
    """Deltas by fused names, each fused one in the place of the first of its three.

    Raises ValueError where a method routes some of query, key and value and not the others.
    """
    joined: dict[str, Delta] = {}
    for key, delta in deltas.items():
        fused = fused_name(key)
        names = separate_names(fused)
        if key not in names:
            joined[key] = delta
        elif missing := [name for name in names if name not in deltas]:
            raise ValueError(f"{key} has a delta and {missing[0]} has none: query, key and value are routed together")
        elif fused not in joined:
            joined[fused] = join([deltas[name] for name in names], fused_axis(fused) or 0)
    return joined


def join(deltas: list[Delta], axis: int = 0) -> Delta:
    """One delta of all blocks. Whole changes are joined in their own kind, factors are kept apart."""
    dense = [delta for delta in deltas if type(delta) is Dense]
    masked = [delta for delta in deltas if isinstance(delta, Masked)]
    on_demand = [delta for delta in deltas if isinstance(delta, OnDemand)]
    if len(dense) == len(deltas):
        return Dense(torch.cat([delta.changes.view(delta.parts, *delta.shape) for delta in dense], 1 + axis))
    if len(masked) == len(deltas) and all(torch.equal(delta.scales, masked[0].scales) for delta in masked):
        return join_masked(masked, axis)
    if len(on_demand) == len(deltas):
        shape, parts = Rows(deltas, axis).shape, deltas[0].parts
        return OnDemand(lambda part: torch.cat([delta.part(part) for delta in on_demand], axis), shape, parts)
    return Rows(deltas, axis)


def join_masked(deltas: list[Masked], axis: int) -> Masked:
    """Of the same scales, which stay the same tensor: all parameters of a model may share it."""
    vector = torch.cat([delta.vector.view(delta.shape) for delta in deltas], axis)
    masks = torch.stack([torch.cat([delta.mask(part) for delta in deltas], axis) for part in range(deltas[0].parts)])
    return Masked.of(vector, masks, deltas[0].scales)
