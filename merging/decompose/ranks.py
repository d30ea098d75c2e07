"""How large the ranks of a Tucker decomposition should be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

import numpy as np
from torch import Tensor

from merging.decompose.tucker import Triple, Tucker, check, spectrum, stored
from merging.errors import UserError
from merging.preflight import check_range


@dataclass(frozen=True)
class Ranks:
    """How ranks are chosen; `resolve` gives them. Modes and what `value` means:

    absolute: the ranks themselves; fraction: of min(m, n); energy: the smallest ranks whose unfoldings lose at most
    that share of the energy; budget: numbers stored, spent on the direction with the most energy per number among
    those that fit; match_svd: the largest r_o = r_i that stores no more than T singular value decompositions of that
    rank. `in_value` is the value of the in side if it differs (first three modes). `task` is "full", a rank or, as a
    float, the share of energy the task mode may lose. All but absolute ranks are clipped to the full ones.
    """

    mode: Literal["absolute", "fraction", "energy", "budget", "match_svd"] = "absolute"
    value: float = 160
    in_value: float | None = None
    task: int | float | Literal["full"] = "full"

    def __post_init__(self) -> None:
        """Raises UserError for what makes no sense whatever is decomposed."""
        if self.mode not in get_args(modes := get_type_hints(Ranks)["mode"]):
            raise UserError(f"ranks: mode={self.mode!r} is unknown. Choose one of {', '.join(get_args(modes))}.")
        if self.in_value is not None and self.mode in ("budget", "match_svd"):
            raise UserError(f"ranks: mode={self.mode} takes one value for both sides. Leave in_value out.")
        for name in ("value", "in_value", "task"):
            size = getattr(self, name)
            if size in (None, "full"):
                continue
            if isinstance(size, float) if name == "task" else self.mode in ("fraction", "energy"):
                check_range(f"ranks: {name}", size, 0.0, 1.0)
            elif size < 1 or size != int(size):
                raise UserError(f"ranks: {name}={size} is out of range: it must be a whole number from 1.")

    def resolve(self, source: Tensor | Tucker) -> Triple:
        """(r_t, r_o, r_i) for a stack [T, m, n], or for one known by a decomposition that loses nothing of it.

        Energy and budget need all eigenvalues of Gram matrices: seconds for a stack with a side of thousands.
        Raises UserError for ranks above the full ones and budgets below ranks of one.
        """
        tensor, (tasks, m, n) = (source.core, source.shape) if isinstance(source, Tucker) else (source, source.shape)
        limits, pair = check(source), (self.value, self.value if self.in_value is None else self.in_value)
        if isinstance(self.task, float):
            first = max(1, _energy_rank(tensor, 0, self.task))
        else:
            first = limits[0] if self.task == "full" else self.task
        check(source, (first, *(pair if self.mode == "absolute" else (1, 1))))
        if self.mode in ("absolute", "fraction"):
            ranks = [round(value * (min(m, n) if self.mode == "fraction" else 1)) for value in pair]
        elif self.mode == "energy":
            ranks = [_energy_rank(tensor, mode, value) for mode, value in enumerate(pair, 1)]
        else:
            ranks = self._afford((tasks, m, n), first, tensor)
        out, in_ = (max(1, min(rank, limit)) for rank, limit in zip(ranks, limits[1:], strict=True))
        return first, out, in_

    def _afford(self, shape: Triple, first: int, tensor: Tensor) -> list[int]:
        tasks, sides, least = shape[0], shape[1] + shape[2], stored(shape, (first, 1, 1))
        budget = int(self.value if self.mode == "budget" else tasks * self.value * (sides + 1))
        if budget < least:
            raise UserError(f"A budget of {budget} numbers is below the {least} that ranks ({first}, 1, 1) store.")
        if self.mode == "budget":
            return _spend(budget - least, shape, first, [np.append(spectrum(tensor, mode), 0) for mode in (1, 2)])
        root = math.isqrt(sides**2 + 4 * first * (budget - tasks * first))
        return [(root - sides) // (2 * first)] * 2


def _energy_rank(tensor: Tensor, mode: int, lost: float) -> int:
    """The smallest rank of an unfolding that loses at most that share of the energy."""
    energies = spectrum(tensor, mode)
    return int((energies[::-1].cumsum()[::-1] > lost * energies.sum()).sum())


def _spend(budget: int, shape: Triple, first: int, gains: Sequence[np.ndarray]) -> list[int]:
    """Ranks of the out and in sides by greedy choice; a direction without energy is never worth its numbers."""
    ranks = [1, 1]
    while True:
        costs = [shape[1] + first * ranks[1], shape[2] + first * ranks[0]]
        worth = [gains[side][ranks[side]] / costs[side] * (costs[side] <= budget) for side in (0, 1)]
        if not any(worth):
            return ranks
        best = int(worth[1] > worth[0])
        budget -= costs[best]
        ranks[best] += 1
