"""Switches of a single expert: a threshold, a scale and a choice of bits for every parameter, learned together."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from merging.calibration import Calibration
from merging.deltas.scattered import Form
from merging.experts import Experts
from merging.fit.folded import Folded

WIDTHS = (1, 2, 4, 8)  # bits of an entry that is kept, its sign included
START = 1.0  # by how much the width to start with is ahead of the others, in logits
LEAST = 1e-30
TINY = torch.finfo(torch.float32).tiny


def switchable(tau: Tensor) -> bool:
    """Whether task vectors [T, *shape] are switched: those of a single number, or of none, are kept as they are."""
    return tau.ndim > 1 and tau.numel() > 0


def start(change: Tensor, density: float, bits: int) -> Tensor:
    """What is free of a parameter, [2 + len(WIDTHS)]: threshold, scale, and a logit of every width.

    The threshold is in units of the root mean square of the change [*shape]; it starts where `density` of the entries
    are kept.
    """
    sizes = relative(change).flatten()
    kept = max(1, round(density * len(sizes)))
    threshold = sizes.kthvalue(len(sizes) - kept + 1).values
    logits = [START * (width == bits) for width in WIDTHS]
    return torch.tensor([float(threshold), 1.0, *logits])


def relative(change: Tensor) -> Tensor:
    """Magnitudes in units of their root mean square."""
    return change.abs() / change.square().mean().sqrt().clamp_min(LEAST)


def kept(change: Tensor, free: Tensor) -> Tensor:
    """Where entries of a change [*shape] reach the threshold, boolean."""
    return relative(change) >= free[0].clamp_min(TINY)  # what is zero is not kept


def width(free: Tensor) -> int:
    """The bits that are chosen."""
    return WIDTHS[int(free[2:].argmax())]


class Range(NamedTuple):
    """The magnitudes [*shape] of `count` entries that are kept: from low to low + span, of a norm.

    held: 1 of what is kept, else 0. places: where in the range it lies, 0 to 1; 0 of the rest.
    """

    held: Tensor
    places: Tensor
    low: Tensor
    span: Tensor
    count: Tensor
    norm: Tensor

    @classmethod
    def of(cls, sizes: Tensor, where: Tensor) -> "Range":
        held = where.to(sizes.dtype)  # products of numbers with booleans are slow
        inside = sizes * held
        high = inside.max()
        span = (high * held - inside).max()
        places = (inside - (high - span)).div_(span.clamp_min(LEAST)).clamp_(min=0)
        return cls(held, places, high - span, span, where.count_nonzero(), torch.linalg.vector_norm(inside))

    def coded(self, bits: int) -> tuple[Tensor, Tensor]:
        """Codes [*shape], whole numbers, 0 of what is not kept; and levels [2], the value of code 0 and a step.

        The 2^(bits - 1) levels are the middles of equal parts of the range, times a number that gives what is kept its
        norm: one bit, which is the sign, is T-Switch's.
        """
        parts = 2 ** (bits - 1)
        codes, step = (self.places * parts).floor_().clamp_(max=parts - 1), self.span / parts
        low, flat = self.low + step / 2, codes.flatten()
        square = self.count * low.square() + 2 * low * step * flat.sum() + step.square() * (flat @ flat)
        return codes, torch.stack([low, step]) * (self.norm / square.sqrt().clamp_min(LEAST))


def switched(change: Tensor, free: Tensor) -> Tensor:
    """What the switches make of a change, [*shape]."""
    sizes = Range.of(change.abs(), kept(change, free))
    codes, levels = sizes.coded(width(free))
    return codes.mul_(levels[1]).add_(levels[0]).mul_(sizes.held).copysign_(change).mul_(free[1])


def slopes(change: Tensor, free: Tensor, gradient: Tensor, temperature: float, price: float) -> Tensor:
    """The gradient of what is free, by that of `switched`, plus that of `price` times the bits that are stored.

    It is that of gates sigmoid((magnitude - threshold) / temperature), whose value below the threshold is the least of
    the levels, and of a softmax over the widths, while both are taken as they are (straight through); levels and the
    size of groups stay.
    """
    sizes, along = Range.of(change.abs(), kept(change, free)), gradient * change.sign()
    values, count, pulls = [sizes.coded(bits) for bits in WIDTHS], int(sizes.count), (along * sizes.held).flatten()
    chosen, shares = int(free[2:].argmax()), free[2:].softmax(0)
    inner = torch.stack([levels[0] * pulls.sum() + levels[1] * (pulls @ codes.flatten()) for codes, levels in values])
    by_width = free[1] * inner + price * count * torch.tensor(WIDTHS).to(inner)
    codes, levels = values[chosen]
    by_gate = codes.mul_(levels[1]).add_(levels[0]).mul_(along).mul_(free[1])
    by_gate += price * (Form.cheapest(change.numel(), count, WIDTHS[chosen]).places + WIDTHS[chosen])
    soft = relative(change).sub_(free[0]).div_(temperature).sigmoid_()
    threshold = -by_gate.flatten() @ (soft - soft.square()).flatten() / temperature
    return torch.cat([threshold[None], inner[chosen, None], shares * (by_width - shares @ by_width)])


class Switches(Folded):
    """Learnable (merging.fit): W_0 + the switched changes of a single expert; tied names share the switches.

    With the gradient of the loss goes that of `penalty` times the bits in which the change is stored, per entry.
    """

    def __init__(
        self, alone: Experts, data: Calibration, density: float, bits: int, temperature: float, penalty: float
    ):
        super().__init__(alone, data, alone.stream)
        begun: dict[str, Tensor] = {}
        self.moved, entries = set[str](), 0  # parameters whose change is not all zeros: the others stay
        for key, tau in alone.stream():
            if switchable(tau) and self.first(key) not in begun:
                begun[self.first(key)] = start(tau[0], density, bits)
                entries += tau.numel()
                if tau.any():
                    self.moved.add(self.first(key))
        self.row = {key: index for index, key in enumerate(begun)}
        self.free = torch.stack([*begun.values()]).to(data.device).requires_grad_()
        self.temperature, self.price = temperature, penalty / entries
        self._gradient = torch.zeros_like(self.free)

    def parameters(self) -> list[Tensor]:
        return [self.free]

    @torch.no_grad()
    def fold(self) -> None:
        self.free[:, 0].clamp_(min=0)
        super().fold()

    def change(self, key: str, tau: Tensor) -> Tensor:
        first = self.first(key)
        return switched(tau[0], self.free[self.row[first]]) if first in self.moved else tau[0]

    def pull(self, key: str, tau: Tensor, gradient: Tensor) -> None:
        if (first := self.first(key)) in self.moved:
            row = self.row[first]
            slope = slopes(tau[0], self.free.detach()[row], gradient, self.temperature, self.price)
            self._gradient[row] += slope

    def after(self) -> None:
        self._gradient = torch.zeros_like(self.free)
        super().after()
        self.free.grad = self._gradient

    def learned(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """What was free of each of these parameters that are switched, on the CPU."""
        free = self.free.detach().cpu()
        free[:, 0].clamp_(min=0)
        return {key: free[self.row[self.first(key)]] for key in keys if self.first(key) in self.row}
