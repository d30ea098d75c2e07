"""Orders of hidden units in which two models of one architecture agree, and a model with its units in another order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from merging.applied import as_applied
from merging.backbones.base import ParamInfo
from merging.calibration import Calibration
from merging.errors import UserError
from merging.experts import Experts
from merging.statistics import gram_sums, paired

READERS = ("attention_q", "attention_k", "attention_v", "attention_qkv", "ffn_in", "ffn_gate", "ffn_up", "projection")
WRITERS = ("attention_out", "ffn_out", "norm", "other")
Affine = tuple[Tensor, Tensor]  # a matrix [out, in] and a bias [out], fp64
GROUPS = {"attention_q": "q", "attention_k": "q", "attention_v": "v", "attention_out": "v", "attention_qkv": "qkv"}
STREAM = ""  # the group of the features that run through all blocks; others are named after their block


def matched(likeness: Tensor, what: str) -> Tensor:
    """Which unit of the second model each of the first is matched with [n], so that their likeness [n, n] is greatest.

    Raises UserError for models of different widths.
    """
    from scipy.optimize import linear_sum_assignment

    if likeness.shape[0] != likeness.shape[1]:
        raise UserError(
            f"{what} has {likeness.shape[0]} units in one model and {likeness.shape[1]} in the other: a permutation is "
            f"between models of one width. Merge experts of one architecture."
        )
    return torch.from_numpy(linear_sum_assignment(likeness.cpu().numpy(), maximize=True)[1])


def matched_heads(values: Tensor, queries: Tensor, heads: int, what: str) -> tuple[Tensor, Tensor]:
    """As `matched`, of attention: heads as a whole, and in each the units of values, and those of queries with keys.

    values, queries: likeness [n, n] of units, head by head.
    """
    inner, size = {}, len(values) // heads
    totals = torch.zeros(heads, heads).double()
    for one, two in product(range(heads), repeat=2):
        here, there = (slice(head * size, (head + 1) * size) for head in (one, two))
        tiles = [likeness[here, there] for likeness in (values, queries)]
        inner[one, two] = [matched(tile, what) for tile in tiles]
        totals[one, two] = sum(t.gather(1, o[:, None]).sum() for t, o in zip(tiles, inner[one, two], strict=True))
    pairs = list(enumerate(matched(totals, what).tolist()))
    first, second = (torch.cat([inner[pair][part] + pair[1] * size for pair in pairs]) for part in (0, 1))
    return first, second


class Moments(NamedTuple):
    """Means over rows of what goes into a layer of two models on the same inputs, x [n] and y [m]; fp64."""

    xx: Tensor  # x x^T [n, n]
    yy: Tensor  # y y^T [m, m]
    yx: Tensor  # y x^T [m, n]
    x: Tensor
    y: Tensor

    def likeness(self) -> Tensor:
        """Minus the distances between units of both over all rows, [n, m]."""
        squares = self.xx.diagonal()[:, None] + self.yy.diagonal() - 2 * self.yx.T
        return -squares.clamp_min(0).sqrt()

    def centred(self) -> "Moments":
        """Of what is left of x and y without their means."""
        x, y = self.x, self.y
        return Moments(self.xx - torch.outer(x, x), self.yy - torch.outer(y, y), self.yx - torch.outer(y, x), x, y)

    def behind(self, one: Affine, two: Affine) -> "Moments":
        """Of what a layer of each model makes of x and y."""
        (a, s), (b, t) = one, two
        x, y, rest = a @ self.x + s, b @ self.y + t, self.centred()
        xx, yy, yx = a @ rest.xx @ a.T, b @ rest.yy @ b.T, b @ rest.yx @ a.T
        return Moments(xx + torch.outer(x, x), yy + torch.outer(y, y), yx + torch.outer(y, x), x, y)


@dataclass(frozen=True)
class Couple:
    """Two experts of two tasks, as modules that see the inputs of both."""

    data: Calibration
    samples: int  # per task
    first: nn.Module
    second: nn.Module

    def moments(self, keys: Sequence[str]) -> dict[str, Moments]:
        """What goes into these layers."""
        every = lambda: chain(*(self.data.batches(task, self.samples) for task in (0, 1)))  # noqa: E731
        pairs = paired(self.first, self.second, keys, every()).every
        squares, rows = gram_sums(self.second, keys, every())
        found = {}
        for key, pair in pairs.items():
            pair, square = pair.means(), squares[key] / rows[key]
            found[key] = Moments(pair.gram, square, pair.drift + pair.gram, pair.mean, pair.mean + pair.shift)
        return found

    def heads(self, block: str) -> int | None:
        """How many a block's attention has; None where no module says it."""
        parts, names = self.first.get_submodule(block).modules(), ("num_heads", "num_attention_heads")
        counts = {getattr(part, name) for part in parts for name in names if hasattr(part, name)}
        return counts.pop() if len(counts) == 1 else None

    @torch.inference_mode()
    def features(self) -> Tensor:
        """What heads read of the second model on the first inputs."""
        return self.data.features(self.second, next(self.data.batches(0, self.samples)))


def orders_of_heads(
    experts: Experts, couple: Couple, measured: Mapping[str, Moments], models: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The order of the second model's attention in a block, by group.

    None where no module says how many heads there are, and where there are fewer keys than queries.
    """
    kinds = {experts.param(key).kind: key for key in measured}
    into = kinds.get("attention_qkv", kinds.get("attention_q"))
    if into is None or "attention_out" not in kinds:
        return {}
    block, values = str(experts.param(into).block), measured[kinds["attention_out"]].likeness()
    if (heads := couple.heads(block)) is None:
        return {}
    sides = [[_asked(experts, weights, into, part) for weights in models] for part in range(2)]
    if {len(bias) for side in sides for _, bias in side} != {len(values)}:
        return {}
    one, two = (measured[into].behind(*side).likeness() for side in sides)
    v, q = matched_heads(values, one + two, heads, f"The attention of {block}")
    return {f"{block} v": v, f"{block} q": q, f"{block} qkv": torch.cat([q, len(q) + q, 2 * len(q) + v])}


def _asked(experts: Experts, weights: Mapping[str, Tensor], into: str, part: int) -> Affine:
    """How a block makes its queries (part 0) or its keys (1); a bias of zeros where there is none."""
    info = experts.param(into)
    same = (key for key in weights if experts.param(key).block == info.block and weights[key].ndim == 2)
    key = (
        next(key for key in same if experts.param(key).kind == "attention_k")
        if part and info.kind == "attention_q"
        else into
    )
    matrix, bias = as_applied(experts, key, weights[key]).double(), weights.get(key.removesuffix("weight") + "bias")
    bias = torch.zeros(len(matrix)).double() if bias is None else bias.double()
    return (matrix, bias) if info.kind == "attention_q" else (matrix.chunk(3)[part], bias.chunk(3)[part])


def axes(info: ParamInfo, shape: torch.Size, width: int) -> dict[str, int]:
    """Along which axes of a parameter, as it is stored, groups of units lie.

    The hidden neurons of its FFN's block; the outputs of its block's values, " v", which its last layer reads, of
    queries and keys, " q", or of all three, " qkv"; STREAM: features of that width that all blocks read and add to.
    """
    matrix, found = len(shape) == 2 and info.kind not in ("embedding", "norm", "other"), {}
    if info.hidden_axis is not None and (matrix or info.hidden_axis == 0):
        found[str(info.block)] = info.stored_axis if matrix else 0
    if info.family == "attention" and (matrix or info.kind != "attention_out"):
        inside = info.kind == "attention_out"
        found[f"{info.block} {GROUPS[info.kind]}"] = int(inside != info.transposed) if matrix else 0
    axis = None
    if info.kind == "embedding":
        axis = 0 if len(shape) == 4 else len(shape) - 1
    elif info.kind in WRITERS or (matrix and info.kind in READERS):
        into = matrix and info.kind in READERS
        axis = (1 - into if info.transposed else int(into)) if matrix else 0
    if axis is not None and len(shape) > axis and shape[axis] == width:
        found[STREAM] = axis
    return {group: axis for group, axis in found.items() if axis is not None}


def turned(
    experts: Experts, weights: Mapping[str, Tensor], orders: Mapping[str, Tensor], width: int
) -> dict[str, Tensor]:
    """A model that computes the same with its units in these orders, by group."""
    result = {}
    for key, weight in weights.items():
        for group, axis in axes(experts.param(key), weight.shape, width).items():
            weight = weight.index_select(axis, orders[group]) if group in orders else weight
        result[key] = weight
    return result
