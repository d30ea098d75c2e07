"""How the input-dependent part of a merge is stored: changes of one parameter, mixed by the weights of a gate.

Each holds the delta_t of W(x) = W_0 + shared + sum_t w_t(x) delta_t. The weights w are real: [G] shared by all samples,
[B, G] one row per sample, [B, N, G] one per token. A matrix W is [m, n] and acts as x W^T on x [B, N, n].
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from merging.deltas.base import Delta, Whole, identity, repeated
from merging.deltas.coded import Coded
from merging.deltas.dense import Dense, OnDemand, Sparse
from merging.deltas.grouped import Grouped
from merging.deltas.low_rank import LowRank
from merging.deltas.masked import Masked, Ternary
from merging.deltas.positions import Positions
from merging.deltas.rows import Rows
from merging.deltas.scattered import Scattered
from merging.deltas.tucker import Tucker

__all__ = [
    "Coded", "Delta", "Dense", "Grouped", "LowRank", "Masked", "OnDemand", "Positions", "Rows", "Scattered", "Sparse",
    "Ternary", "Tucker", "Whole", "below", "identity", "rebuild", "repeated",
]  # fmt: skip

KINDS = {
    kind.__name__: kind for kind in (Coded, Dense, LowRank, Masked, Positions, Scattered, Sparse, Ternary, Tucker)
}  # that a file holds
TOLD = {  # facts beside the shape that those take whose tensors do not say all
    "LowRank": ("parts", "ranks"), "Sparse": ("parts",), "Coded": ("bits", "group", "transposed"),
}  # fmt: skip


def rebuild(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Delta:
    """A delta from its `facts()` and its named buffers, as a file holds them."""
    if facts["kind"] == "Rows":
        name = "blocks" if "blocks" in facts else "banks"  # as formats 1 and 2 have it
        blocks = [rebuild(block, below(tensors, f"{name}.{i}.")) for i, block in enumerate(facts[name])]
        return Rows(blocks, facts.get("axis", 0))
    if facts["kind"] == "Grouped":
        return Grouped(rebuild(facts["members"], below(tensors, "members.")), facts["of"])
    extra = {name: facts[name] for name in TOLD.get(facts["kind"], ()) if name in facts}
    delta = KINDS[facts["kind"]](**tensors, **extra, shape=torch.Size(facts["shape"]))
    return delta.opened() if isinstance(delta, Sparse) else delta


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose name starts with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
