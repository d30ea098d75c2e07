"""How far a merged matrix interferes with its experts: a quadratic, lowered step by step, or solved in closed form.

L(x) = sum_t |(x - target_t) probe_t^T|^2 / size_t. With x = start + y its gradient is 2 (y C + E) where C = sum_t
probe_t^T probe_t / size_t and E = sum_t (start - target_t) probe_t^T probe_t / size_t: one product, whatever T.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from merging.context import ALONE, Context
from merging.decompose.svd import leading_vectors
from merging.experts import Experts
from merging.merged import Merged
from merging.options import Options

Matrices = Literal["linear", "all"]
Rest = Literal["base", "mean"]
FLOOR = 1e-8  # of an eigenvalue of C, whose trace is the number of tasks where the probes are the task vectors


class Quadratic(NamedTuple):
    """The loss around `start`, as a function of y [m, n]."""

    start: Tensor  # [m, n]
    gram: Tensor  # C [n, n]
    excess: Tensor  # E [m, n]; zero exactly where nothing interferes

    @classmethod
    def of(cls, start: Tensor, targets: Tensor, probes: Tensor, sizes: Tensor) -> "Quadratic":
        """From targets [T, m, n], probes [T, k, n] and the tasks' sizes [T]; a task of size 0 has no say."""
        scaled = probes / torch.where(sizes > 0, sizes, torch.inf).sqrt()[:, None, None]
        side = scaled.shape[2]
        gram, excess = start.new_zeros(side, side), torch.zeros_like(start)
        for target, probe in zip(targets, scaled, strict=True):
            square, change = probe.mT @ probe, start - target
            gram += square
            excess += change @ square if len(probe) > side else (change @ probe.mT) @ probe  # whichever is cheaper
        return cls(start, gram, excess)

    def descended(self, steps: int, lr: float, optimizer: type[torch.optim.Optimizer], **options: float) -> Tensor:
        """x [m, n] after `steps` of an optimizer of torch."""
        y = descend(torch.zeros_like(self.start), lambda y: 2 * (y @ self.gram + self.excess), steps, lr, optimizer,
                    **options)  # fmt: skip
        return self.start + y

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


def descend(
    start: Tensor,
    gradient: Callable[[Tensor], Tensor],
    steps: int,
    lr: float,
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
    **options: float,
) -> Tensor:
    """`start` after `steps` of an optimizer of torch along a gradient that is known in closed form, on its device."""
    x = start.clone()
    stepper = optimizer([x], lr=lr, **options)  # pyright: ignore[reportCallIssue]
    for _ in range(steps):
        x.grad = gradient(x)
        stepper.step()
    return x


def by_matrix(
    experts: Experts,
    context: Context,
    solve: Callable[[str, Tensor], Tensor],
    matrices: Matrices = "linear",
    rest: Rest = "base",
) -> dict[str, Tensor]:
    """What `solve(key, tau [T, m, n])` makes of every matrix that some task changes, on the context's device.

    matrices: "linear", those of attention and FFNs, or "all". rest: no change for all else ("base"), or the mean.
    """

    def merge(key: str, tau: Tensor) -> Tensor:
        chosen = tau.ndim == 3 and bool(tau.any())
        if chosen and (matrices == "all" or experts.param(key).family in ("ffn", "attention")):
            return solve(key, tau.to(context.device)).float().cpu()
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
