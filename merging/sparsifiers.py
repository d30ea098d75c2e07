"""Sparsifiers that look at the rows of a task vector: entries along the last axis of a parameter."""

import torch
from torch import Tensor

from merging.ops import PIECE


class ByRow:
    """A sparsifier of whole rows, which sees `height` of them at a time; a single number passes as it is."""

    def rows(self, key: str, task: str, first: int, tau: Tensor) -> Tensor:
        """What becomes of rows [k, n] of a task vector, the first of which is that number `first`; run in threads."""
        raise NotImplementedError

    def __call__(self, key: str, task: str, tau: Tensor) -> Tensor:
        if not tau.numel() or not tau.ndim:
            return tau
        step = height(tau.shape[-1])
        chunks = tau.reshape(-1, tau.shape[-1]).split(step)
        return torch.cat([self.rows(key, task, i * step, chunk) for i, chunk in enumerate(chunks)]).view(tau.shape)


def height(width: int) -> int:
    """How many rows of `width` entries are seen at a time."""
    return max(1, PIECE // max(1, width))
