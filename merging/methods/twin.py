from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from merging.checkpoints.tied import behind
from merging.combined import Changes, mix_of, total
from merging.context import ALONE, Context
from merging.decompose.compressed import Compressed
from merging.deltas import Delta, Dense, LowRank, Rows
from merging.errors import UserError
from merging.experts import Experts
from merging.merged import Merged, Routing
from merging.methods.method import Method, static
from merging.methods.task_arithmetic import TaskArithmetic
from merging.ops import generator, keep_largest
from merging.options import Index, Options, Share
from merging.qkv import cut
from merging.residual import energy_kept


@dataclass(frozen=True)
class Twin(Options):
    """Twin-Merging: a shared expert plus what each expert has beyond it, compressed and mixed per input.

    Lu et al., 2024, arXiv 2406.15479. shared: the static method of the shared expert, at its own scale (`base` is the
    ablation "pretrained + dynamic", `single` "dynamic merging"). keep: of the min(m, n) singular values of
    W_t - W_shared the share nearest to it, at least one (77 of 768, 128 of 1280), or with measure="energy" as few as
    hold that share of the squared norm for every task; `rank` values instead; 0 is none and 1 recovers the experts.
    sparsify: "svd", or the paper's alternatives "magnitude" and "dropout", which keep a share of the entries instead,
    of dropout scaled by 1 / keep. split_qkv: decompose query, key and value apart. start: the first routed block; those
    before it, and with 0 the patch embedding, stay those of the shared expert; null routes all. Vectors are kept whole
    and mixed like the rest, biases too: none comes from the true task's expert, as in the authors' code.
    """

    shared: Method = field(default_factory=TaskArithmetic)
    keep: Share = 0.1
    measure: Literal["values", "energy"] = "values"
    rank: Index | None = None
    sparsify: Literal["svd", "magnitude", "dropout"] = "svd"
    split_qkv: bool = True
    start: int | None = 0
    seed: int = 0
    needs: ClassVar[str] = "nothing"
    routed: ClassVar[bool] = True

    def __call__(self, experts: Experts, context: Context = ALONE) -> Merged:
        """Raises UserError where `shared` is not static or a matrix has fewer singular values than `rank`."""
        return self._around(experts, static(self.shared, experts, context, "twin: shared"))

    def _around(self, experts: Experts, shared: Merged) -> Merged:
        """The merge around a shared expert; at another scale of that one, what lies beyond it is another too."""
        common = total((1.0 if shared.scale is None else shared.scale, shared.shared), (1.0, shared.fixed))
        routed = [key for key in experts.specs() if self.start is None or self._behind(experts, key)]
        parts = experts.in_threads(lambda key: self._beyond(experts, key, common), routed)
        return experts.merged(
            {},
            shared.scale,
            {key: delta for key, (delta, _) in parts.items()},
            Routing("learned") if routed else None,
            fixed=common,
            remarks=shared.remarks,
            energy={key: energy for key, (_, energy) in parts.items()},
            remade=None if shared.scale is None else lambda scale: self._around(experts, shared.scaled(scale)),
        )

    def _beyond(self, experts: Experts, key: str, common: Changes) -> tuple[Delta, list[float]]:
        """What every expert has beyond the shared one, and the share of it that is kept."""
        low_rank = experts.low_rank(key) if self.sparsify == "svd" else None
        mix = mix_of(common, key)
        if low_rank is not None and len(low_rank.shape) >= 2 and (mix or key not in common):
            weights = torch.eye(low_rank.parts) - (mix.weights if mix else 0)
            return self._from_factors(experts, key, low_rank, weights)
        tau = experts.tau(key)
        beyond = tau - common[key] if key in common else tau
        delta = self._delta(experts, key, beyond)
        return delta, energy_kept(beyond, delta)

    def _from_factors(self, experts: Experts, key: str, low_rank: LowRank, mixed: Tensor) -> tuple[Delta, list[float]]:
        """Of combinations mixed [T, T] of task vectors of low rank, without a matrix of their size."""
        blocks, axis = (self.split_qkv and cut(key, low_rank)) or ([low_rank], 0)
        deltas, held, whole = [], torch.zeros(low_rank.parts), torch.zeros(low_rank.parts)
        for block in blocks:
            compressed = Compressed.of(block)
            cores = torch.einsum("ts,spq->tpq", mixed, compressed.core)
            delta, kept = self._truncated(experts, key, cores, tuple(block.shape))
            deltas.append(compressed.lifted(delta))
            held, whole = held + kept, whole + cores.flatten(1).double().square().sum(1)
        energy = torch.where(whole > 0, held / whole.clamp_min(1e-300), 1.0).tolist()
        return deltas[0] if len(deltas) == 1 else Rows(deltas, axis), energy

    def _behind(self, experts: Experts, key: str) -> bool:
        """Whether a parameter lies in a routed block or behind the blocks."""
        depth = experts.param(key).depth
        return behind(experts, key) if depth is None else depth >= (self.start or 0)

    def _delta(self, experts: Experts, key: str, beyond: Tensor) -> Delta:
        if beyond.ndim < 3:
            return Dense(beyond.clone())
        if self.sparsify == "magnitude":
            return Dense(self._largest(beyond))
        if self.sparsify == "dropout":
            name = experts.tied.get(key, key)  # tied weights stay tied
            return Dense(torch.stack([self._dropped(*pair, name) for pair in zip(beyond, experts.tasks, strict=True)]))
        matrices = beyond.flatten(2)
        if self.split_qkv and (blocks := cut(key, matrices)):
            return Rows([self._low_rank(experts, key, block, None) for block in blocks[0]], blocks[1])
        return self._low_rank(experts, key, matrices, beyond.shape[1:])

    def _largest(self, beyond: Tensor) -> Tensor:
        """Each task's round(keep size) entries of largest magnitude; of equals the first."""
        rows, count = beyond.flatten(1).clone(), round(self.keep * beyond[0].numel())
        if 0 < count < rows.shape[1]:
            keep_largest(rows, count)
        return (rows if count else rows * 0).view_as(beyond)

    def _dropped(self, change: Tensor, task: str, key: str) -> Tensor:
        """Every entry kept with probability `keep` and scaled by its inverse."""
        kept = torch.rand(change.shape, generator=generator("twin", self.seed, key, task)) < self.keep
        return change * kept / self.keep if self.keep else change * 0

    def _low_rank(self, experts: Experts, key: str, matrices: Tensor, shape: torch.Size | None) -> LowRank:
        return self._truncated(experts, key, matrices, tuple(matrices.shape[1:]), shape)[0]

    def _truncated(
        self, experts: Experts, key: str, matrices: Tensor, sides: tuple[int, ...], shape: torch.Size | None = None
    ) -> tuple[LowRank, Tensor]:
        """The leading triplets of matrices that stand for such of these sides, and their squared norms [T], fp64."""
        full = min(sides)
        if self.rank is not None and self.rank > full:
            raise UserError(f"twin: rank={self.rank} is above the full rank of {key}, {full} = min{sides}.")
        rank = self.rank if self.rank is not None else max(1, round(self.keep * full)) if self.keep else 0
        by_energy = self.rank is None and self.measure == "energy"
        parts = experts.svd(matrices, full if by_energy else rank, kept=False)
        values = torch.stack([part.s for part in parts])
        rank = min(fewest(values, self.keep) if by_energy else rank, values.shape[1])
        ups = [(part.u * part.s)[:, :rank] for part in parts]
        kept = values[:, :rank].double().square().sum(1)
        return LowRank.of(ups, [part.vh[:rank] for part in parts], shape), kept


def fewest(values: Tensor, share: float) -> int:
    """How many of the singular values [T, k] hold that share of the energy of every row; 0 for share 0."""
    energy = values.double().square()
    held, total = energy.cumsum(1), energy.sum(1, keepdim=True)
    return int((held < share * total * (1 - 1e-12)).sum(1).max()) + 1 if share and bool(total.any()) else 0
