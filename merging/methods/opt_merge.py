from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from merging.context import ALONE, Context
from merging.decompose.svd import SVD
from merging.experts import Experts
from merging.interference import Matrices, Quadratic, Rest, by_matrix, sizes_of
from merging.merged import Merged
from merging.options import Fraction, Options, Rate, Within


@dataclass(frozen=True)
class OptMerge(Options):
    """OptMerge (WUDI v2): WUDI-Merging against the leading singular triplets of the task vectors alone.

    Wei et al., 2026, ICLR (WalkerWorldPeace/MLLMerging). It lowers sum_t |(tau - target_t) (S_t V_t^T)^T|^2 / |tau_t|^2
    with max(1, min(m, n) // T) triplets of every task. tuned: "full" fine-tuning, target_t = mean + truncated (tau_t -
    mean), from sum_t tau_t by Adam at 1e-5; "lora", target_t = truncated tau_t, from the mean by SGD at 1e-4 with
    momentum 0.9 (in closed form, ours). lr: null is that of the branch. share: of the triplets instead of 1 / T. probe:
    S_t V_t^T of the "task_vector" (the authors' code) or of what its "target" truncates (their text). matrices: "all"
    (theirs) or "linear". rest: "mean" (theirs) or "base". scale: 1 or 0.1 published, searched in 0.1 to 1.5.
    """

    tuned: Literal["full", "lora"] = "full"
    steps: Annotated[int, Within(0, 10**6)] = 300
    lr: Rate | None = None
    share: Fraction | None = None
    probe: Literal["task_vector", "target"] = "task_vector"
    matrices: Matrices = "all"
    rest: Rest = "mean"
    scale: float = 1.0
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts, context: Context = ALONE) -> Merged:
        def solve(key: str, tau: Tensor) -> Tensor:
            quadratic = self.quadratic(experts, tau)
            if self.tuned == "full":
                return quadratic.descended(self.steps, self.lr or 1e-5)
            return quadratic.with_momentum(self.steps, self.lr or 1e-4, 0.9)

        return experts.merged(by_matrix(experts, context, solve, self.matrices, self.rest), self.scale)

    def quadratic(self, experts: Experts, tau: Tensor) -> Quadratic:
        """The loss for task vectors [T, m, n]."""
        side = min(tau.shape[1:])
        rank = max(1, side // len(tau) if self.share is None else int(side * self.share))
        mean = tau.mean(0)
        parts = experts.svd(tau, rank)
        centred = experts.svd(tau - mean, rank, kept=False) if self.tuned == "full" else parts
        probed = parts if self.probe == "task_vector" else centred
        targets = torch.stack([(part.u * part.s) @ part.vh for part in centred]).to(tau)
        if self.tuned == "full":
            return Quadratic.of(tau.sum(0), targets + mean, _probes(probed).to(tau), sizes_of(tau))
        return Quadratic.of(mean, targets, _probes(probed).to(tau), sizes_of(tau))


def _probes(parts: Sequence[SVD]) -> Tensor:
    """S_t V_t^T [T, k, n]."""
    return torch.stack([part.s[:, None] * part.vh for part in parts])
