from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from merging.applied import is_turned, turned
from merging.checkpoints import Checkpoint, Spec
from merging.combined import Changes, Combined, Mix, Term
from merging.context import ALONE, Context, needs_of
from merging.decompose.svd import leading_vectors, svd
from merging.deltas import LowRank
from merging.errors import UserError
from merging.experts import Experts
from merging.merged import Merged
from merging.methods.method import Method, static
from merging.methods.ties import Ties

LEAST = 1e-5  # of a singular value, as published: below it a direction is left out


@dataclass(frozen=True)
class Knots:
    """KnOTS: task matrices in a basis that all share, merged there by another method; made for LoRA experts.

    Stoica et al., 2025, arXiv 2410.19735. For every matrix [out, in] U S [V_1 .. V_T] = [tau_1 .. tau_T]; `then`, any
    static method that needs weights alone, merges the Z_t = S V_t as if they were task vectors (DARE may stand in front
    of it), and U Z is the change.
    Published with TIES by mean at 0.6 for ViT-B/32, at 0.5 for ViT-L/14. Of adapters the factors are decomposed, alpha
    and rank folded in, never a matrix of theirs, and the result is one adapter again. Of whole experts, which the paper
    does not merge, all matrices are, and a basis as large as the model is held. All else stays the base's, as
    published. Not built: the transposed variant (`concat_across_output` false).
    """

    then: Method = field(default_factory=lambda: Ties(merge="mean", scale=0.6))
    needs: ClassVar[str] = "nothing"
    additive: ClassVar[bool] = True  # factors in, factors out

    def __call__(self, experts: Experts, context: Context = ALONE) -> Merged:
        """Raises UserError where `then` is not static or looks at data."""
        keys = [key for key, spec in experts.specs().items() if len(spec.shape) == 2 and spec.bytes]
        found = experts.in_threads(lambda key: basis(experts, key), keys)
        bases = {key: u for key, u in found.items() if u.shape[1]}
        rows = (Rows(experts, bases, task) for task in range(len(experts.tasks)))
        apart = Coordinates(experts.tasks, Rows(experts, bases, None), tuple(rows), experts.table)
        if needs_of(self.then) != "nothing":
            raise UserError(
                f"knots: then={type(self.then).__name__} looks at data, and no input can be run through coordinates of "
                f"matrices. Choose a method that needs weights alone, such as ties, average or task_arithmetic."
            )
        merged = static(self.then, apart, context, "knots: then")
        lift = lambda changes: _lifted(experts, bases, changes)  # noqa: E731
        return experts.merged(lift(merged.shared), merged.scale, fixed=lift(merged.fixed), remarks=merged.remarks)


class Coordinates(Experts):
    """Experts that are known by their Z_t alone: equal matrices of two parameters are no tied weights there."""

    tied: ClassVar[Mapping[str, str]] = {}


class Rows(Checkpoint):
    """Z_t [r, n] of one task, or of the base, which is zero; computed whenever they are asked for."""

    name = "coordinates of KnOTS"

    def __init__(self, experts: Experts, bases: Mapping[str, Tensor], task: int | None):
        self.experts, self.bases, self.task = experts, bases, task

    def specs(self) -> dict[str, Spec]:
        return {key: Spec(torch.Size((u.shape[1], self._inputs(key))), torch.float32) for key, u in self.bases.items()}

    def _inputs(self, key: str) -> int:
        return self.experts.specs()[key].shape[0 if is_turned(self.experts, key) else 1]

    def tensor(self, key: str) -> Tensor:
        u = self.bases[key]
        if self.task is None:
            return torch.zeros(u.shape[1], self._inputs(key))
        if (low_rank := factors(self.experts, key)) is not None:
            up, down = low_rank.factors(self.task)
            return (u.T @ up) @ down
        return u.T @ turned(self.experts, key, self.experts.task_vector(key, self.task))


def factors(experts: Experts, key: str) -> LowRank | None:
    """Those of adapters, of task matrices [out, in]."""
    low_rank = experts.low_rank(key)
    return low_rank.transposed() if low_rank is not None and is_turned(experts, key) else low_rank


def basis(experts: Experts, key: str) -> Tensor:
    """U [m, r], fp32: orthonormal directions in which any of the task matrices has outputs."""
    if (low_rank := factors(experts, key)) is not None:
        pairs = map(low_rank.factors, range(low_rank.parts))
        joint = [up.double() @ torch.linalg.qr(down.double().T).R.T for up, down in pairs]
        u, s, _ = svd(torch.cat(joint, 1))
        return u[:, s > LEAST]
    gram = sum((tau @ tau.T for tau in turned(experts, key, experts.tau(key)).double()), torch.zeros(()))
    values, vectors = leading_vectors(gram, len(gram))
    return vectors[:, values > LEAST**2].float()


def _lifted(experts: Experts, bases: Mapping[str, Tensor], changes: Changes) -> Combined:
    """Changes of the Z as those of the matrices, of adapters as factors."""

    def lifted(key: str) -> Term:
        if experts.low_rank(key) is None:
            return turned(experts, key, bases[key] @ changes[key])
        product = LowRank.of([bases[key]], [changes[key]])
        return Mix(product.transposed() if is_turned(experts, key) else product, torch.ones(1))

    return Combined({key: lifted(key) for key in changes})
