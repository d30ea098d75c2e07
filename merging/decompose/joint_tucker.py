"""One Tucker decomposition for several FFN matrices, which then share the factors of their hidden and outer sides."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from merging.decompose.tucker import Tucker as Factors
from merging.deltas import Tucker
from merging.errors import UserError
from merging.experts import Experts
from merging.preflight import some
from merging.threads import each

UNITS = ("matrix", "block", "model")
Decompose = Callable[[str, Tensor], Factors]  # (name, stack [G, f, d]) -> its factors


def joint_deltas(experts: Experts, keys: Sequence[str], unit: str, decompose: Decompose) -> dict[str, Tucker]:
    """Deltas of the FFN matrices among `keys`, those of a "block" or of the whole "model" decomposed together.

    Matrices are transposed where it takes that to have all as [hidden, outer]; T task matrices each make one stack
    [matrices T, hidden, outer]. Its task factor is cut apart again. A whole model is in memory at once.
    """
    groups: dict[str | None, list[str]] = {}
    for key in keys:
        shape = experts.specs()[key].shape
        if len(shape) == 2 and shape.numel() and experts.param(key).hidden_axis is not None:
            groups.setdefault(experts.param(key).block if unit == "block" else None, []).append(key)

    def one(group: Sequence[str]) -> dict[str, Tucker]:
        stacks = [upright(experts, key, experts.tau(key)) for key in group]
        if len(shapes := {tuple(stack.shape[1:]) for stack in stacks}) > 1:
            raise UserError(
                f"unit={unit} decomposes {some(group)} together, and they are not of one shape: "
                f"{', '.join(map(str, sorted(shapes)))}. Set unit=matrix."
            )
        stack = torch.cat(stacks)
        found = decompose(" ".join(group), stack)
        parts = [own(found, index, len(experts.tasks)) for index in range(len(group))]
        return {
            key: delta if experts.param(key).stored_axis == 0 else delta.transposed()
            for key, delta in zip(group, parts, strict=True)
        }

    return {key: delta for deltas in each(one, list(groups.values())) for key, delta in deltas.items()}


def upright(experts: Experts, key: str, tau: Tensor) -> Tensor:
    """Task matrices [T, m, n] with the hidden side first."""
    return tau if experts.param(key).stored_axis == 0 else tau.mT


def own(found: Factors, index: int, tasks: int) -> Tucker:
    """The delta of the matrix at that place of the stack; of a full task factor only its own slices of the core."""
    rows = slice(index * tasks, (index + 1) * tasks)
    if len(found.core) == len(found.task):  # the identity
        return Tucker(found.core[rows].clone(), torch.eye(tasks), found.out, found.in_)
    return Tucker(found.core, found.task[rows].clone(), found.out, found.in_)
