from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from merging.context import Context
from merging.entries import entrywise
from merging.experts import Experts
from merging.merged import Merged
from merging.options import Count, Options, Share
from merging.statistics import grams

RIDGE = 1e-7  # of the mean diagonal: where hardly any input lies the mean stays, instead of a number without bound
ZERO = torch.zeros((), dtype=torch.float64)
KINDS = ("ffn", "attention", "projection")


@dataclass(frozen=True)
class RegMean(Options):
    """Regression mean: the matrices whose outputs are nearest to those of all experts on their own inputs.

    Jin et al., 2023, arXiv 2212.09849. W = sum_t W_t G_t (sum_t G_t)^-1 with G_t = X_t^T X_t / rows over all tokens
    that go into the matrix in expert t; vectors, embeddings and patches are averaged. rho: scale of the off-diagonal
    entries of G_t, against a singular sum; 0 weighs inputs one by one. samples: per task. by_block: measure one
    block's matrices at a time, which takes a forward pass for every block and the memory of one.
    """

    rho: Share = 0.95
    samples: Count = 256
    by_block: bool = False
    needs: ClassVar[str] = "inputs"

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without inputs, and for names that no table has."""
        experts = replace(experts, separate_qkv=False)  # rows are solved one by one: it makes no difference
        groups = self._groups(experts)
        matrices = {key for keys in groups for key in keys}
        rest = [key for key in experts.specs() if key not in matrices]
        changes = {**entrywise(experts, lambda _, tau: tau.mean(0), rest)}
        for keys in groups:
            changes |= self._solved(experts, context, keys)
        return experts.merged(changes)

    def _groups(self, experts: Experts) -> list[list[str]]:
        """The matrices that are solved together: all, or those of one block."""
        specs, tied = experts.specs(), experts.tied
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
        data = context.unlabelled()
        total: dict[str, Tensor] = {}
        moved: dict[str, Tensor] = {}
        mean: dict[str, Tensor] = {}
        for task, checkpoint in enumerate(experts.checkpoints):
            sums, rows = grams(data, checkpoint, task, keys, self.samples)
            for key in keys:
                gram = shrunk(sums.pop(key) / rows[key], self.rho)
                tau = as_applied(experts, key, experts.task_vector(key, task)).double()
                total[key] = total.get(key, ZERO) + gram
                moved[key] = moved.get(key, ZERO) + tau @ gram
                mean[key] = mean.get(key, ZERO) + tau / len(experts.tasks)
        solutions = {key: solved(total.pop(key), moved.pop(key), mean.pop(key)) for key in keys}
        return {key: as_applied(experts, key, solution.float()) for key, solution in solutions.items()}


def shrunk(gram: Tensor, rho: float) -> Tensor:
    """[n, n] with its off-diagonal entries times rho."""
    return rho * gram + (1 - rho) * gram.diagonal().diag()


def solved(gram: Tensor, moved: Tensor, mean: Tensor) -> Tensor:
    """x [m, n] of x gram = moved, and `mean` along directions in which hardly any input lies."""
    ridge = RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    regular = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
    return mean + torch.linalg.solve(regular, moved - mean @ gram, left=False)


def as_applied(experts: Experts, key: str, matrix: Tensor) -> Tensor:
    """A matrix between how it is stored and [out, in]."""
    return matrix.T.contiguous() if experts.param(key).transposed else matrix
