from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from merging.context import Context
from merging.experts import Experts
from merging.merged import Merged
from merging.preflight import check_range
from merging.statistics import grams_of

RIDGE = 1e-12  # beside a diagonal of ones: keeps W_0 where no input ever lies
KINDS = ("ffn", "attention", "projection")


@dataclass(frozen=True)
class RegMean:
    """Regression mean: the matrices whose outputs are nearest to those of all experts on their own inputs.

    Jin et al., 2023, arXiv 2212.09849. W = sum_t W_t G_t (sum_t G_t)^-1 with G_t = X_t^T X_t / rows over all tokens
    that go into the matrix in expert t; vectors, embeddings and patches are averaged. rho: scale of the off-diagonal
    entries of G_t, which keeps the sum regular; 0 weighs inputs one by one. samples: per task. by_block: measure one
    block's matrices at a time, which takes a forward pass for every block and the memory of one.
    """

    rho: float = 0.95
    samples: int = 256
    by_block: bool = False
    needs: ClassVar[str] = "inputs"

    def __post_init__(self) -> None:
        check_range("reg_mean: rho", self.rho, 0.0, 1.0)
        check_range("reg_mean: samples", self.samples, 1, 10**9)

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without inputs, and for names that no table has."""
        groups = self._groups(experts)
        matrices = {key for keys in groups for key in keys}
        changes = experts.map(lambda key, tau: tau.mean(0), [key for key in experts.specs() if key not in matrices])
        for keys in groups:
            changes |= self._solved(experts, context, keys)
        return experts.merged(changes)

    def _groups(self, experts: Experts) -> list[list[str]]:
        """The matrices that are solved together: all, or those of one block."""
        specs, tied = experts.specs(), experts.tied()
        shared = {*tied, *tied.values()}
        keys = [key for key, spec in specs.items() if len(spec.shape) == 2 and key not in shared]
        keys = [key for key in keys if any(experts.param(key).is_a(kind) for kind in KINDS)]
        if not self.by_block:
            return [keys] if keys else []
        blocks: dict[str | None, list[str]] = {}
        for key in keys:
            blocks.setdefault(experts.param(key).block, []).append(key)
        return list(blocks.values())

    def _solved(self, experts: Experts, context: Context, keys: list[str]) -> dict[str, Tensor]:
        """The change of every matrix, tau = (sum_t tau_t G_t) (sum_t G_t)^-1, as stored; one task's Grams at a time."""
        data, total, moved = context.unlabelled(), {}, {}
        for task, checkpoint in enumerate(experts.checkpoints):
            sums, rows = grams_of(data, checkpoint, task, keys, self.samples)
            for key in keys:
                gram = shrunk(sums.pop(key) / rows[key], self.rho)
                tau = as_applied(experts, key, experts.task_vector(key, task)).double() @ gram
                total[key] = total[key] + gram if key in total else gram
                moved[key] = moved[key] + tau if key in moved else tau
        return {key: as_applied(experts, key, solved(total.pop(key), moved.pop(key)).float()) for key in keys}


def shrunk(gram: Tensor, rho: float) -> Tensor:
    """[n, n] with its off-diagonal entries times rho."""
    return rho * gram + (1 - rho) * gram.diagonal().diag()


def solved(gram: Tensor, moved: Tensor) -> Tensor:
    """x [m, n] of x gram = moved; zero along inputs that are always zero. Inputs are scaled to one size first."""
    size = gram.diagonal().sqrt()
    size = torch.where(size > 0, size, 1)
    ridge = RIDGE * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram / size / size[:, None] + ridge, moved / size, left=False) / size


def as_applied(experts: Experts, key: str, matrix: Tensor) -> Tensor:
    """A matrix between how it is stored and [out, in]."""
    return matrix.T.contiguous() if experts.param(key).transposed else matrix
