from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from merging.context import ALONE, Context
from merging.experts import Experts
from merging.merged import Merged
from merging.options import Options, Rate, Within


@dataclass(frozen=True)
class Wudi(Options):
    """WUDI-Merging: for every matrix the change that interferes least with the row spaces of all task vectors.

    Cheng et al., 2025, arXiv 2503.08099. From tau = sum_t tau_t on, Adam lowers sum_t |(tau - tau_t) tau_t^T|^2 /
    |tau_t|^2, without data. steps, lr: where it stops is a regulariser; the exact minimum is worse. matrices: "linear",
    those of attention and FFNs (the authors'); "all", every matrix. rest: all other parameters stay those of the "base"
    (the authors'), or take the "mean" of the task vectors. split_qkv is an option of the experts.
    """

    steps: Annotated[int, Within(0, 10**6)] = 300
    lr: Rate = 1e-5
    matrices: Literal["linear", "all"] = "linear"
    rest: Literal["base", "mean"] = "base"
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts, context: Context = ALONE) -> Merged:
        def merge(key: str, tau: Tensor) -> Tensor:
            if not self._linear(experts, key, tau):
                return tau.mean(0) if self.rest == "mean" else torch.zeros(tau.shape[1:])
            return least_interference(tau.to(context.device), self.steps, self.lr).cpu()

        return experts.merged(experts.map(merge, heavy=context.device.type == "cpu"))

    def _linear(self, experts: Experts, key: str, tau: Tensor) -> bool:
        if tau.ndim != 3 or not tau.any():
            return False
        return self.matrices == "all" or experts.param(key).family in ("ffn", "attention")


def least_interference(tau: Tensor, steps: int, lr: float) -> Tensor:
    """`steps` of Adam at `lr` on sum_t |(x - tau_t) tau_t^T|^2 / |tau_t|^2, from x = sum_t tau_t [m, n] of [T, m, n].

    With x = sum_t tau_t + y the gradient is 2 (y C + E): C = sum_t tau_t^T tau_t / |tau_t|^2, E = sum_t (sum_s tau_s -
    tau_t) tau_t^T tau_t / |tau_t|^2: one product a step, whatever T, and zero exactly where nothing interferes, which
    Adam would not forgive. A task vector of zeros has no say.
    """
    sizes = tau.flatten(1).square().sum(1)
    scaled = tau / torch.where(sizes > 0, sizes, 1).sqrt()[:, None, None]
    total = tau.sum(0)
    c = torch.einsum("tmi,tmj->ij", scaled, scaled)
    e = torch.zeros_like(total)
    for change, row in zip(tau, scaled, strict=True):
        e += ((total - change) @ row.mT) @ row
    y = torch.zeros_like(total)
    optimizer = torch.optim.Adam([y], lr)
    for _ in range(steps):
        y.grad = 2 * (y @ c + e)
        optimizer.step()
    return total + y
