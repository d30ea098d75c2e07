"""What is taken off a task's features between the encoder and its head."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from merging.ops import generator


class Correction(nn.Module):
    """z - up relu(down z) of features z [..., D]: down [r, D], up [D, r]."""

    def __init__(self, down: Tensor, up: Tensor):
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    @classmethod
    def untrained(cls, width: int, rank: int, *seed: object) -> "Correction":
        """One that leaves features as they are: down as layers begin, uniform within 1 / sqrt(D), up of zeros."""
        drawn = torch.rand(rank, width, generator=generator("correction", *seed))
        return cls((2 * drawn - 1) / math.sqrt(width), torch.zeros(width, rank))

    def forward(self, features: Tensor) -> Tensor:
        return features - (features @ self.down.T).relu() @ self.up.T

    @property
    def params(self) -> int:
        """Stored numbers."""
        return self.down.numel() + self.up.numel()

    @property
    def bytes(self) -> int:
        """Bytes that a file needs for them."""
        return self.down.nbytes + self.up.nbytes

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        return self.params


Corrections = Mapping[str, Correction]  # by task


def corrections_from(tensors: Mapping[str, Tensor]) -> dict[str, Correction]:
    """From the tensors `task/down` and `task/up` of a file."""
    tasks = [name.removesuffix("/down") for name in tensors if name.endswith("/down")]
    return {task: Correction(tensors[f"{task}/down"], tensors[f"{task}/up"]).requires_grad_(False) for task in tasks}
