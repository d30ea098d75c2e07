"""How far a merged matrix interferes with its experts: a quadratic, lowered step by step, or solved in closed form.

L(x) = sum_t |(x - target_t) probe_t^T|^2 / size_t. With x = start + y its gradient is 2 (y C + E) where C = sum_t
probe_t^T probe_t / size_t and E = sum_t (start - target_t) probe_t^T probe_t / size_t: one product, whatever T.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from merging.applied import turned
from merging.context import ALONE, Context
from merging.decompose.svd import leading_vectors
from merging.experts import Experts
from merging.merged import Merged
from merging.options import Options

Matrices = Literal["linear", "all"]
Rest = Literal["base", "mean"]
ADAM = partial(torch.optim.Adam, fused=True)
PANEL = 256  # columns of a Gram matrix at a time, at least
FLOOR = 1e-8  # of an eigenvalue of C, whose trace is the number of tasks where the probes are the task vectors


class Quadratic(NamedTuple):
    """The loss around `start`, as a function of y [m, n]."""

    start: Tensor  # [m, n]
    gram: Tensor  # C [n, n]
    excess: Tensor  # E [m, n]; zero exactly where nothing interferes
    factor: Tensor | None = None  # F [r, n] where C = F^T F is of a rank that makes (y F^T) F cheaper than y C

    @classmethod
    def of(cls, start: Tensor, targets: Tensor, probes: Tensor, sizes: Tensor) -> "Quadratic":
        """From targets [T, m, n], probes [T, k, n] and the tasks' sizes [T]; a task of size 0 has no say."""
        scaled = probes / torch.where(sizes > 0, sizes, torch.inf).sqrt()[:, None, None]
        rows, side = scaled.flatten(0, 1), scaled.shape[2]
        tall, excess = scaled.shape[1] > side, torch.zeros_like(start)
        gram = start.new_zeros(side, side) if tall else gram_of(rows)
        for target, probe in zip(targets, scaled, strict=True):
            change = start - target
            if tall:  # whichever is cheaper
                gram += (square := probe.mT @ probe)
            excess += change @ square if tall else (change @ probe.mT) @ probe
        return cls(start, gram, excess, rows if 2 * len(rows) < side else None)

    def descended(self, steps: int, lr: float) -> Tensor:
        """x [m, n] after `steps` of Adam."""
        excess, gradient = 2 * self.excess, torch.empty_like(self.start)
        right = 2 * (self.gram if self.factor is None else self.factor)

        def along(y: Tensor) -> Tensor:
            left = y if self.factor is None else y @ self.factor.mT
            return torch.addmm(excess, left, right, out=gradient)

        return self.start + descend(torch.zeros_like(self.start), along, steps, lr)

    def with_momentum(self, steps: int, lr: float, momentum: float) -> Tensor:
        """x [m, n] after `steps` of gradient descent with momentum (torch's SGD), which along every eigenvector of C is
        a recurrence of numbers: the way to the minimum, y = -E V diag(way) V^T."""
        values, vectors = leading_vectors(self.gram.to(torch.float64, copy=True), len(self.gram))
        way, velocity = torch.zeros_like(values), torch.zeros_like(values)
        for _ in range(steps):
            velocity = momentum * velocity + 2 * (1 - values * way)
            way = way + lr * velocity
        return self.start - ((self.excess.double() @ vectors * way) @ vectors.T).to(self.start)

    def filtered(self, weigh: Callable[[Tensor], Tensor]) -> Tensor:
        """start + (minimum - start) V f(lambda) V^T, the minimum being D C^+: `weigh` makes f [n] of the eigenvalues of
        C [n], descending and at least FLOOR. f = 0 is the start, f = 1 the minimum."""
        values, vectors = leading_vectors(self.gram.clone(), len(self.gram))
        values = values.clamp_min(FLOOR)
        return self.start - (self.excess @ vectors * (weigh(values) / values)) @ vectors.T

    def regularised(self, ridge: float | Tensor) -> Tensor:
        """x at which the loss plus ridge |x - start|^2 is least: the start where no probe lies."""
        regular = self.gram + ridge * torch.eye(len(self.gram)).to(self.gram)
        return self.start - torch.linalg.solve(regular, self.excess, left=False)

    def spectrum(self) -> "Spectrum":
        """What `regularised` needs for many ridges: each is one product then."""
        values, vectors = leading_vectors(self.gram.clone(), len(self.gram))
        return Spectrum(self.start, self.excess @ vectors, values.clamp_min(0.0), vectors)

    def nearest(self, cutoff: float) -> Tensor:
        """The minimum nearest to the start; eigenvalues below `cutoff` of the largest count as zero."""
        values, vectors = leading_vectors(self.gram.clone(), len(self.gram))
        vectors, values = vectors[:, values > cutoff * values[0]], values[values > cutoff * values[0]]
        return self.start - (self.excess @ vectors / values) @ vectors.T


class Spectrum(NamedTuple):
    """A quadratic by the eigenvectors of C."""

    start: Tensor  # [m, n]
    turned: Tensor  # E V [m, n]
    values: Tensor  # [n], at least 0
    vectors: Tensor  # V [n, n]

    def regularised(self, ridge: float) -> Tensor:
        """As the quadratic's."""
        return self.start - (self.turned / (self.values + ridge)) @ self.vectors.T


def of_task_vectors(tau: Tensor) -> Quadratic:
    """WUDI's loss: targets and probes are the task vectors [T, m, n], the start is their sum."""
    return Quadratic.of(tau.sum(0), tau, tau, sizes_of(tau))


def sizes_of(tau: Tensor) -> Tensor:
    """Squared norms [T]."""
    return tau.flatten(1).square().sum(1)


def gram_of(rows: Tensor) -> Tensor:
    """rows^T rows [n, n] of [k, n], a panel of columns at a time: what lies above the diagonal is copied."""
    size = rows.shape[1]
    gram, panel = rows.new_empty(size, size), max(PANEL, -(-size // 8))
    for first in range(0, size, panel):
        last = min(first + panel, size)
        torch.mm(rows[:, first:].mT, rows[:, first:last], out=gram[first:, first:last])
        gram[first:last, last:] = gram[last:, first:last].mT
    return gram


def descend(
    start: Tensor,
    gradient: Callable[[Tensor], Tensor],
    steps: int,
    lr: float,
    optimizer: Callable[..., torch.optim.Optimizer] = ADAM,
) -> Tensor:
    """`start` after `steps` of an optimizer of torch along a gradient known in closed form, on its device."""
    x = start.clone(memory_format=torch.contiguous_format)  # fused steps look at no strides
    stepper = optimizer([x], lr=lr)
    for _ in range(steps):
        x.grad = gradient(x).contiguous()
        stepper.step()
    return x


def by_matrix(
    experts: Experts,
    context: Context,
    solve: Callable[[str, Tensor], Tensor],
    matrices: Matrices = "linear",
    rest: Rest = "base",
) -> dict[str, Tensor]:
    """What `solve(key, tau [T, out, in])` makes of every matrix that some task changes, on the context's device.

    matrices: "linear", those of attention and FFNs, or "all". rest: no change for all else ("base"), or the mean.
    """

    def merge(key: str, tau: Tensor) -> Tensor:
        chosen = tau.ndim == 3 and bool(tau.any())
        if chosen and (matrices == "all" or experts.param(key).family in ("ffn", "attention")):
            solved = solve(key, turned(experts, key, tau).to(context.device)).float().cpu()
            return turned(experts, key, solved)
        return tau.mean(0) if rest == "mean" else torch.zeros(tau.shape[1:])

    return experts.map(merge, heavy=context.device.type == "cpu")


@dataclass(frozen=True)
class Filtered(Options):
    """Mixin of the methods that solve WUDI's loss in fp64 with a filter on eigenvalues, `weigh`.

    matrices, rest: see by_matrix. scale: of the whole change.
    """

    matrices: Matrices = field(default="all", kw_only=True)
    rest: Rest = field(default="mean", kw_only=True)
    scale: float = field(default=1.0, kw_only=True)
    needs: ClassVar[str] = "nothing"

    def weigh(self, values: Tensor) -> Tensor:
        """f [n] of eigenvalues [n], descending."""
        raise NotImplementedError

    def __call__(self, experts: Experts, context: Context = ALONE) -> Merged:
        def solve(_: str, tau: Tensor) -> Tensor:
            return of_task_vectors(tau.double()).filtered(self.weigh)

        return experts.merged(by_matrix(experts, context, solve, self.matrices, self.rest), self.scale)
