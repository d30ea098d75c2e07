"""One Tucker decomposition for several FFN matrices, which then share the factors of their hidden and outer sides."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from merging.decompose.compressed import Compressed
from merging.decompose.tucker import Tucker as Factors
from merging.deltas import LowRank, Tucker
from merging.errors import UserError
from merging.experts import Experts
from merging.preflight import some
from merging.threads import each

Decompose = Callable[[str, Tensor, Factors | None], Factors]  # (name, stack, the exact factors it stands for, if any)


class Joint(NamedTuple):
    """The change of one matrix; of adapters also that of their cores, and these with their bases."""

    delta: Tucker
    small: Tucker
    compressed: Compressed | None

    def transposed(self) -> "Joint":
        compressed = None if self.compressed is None else self.compressed.transposed()
        return Joint(self.delta.transposed(), self.small.transposed(), compressed)


def joint_deltas(experts: Experts, keys: Sequence[str], unit: str, decompose: Decompose) -> dict[str, Joint]:
    """Deltas of the FFN matrices among `keys`, those of a "block" or of the whole "model" decomposed together.

    Matrices are transposed where it takes that to have all as [hidden, outer]; T task matrices each make one stack
    [matrices T, hidden, outer]. Its task factor is cut apart again. A whole model is in memory at once.
    """
    groups: dict[str | None, list[str]] = {}
    for key in keys:
        shape = experts.specs()[key].shape
        if len(shape) == 2 and shape.numel() and experts.param(key).hidden_axis is not None:
            groups.setdefault(experts.param(key).block if unit == "block" else None, []).append(key)

    def one(group: Sequence[str]) -> dict[str, Joint]:
        upright = [experts.param(key).stored_axis == 0 for key in group]
        shapes = {
            experts.specs()[key].shape[:: 1 if stands else -1] for key, stands in zip(group, upright, strict=True)
        }
        if len(shapes) > 1:
            raise UserError(
                f"unit={unit} decomposes {some(group)} together, and they are not of one shape: "
                f"{', '.join(str(tuple(shape)) for shape in sorted(shapes))}. Set unit=matrix."
            )
        known = factors_of(experts, group, upright)
        taus = [] if known else [experts.tau(key) for key in group]
        stack = (
            known.core if known else torch.cat([tau if up else tau.mT for tau, up in zip(taus, upright, strict=True)])
        )
        small = decompose(" ".join(group), stack, known.exact() if known else None)
        whole = small._replace(out=known.out @ small.out, in_=known.into @ small.in_) if known else small
        joint = {}
        for index, (key, stands) in enumerate(zip(group, upright, strict=True)):
            rows = slice(index * len(experts.tasks), (index + 1) * len(experts.tasks))
            part = Joint(sliced(whole, rows), sliced(small, rows), known and known._replace(core=known.core[rows]))
            joint[key] = part if stands else part.transposed()
        return joint

    return {key: joint for joints in each(one, list(groups.values())) for key, joint in joints.items()}


def factors_of(experts: Experts, keys: Sequence[str], upright: Sequence[bool]) -> Compressed | None:
    """All task matrices of several parameters, of adapters by their factors, transposed where they do not stand."""
    deltas = [delta for key in keys if (delta := experts.low_rank(key)) is not None]
    if len(deltas) < len(keys) or not any(delta.rank for delta in deltas):
        return None
    deltas = [delta if stands else delta.transposed() for delta, stands in zip(deltas, upright, strict=True)]
    pairs = [delta.factors(task) for delta in deltas for task in range(delta.parts)]
    return Compressed.of(LowRank.of([up for up, _ in pairs], [down for _, down in pairs]))


def sliced(stack: Factors, rows: slice) -> Tucker:
    """The delta of the matrix at these rows of the stack; of a full task factor only its slices of the core."""
    if len(stack.core) == len(stack.task):  # the identity
        core = stack.core[rows]
        return Tucker(core.clone(), torch.eye(len(core)), stack.out, stack.in_)
    return Tucker(stack.core, stack.task[rows].clone(), stack.out, stack.in_)
