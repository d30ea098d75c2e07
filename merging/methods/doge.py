from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from merging.context import ALONE, Context
from merging.decompose.svd import svd
from merging.entries import Entry, entrywise, sweep
from merging.experts import Experts
from merging.interference import by_matrix, descend, sizes_of
from merging.merged import Merged
from merging.ops import KeepLargest
from merging.options import Count, Fraction, Options, Rate, Within


@dataclass(frozen=True)
class Doge(Options):
    """DOGE on Task Arithmetic: a change that all tasks share makes up for what their task vectors lose to each other.

    Wei et al., 2025, arXiv 2501.01230. For every matrix of attention and FFNs: lambda_t = eta / |tau_t|; delta, from 0
    by Adam, lowers the squared row products sum_t <tau_t, tau_t - sum_s lambda_s (tau_s + delta)>^2, its gradient
    projected off the min(m, n) // subspace leading directions of all tasks' output spaces; the change is sum_t lambda_t
    mask_t (tau_t + delta), mask_t being the `density` largest entries of tau_t over all these matrices. All other
    parameters stay the base's. A task changes a matrix by eta in norm, however large its task vector: of large ones,
    such as those of LoRA experts, hardly anything is left. An entry that a task left exactly as it was takes no delta
    for it; in the authors' code it would where fewer entries than `density` were changed. fusion_bench's documentation
    differs from its code.
    """

    eta: Annotated[float, Within(0.0, 100.0)] = 0.07
    subspace: Count = 6
    density: Fraction = 0.3
    steps: Annotated[int, Within(0, 10**6)] = 400
    lr: Rate = 1e-4
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts, context: Context = ALONE) -> Merged:
        weights: dict[str, Tensor] = {}

        def solve(key: str, tau: Tensor) -> Tensor:
            norms = sizes_of(tau).sqrt()
            weights[key] = torch.where(norms > 0, self.eta / norms, 0).cpu()
            return descend(torch.zeros_like(tau[0]), self.gradient(experts, tau), self.steps, self.lr)

        common = by_matrix(experts, context, solve)
        keys = [key for key in common if key in weights]
        total = sum(common[key].numel() for key in keys)
        if not keys:
            return experts.merged({})
        count = min(int(total * self.density) + 1, total)  # the published threshold entry is kept too
        trim = KeepLargest.find(partial(sweep, experts, keys=keys), count)

        def merge(entry: Entry, tau: Tensor) -> Tensor:
            delta = common[entry.key].view(-1)[entry.first : entry.first + tau.shape[1]]
            return weights[entry.key] @ torch.where(trim(entry, tau) != 0, tau + delta, 0)

        return experts.merged(entrywise(experts, merge, keys))

    def gradient(self, experts: Experts, tau: Tensor) -> Callable[[Tensor], Tensor]:
        """That of the loss at delta [m, n], projected, for task vectors [T, m, n] of which none may be zero."""
        norms = sizes_of(tau).sqrt()
        weights = torch.where(norms > 0, self.eta / norms, 0)
        rows, total = tau.transpose(0, 1).contiguous(), weights.sum()  # [m, T, n]
        missing = tau - torch.einsum("t,tmn->mn", weights, tau)
        lost = (tau * missing).sum(2).T[:, :, None]  # [m, T, 1]
        basis = self._basis(experts, tau)

        def projected(delta: Tensor) -> Tensor:
            left = total * (rows @ delta[:, :, None]) - lost
            gradient = 2 * total * (left.mT @ rows)[:, 0]
            return gradient - basis @ (basis.T @ gradient)

        return projected

    def _basis(self, experts: Experts, tau: Tensor) -> Tensor:
        """Leading directions [m, k] of the output spaces of all tasks."""
        side = min(tau.shape[1:])
        ups = [part.u for part in experts.svd(tau, side // len(tau))]
        return svd(torch.cat(ups, 1), side // self.subspace).u.to(tau)
