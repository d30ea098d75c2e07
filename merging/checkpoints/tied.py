"""Tied weights: several names for one tensor, such as an embedding and the output layer that shares it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from merging.checkpoints import Checkpoint, raw_bytes
from merging.errors import UserError
from merging.ops import BLOCK

if TYPE_CHECKING:
    from merging.experts import Experts


def tied(checkpoints: Sequence[Checkpoint]) -> dict[str, str]:
    """Name -> the first, in sorted order, of the names under which every checkpoint holds the same numbers.

    Files store a tied weight once or several times, and copying a state dict parts it: so content decides, and only
    where all agree. A name that is alone is not listed. Every tensor of the first checkpoint is asked for once, and
    again only where two begin alike.
    """
    firsts: dict[object, list[str]] = {}
    same: dict[str, str] = {}
    for key, spec in sorted(checkpoints[0].specs().items()):
        begin = bytes(raw_bytes(checkpoints[0].flat(key)[:64]))  # some are put together when asked for
        others = firsts.setdefault((spec.shape, spec.dtype, begin), [])
        first = next((name for name in others if all(_same(checkpoint, name, key) for checkpoint in checkpoints)), None)
        if first is None:
            others.append(key)
        else:
            same[key] = first
    return same


def _same(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two parameters of one shape hold the same numbers."""
    first, second = checkpoint.flat(one), checkpoint.flat(other)
    if isinstance(first, Tensor) and isinstance(second, Tensor) and first.data_ptr() == second.data_ptr():
        return True
    starts = range(0, checkpoint.specs()[one].shape.numel(), BLOCK)
    pieces = (slice(0, 64), *(slice(start, start + BLOCK) for start in starts))
    return all(torch.equal(first[piece], second[piece]) for piece in pieces)


def behind(experts: "Experts", key: str) -> bool:
    """Whether a parameter lies behind the blocks, and is not the tensor of another before them."""
    info = experts.param(key)
    if not info.after or info.tied is None or info.tied not in experts.origin.specs():
        return info.after
    return experts.tied.get(key, key) != experts.tied.get(info.tied, info.tied)


def filled(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """A state dict for a module with tied weights: a name that it lacks has the tensor of another name for it.

    Raises UserError where the state holds different numbers for names that the module ties.
    """
    whole, names = dict(state), {}
    for key, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault((tensor.data_ptr(), tensor.shape) if tensor.numel() else key, []).append(key)
    for group in names.values():
        have = [key for key in group if key in state]
        for key in have[1:]:
            if not torch.equal(state[have[0]], state[key]):
                raise UserError(f"{have[0]} and {key} are one tensor in the module and differ in the file")
        whole |= {key: state[have[0]] for key in group if have and key not in state}
    return whole
