from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from merging.banks import Bank, Dense, LowRank, Rows
from merging.errors import UserError
from merging.experts import Experts
from merging.factors import svd
from merging.merged import Merged, Routing
from merging.methods.method import Method
from merging.methods.task_arithmetic import TaskArithmetic
from merging.ops import generator, kept_energy
from merging.preflight import check_range


@dataclass(frozen=True)
class Twin:
    """Twin-Merging: a shared expert plus what each expert has beyond it, compressed and mixed per input.

    Lu et al., 2024, arXiv 2406.15479. shared: the static method of the shared expert, at its own scale (`base` is the
    ablation "pretrained + dynamic"). keep: share of min(m, n) singular values of W_t - W_shared, at least one, or
    `rank` of them; 1 recovers the experts. sparsify: "svd", or the paper's alternatives "magnitude" and "dropout",
    which keep a share of the entries instead. split_qkv: decompose query, key and value apart. start: the first
    routed block; those before it, and with 0 the patch embedding, stay those of the shared expert; null routes all.
    Vectors are kept whole.
    """

    shared: Method = field(default_factory=TaskArithmetic)
    keep: float = 0.1
    rank: int | None = None
    sparsify: Literal["svd", "magnitude", "dropout"] = "svd"
    split_qkv: bool = True
    start: int | None = 0
    seed: int = 0
    needs: ClassVar[str] = "nothing"
    routed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("twin: keep", self.keep, 0.0, 1.0)
        if self.rank is not None:
            check_range("twin: rank", self.rank, 0, 10**9)
        if self.sparsify not in ("svd", "magnitude", "dropout"):
            raise UserError(f"twin: sparsify={self.sparsify!r} is unknown. Choose svd, magnitude or dropout.")

    def __call__(self, experts: Experts) -> Merged:
        shared = self.shared(experts)
        if shared.own:
            raise UserError("twin: shared must be a static method, one model for all inputs.")
        static = {key: (1.0 if shared.scale is None else shared.scale) * tau for key, tau in shared.shared.items()}
        energy: dict[str, list[float]] = {}
        own: dict[str, Bank] = {}

        def exclusive(key: str, tau: Tensor) -> Tensor:
            beyond = tau - static[key] if key in static else tau
            own[key] = self._bank(key, beyond)
            left = beyond - own[key].mix(torch.eye(len(tau)))
            energy[key] = kept_energy(beyond, left)
            return tau[0, ..., :0]

        routed = [key for key in experts.specs() if self.start is None or self._behind(experts, key)]
        experts.map(exclusive, routed, heavy=True)
        own = {key: own[key] for key in routed}
        return experts.merged(static, None, own, Routing("learned"), energy={key: energy[key] for key in routed})

    def _behind(self, experts: Experts, key: str) -> bool:
        """Whether a parameter lies in a routed block or behind the blocks."""
        depth = experts.naming.depth(key)
        return experts.naming.after(key) if depth is None else depth >= (self.start or 0)

    def _bank(self, key: str, beyond: Tensor) -> Bank:
        if beyond.ndim < 3:
            return Dense(beyond.clone())
        if self.sparsify == "magnitude":
            sizes = beyond.flatten(1).abs()
            cut = sizes.kthvalue(min(max(1, round(sizes.shape[1] * (1 - self.keep))), sizes.shape[1]), 1, True).values
            return Dense(torch.where(sizes > cut, beyond.flatten(1), 0).view_as(beyond))
        if self.sparsify == "dropout":
            rng = generator("twin", self.seed, key)
            kept = torch.rand(beyond.shape, generator=rng) < self.keep
            return Dense(beyond * kept / self.keep if self.keep else beyond * 0)
        matrices = beyond.flatten(2)
        if self.split_qkv and "in_proj" in key and matrices.shape[1] % 3 == 0:
            return Rows([self._low_rank(part, None) for part in matrices.chunk(3, 1)])
        return self._low_rank(matrices, beyond.shape[1:])

    def _low_rank(self, matrices: Tensor, shape: torch.Size | None) -> LowRank:
        full = min(matrices.shape[1:])
        if self.rank is not None and self.rank > full:
            raise UserError(f"twin: rank={self.rank} is above the full rank {full} = min{tuple(matrices.shape[1:])}.")
        rank = self.rank if self.rank is not None else max(1, round(self.keep * full)) if self.keep else 0
        parts = [svd(matrix, rank) for matrix in matrices]
        return LowRank.of(
            torch.stack([part.u * part.s for part in parts]), torch.stack([part.vh for part in parts]), shape
        )
