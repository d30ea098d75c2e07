"""What a delta leaves of the changes that it stands for."""

from collections.abc import Iterator

import torch
from torch import Tensor

from merging.deltas import Delta


def residuals(changes: Tensor, delta: Delta) -> Iterator[Tensor]:
    """changes_t - delta_t for changes [T, *shape], one at a time, delta_t exactly as it is used: in its dtype."""
    chosen = torch.eye(len(changes))
    for task, change in enumerate(changes):
        yield change - delta.mix(chosen[task])


def energy_kept(changes: Tensor, delta: Delta) -> list[float]:
    """`share_kept` of every change [T, *shape] by a delta."""
    return [share_kept(*pair) for pair in zip(changes, residuals(changes, delta), strict=True)]


def share_kept(change: Tensor, left: Tensor) -> float:
    """1 - ||left||^2 / ||change||^2; 1 for a change of zero."""
    total = float(change.square().sum())
    return 1 - float(left.square().sum()) / total if total > 0 else 1.0
