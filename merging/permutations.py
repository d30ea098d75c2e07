"""Orders of hidden units in which two models of one architecture agree, and a model with its units in another order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from merging.backbones.base import ParamInfo
from merging.calibration import Calibration
from merging.errors import UserError
from merging.experts import Experts
from merging.statistics import gram_sums, paired

READERS = ("attention_q", "attention_k", "attention_v", "attention_qkv", "ffn_in", "ffn_gate", "ffn_up", "projection")
WRITERS = ("attention_out", "ffn_out", "norm", "other")
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

    @torch.inference_mode()
    def features(self) -> Tensor:
        """What heads read of the second model on the first inputs."""
        return self.data.features(self.second, next(self.data.batches(0, self.samples)))


def axes(info: ParamInfo, shape: torch.Size, width: int) -> dict[str, int]:
    """Along which axes of a parameter, as it is stored, groups of units lie.

    The hidden neurons of its FFN's block, and STREAM: features of that width that all blocks read and add to.
    """
    matrix, found = len(shape) == 2 and info.kind not in ("embedding", "norm", "other"), {}
    if info.hidden_axis is not None and (matrix or info.hidden_axis == 0):
        found[str(info.block)] = info.stored_axis if matrix else 0
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
