"""Coefficients as functions of a preference among the tasks, learned for all preferences at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from merging.fit.coefficients import Coefficients
from merging.ops import generator

SPREAD = 0.01  # of weights at the start, the authors'


@dataclass(frozen=True)
class Nets:
    """`count` nets from preferences [T] to coefficients [T]: linear, or with a hidden layer of 2 T units (depth 2).

    Their numbers are free [count, n]. Names of tasks, not their order, decide what is drawn.
    """

    tasks: Sequence[str]
    count: int
    depth: int

    @cached_property
    def ranks(self) -> Tensor:
        """Of every task its place by name."""
        names = sorted(self.tasks)
        return torch.tensor([names.index(task) for task in self.tasks])

    def start(self, init: float, seed: int) -> Tensor:
        """Free numbers of nets that are all but constant, at `init`."""
        size, width = len(self.tasks), len(self.tasks) * self.depth
        drawn = torch.randn(self.count, 2, width, width, generator=generator("preferences", seed)) * SPREAD
        last = torch.cat([drawn[:, 0, :size][:, self.ranks], torch.full((self.count, size, 1), init)], 2)
        if self.depth == 1:
            last[:, :, :size] = last[:, :, :size][:, :, self.ranks]
            return last.flatten(1)
        hidden = torch.cat([drawn[:, 1, :, :size][:, :, self.ranks], torch.zeros(self.count, width, 1)], 2)
        return torch.cat([hidden.flatten(1), last.flatten(1)], 1)

    def __call__(self, free: Tensor, preference: Tensor) -> Tensor:
        """Coefficients [T, count]."""
        size, values = len(self.tasks), preference.expand(len(free), -1)
        if self.depth == 2:
            first = 2 * size * (size + 1)
            hidden, free = free[:, :first].view(len(free), 2 * size, size + 1), free[:, first:]
            values = ((hidden[:, :, :-1] @ values[:, :, None])[..., 0] + hidden[:, :, -1]).relu()
        last = free.view(len(free), size, self.depth * size + 1)
        return ((last[:, :, :-1] @ values[:, :, None])[..., 0] + last[:, :, -1]).T


class Preferred(Coefficients):
    """Learnable (merging.fit): Coefficients made by nets from a preference that is drawn anew for every step.

    fixed: the coefficient of what no net decides, the first column. `learned` are the nets' numbers.
    """

    def __init__(self, *of_experts: Any, nets: Nets, fixed: float, seed: int):
        self.nets, self.fixed, self.seed, self.shares = nets, fixed, seed, equal(nets.tasks)
        super().__init__(*of_experts)

    @property
    def values(self) -> Tensor:
        return at(self.nets, self.free, self.fixed, self.shares)

    @property
    def learned(self) -> Tensor:
        return self.free.detach().cpu()

    def before(self, step: int) -> None:
        """Uniform on the simplex, as Dirichlet(1)."""
        drawn = -torch.rand(len(self.tasks), generator=generator("ray", self.seed, step)).clamp_min(1e-30).log()
        self.shares = (drawn / drawn.sum())[self.nets.ranks].to(self.data.device)


def equal(tasks: Sequence[str]) -> Tensor:
    """No task before another."""
    return torch.full((len(tasks),), 1 / len(tasks))


def at(nets: Nets, free: Tensor, fixed: float, preference: Tensor) -> Tensor:
    """Coefficients [T, 1 + count] at a preference."""
    fixed_column = torch.full((len(preference), 1), fixed, device=free.device)
    return torch.cat([fixed_column, nets(free, preference.to(free.device))], 1)
