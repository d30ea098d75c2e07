from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from merging.checkpoints.tied import behind
from merging.context import ALONE, Context
from merging.decompose.compressed import Compressed
from merging.decompose.joint_tucker import Decompose, joint_deltas
from merging.decompose.ranks import Ranks
from merging.decompose.tucker import Engine, full_ranks, matched_rank, stored
from merging.decompose.tucker import Tucker as Factors
from merging.deltas import Delta, Dense, LowRank, Tucker
from merging.errors import UserError
from merging.experts import Experts
from merging.merged import Merged, Routing
from merging.methods.method import Method, static
from merging.methods.task_arithmetic import TaskArithmetic
from merging.neurons import Masks, Neurons, selected
from merging.options import Coefficient, Options
from merging.residual import energy_kept, residuals, share_kept


class Part(NamedTuple):
    """What becomes of one routed parameter."""

    delta: Delta
    energy: list[float] | None  # share that the delta keeps of each task vector, of matrices
    fixed: Tensor | None  # static correction


@dataclass(frozen=True)
class Duet(Options):
    """DuetMerging: shared-factor Tucker changes of the FFNs, routed per input, plus a static correction. CVPR 2026.

    Every FFN matrix of all tasks is one tensor [T, m, n]; its Tucker decomposition is mixed by the gate. Of the
    residual of each task only the hidden neurons that its expert lives on are kept; the average over
    tasks is folded into the weights. The rest of the network is merged by `rest`.

    routes: "ffn" as published; "all" routes attention and the last projection in the same form, and norms and biases
    whole. ranks: see Ranks; only those of mode energy with value 0 lose nothing, for the full ranks are min(m, T n) and
    min(n, T m). factors: "tucker", or "svd", one truncated decomposition per task with no more stored numbers
    (at least rank 1; the ablation). unit: "matrix" decomposes every matrix apart; "block" both FFN matrices together,
    the second transposed, so that they share factors; "model" those of all blocks. static: False is the ablation
    "dynamic only". neurons: which are kept, and how they are scaled. average: over "all" tasks, or, unscaled, over
    those that kept a neuron ("kept"). static_coef: 0 is no correction. bias: "dynamic" (exact), "rest" or "base". init:
    weight of every task before the gates are trained. rest: any static method, with a scale of its own.
    """

    routes: Literal["ffn", "all"] = "ffn"
    ranks: Ranks = field(default_factory=lambda: Ranks("fraction", 0.25))
    factors: Literal["tucker", "svd"] = "tucker"
    engine: Engine = "hooi"
    unit: Literal["matrix", "block", "model"] = "matrix"
    static: bool = True
    neurons: Neurons = field(default_factory=Neurons)
    average: Literal["all", "kept"] = "all"
    static_coef: Coefficient = 1.0
    bias: Literal["dynamic", "rest", "base"] = "dynamic"
    init: float = 0.3
    rest: Method = field(default_factory=TaskArithmetic)
    needs: ClassVar[str] = "inputs"
    routed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit != "matrix" and self.factors == "svd":
            raise UserError(f"duet: unit={self.unit} shares Tucker factors; factors=svd has none. Set unit=matrix.")

    def __call__(self, experts: Experts, context: Context = ALONE) -> Merged:
        """Raises UserError where `rest` is not static, images are missing, a mask is empty or a rank is too large."""
        routed = [key for key in experts.specs() if self._routed(experts, key)]
        kept = () if self.bias == "rest" else experts.keys("ffn")
        rest = static(self.rest, experts.part(set(experts.specs()) - set(routed) - set(kept)), context, "duet: rest")
        masks = self._masks(experts, context, routed)
        together = {} if self.unit == "matrix" else joint_deltas(experts, routed, self.unit, self._decomposed(experts))

        def part(key: str) -> Part:
            joint = together.get(key)
            if joint is not None and joint.compressed is not None:
                return self._reduced(experts, key, joint.compressed, joint.small, masks)._replace(delta=joint.delta)
            low_rank = None if joint is not None else experts.low_rank(key)
            if low_rank is not None and len(low_rank.shape) == 2 and low_rank.rank:
                return self._from_factors(experts, key, low_rank, masks)
            tau = experts.tau(key)
            if tau.ndim != 3 or not tau.numel():
                return Part(Dense(tau.clone()), None, None)
            return self._part(experts, key, tau, joint.delta if joint else self._factored(experts, key, tau), masks)

        parts = experts.in_threads(part, routed)
        return experts.merged(
            rest.shared,
            rest.scale,
            {key: parts[key].delta for key in routed},
            Routing("learned", init=self.init) if routed else None,
            fixed={**rest.fixed, **{key: parts[key].fixed for key in routed if parts[key].fixed is not None}},
            energy={key: parts[key].energy for key in routed if parts[key].energy is not None},
            remarks=rest.remarks,
        )

    def _routed(self, experts: Experts, key: str) -> bool:
        if len(experts.specs()[key].shape) < 2 and self.bias != "dynamic":
            return False
        info = experts.param(key)
        return info.family == "ffn" or (self.routes == "all" and (info.depth is not None or behind(experts, key)))

    def _masks(self, experts: Experts, context: Context, routed: list[str]) -> Masks:
        """Those of the blocks, none where there is nothing to correct: images are needed for this alone."""
        ffn = any(experts.param(key).hidden_axis is not None for key in routed)
        return self.neurons.masks(experts, context) if ffn and self.static and self.static_coef else {}

    def _part(self, experts: Experts, key: str, tau: Tensor, delta: Delta, masks: Masks) -> Part:
        axis, block = experts.param(key).stored_axis, experts.param(key).block
        mask = None if axis is None or block is None else masks.get(block)
        if mask is None or axis is None:
            return Part(delta, energy_kept(tau, delta), None)
        if self.neurons.joint:  # all residuals at once
            left = torch.stack(list(residuals(tau, delta)))
            energy, total = [share_kept(*pair) for pair in zip(tau, left, strict=True)], self._kept(left, mask, axis)
        else:
            energy, total = [], torch.zeros(tau.shape[1:])
            for task, left in enumerate(residuals(tau, delta)):
                energy.append(share_kept(tau[task], left))
                total += self._kept(left[None], mask[task : task + 1], axis)
        by = len(tau) if self.average == "all" else mask.sum(0).clamp_min(1).view((-1, 1) if axis == 0 else (1, -1))
        return Part(delta, energy, self.static_coef * total / by)

    def _from_factors(self, experts: Experts, key: str, low_rank: LowRank, masks: Masks) -> Part:
        """As of the matrices themselves."""
        turned = experts.param(key).transposed and self.ranks.in_value is not None
        compressed = Compressed.of(low_rank.transposed() if turned else low_rank)
        small = self._delta(experts, key, compressed.core, compressed.exact())
        if turned:
            small, compressed = small.transposed(), compressed.transposed()
        return self._reduced(experts, key, compressed, small, masks)._replace(delta=compressed.lifted(small))

    def _reduced(self, experts: Experts, key: str, compressed: Compressed, small: Delta, masks: Masks) -> Part:
        """By the cores and their approximation: of the matrices at most the side of the hidden neurons is whole."""
        core, out, into = compressed
        axis = experts.param(key).stored_axis
        rows, columns = axis == 0, axis == 1
        tau = out @ core if rows else core @ into.T if columns else core
        part = self._part(experts, key, tau, compressed.lifted(small, rows, columns), masks)
        fixed = part.fixed
        if fixed is not None:
            fixed = fixed @ into.T if rows else out @ fixed
        return part._replace(fixed=fixed)

    def _kept(self, left: Tensor, mask: Tensor, axis: int) -> Tensor:
        """Sum over the tasks of what their neurons keep of the residuals."""
        return (self.neurons.apply if self.average == "all" else selected)(left, mask, axis).sum(0)

    def _decomposed(self, experts: Experts) -> Decompose:
        def decomposed(key: str, stack: Tensor, exact: Factors | None = None) -> Factors:
            source = stack if exact is None else exact
            with about(key):
                ranks = self.ranks.resolve(source)
                within = [min(pair) for pair in zip(ranks, full_ranks(stack.shape), strict=True)]
                return experts.tucker(stack, within, self.engine, source.shape)

        return decomposed

    def _factored(self, experts: Experts, key: str, tau: Tensor) -> Delta:
        """Of a matrix that is stored as [in, out] that of [out, in], transposed, where ranks tell out from in."""
        if experts.param(key).transposed and self.ranks.in_value is not None:
            return self._delta(experts, key, tau.mT).transposed()
        return self._delta(experts, key, tau)

    def _delta(self, experts: Experts, key: str, stack: Tensor, exact: Factors | None = None) -> Delta:
        """Of a stack, or of the cores that stand for one whose factors are `exact`."""
        if self.factors == "tucker":
            factors = self._decomposed(experts)(key, stack, exact)
            return Tucker(factors.core, factors.task, factors.out, factors.in_)
        source = stack if exact is None else exact
        shape = source.shape
        with about(key):
            ranks = self.ranks.resolve(source)
        rank = max(1, min(matched_rank(stored(shape, ranks), shape), *stack.shape[1:]))
        parts = experts.svd(stack, rank)
        return LowRank.of((part.u * part.s for part in parts), (part.vh for part in parts))


@contextmanager
def about(key: str) -> Iterator[None]:
    """Says in a UserError which parameter it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"duet: {key}: {error}") from error
