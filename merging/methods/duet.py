from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from merging.banks import Bank, Dense, LowRank, Tucker
from merging.cache import key_of
from merging.errors import UserError
from merging.experts import Experts
from merging.merged import Merged, Routing
from merging.methods.method import Method
from merging.methods.task_arithmetic import TaskArithmetic
from merging.neurons import Masks, Neurons
from merging.ops import kept_energy
from merging.preflight import check_range
from merging.tucker import Ranks, matched_rank, stored, tucker


@dataclass(frozen=True)
class Duet:
    """DuetMerging: shared-factor Tucker changes of the FFNs, routed per input, plus a static correction. CVPR 2026.

    Every FFN matrix of all tasks is one tensor [T, m, n]; its Tucker decomposition is mixed by the gate. Of the
    residual of each task only the hidden neurons that its expert lives on are kept; the average over
    tasks is folded into the weights. The rest of the network is merged by `rest`.

    routes: "ffn" as published; "all" routes attention and the last projection in the same form, and norms and biases
    whole. ranks: see Ranks. factors: "tucker", or "svd", one truncated decomposition per task at the same number of
    stored parameters (the ablation). static: False is the ablation "dynamic only". neurons: which are kept, and how
    they are scaled. average: over "all" tasks, or over those that kept a neuron ("kept"). static_coef: 0 is no
    correction. bias: "dynamic" (exact), "rest" or "base". init: weight of every task before the gates are trained.
    rest: any static method, with a scale of its own.
    """

    routes: Literal["ffn", "all"] = "ffn"
    ranks: Ranks = field(default_factory=lambda: Ranks("fraction", 0.2))
    factors: Literal["tucker", "svd"] = "tucker"
    engine: str = "hooi"
    static: bool = True
    neurons: Neurons = field(default_factory=Neurons)
    average: Literal["all", "kept"] = "all"
    static_coef: float = 1.0
    bias: Literal["dynamic", "rest", "base"] = "dynamic"
    init: float = 0.3
    rest: Method = field(default_factory=TaskArithmetic)
    needs: ClassVar[str] = "inputs"
    routed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        known = {"routes": ("ffn", "all"), "factors": ("tucker", "svd"), "average": ("all", "kept"),
                 "bias": ("dynamic", "rest", "base"), "engine": ("hooi", "st_hosvd", "hosvd", "tensorly")}  # fmt: skip
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise UserError(f"duet: {name}={getattr(self, name)!r} is unknown. Choose one of {', '.join(values)}.")
        check_range("duet: static_coef", self.static_coef, -100.0, 100.0)

    def __call__(self, experts: Experts) -> Merged:
        routed = [key for key in experts.specs() if self._routed(experts, key)]
        kept = () if self.bias == "rest" else experts.keys("ffn")
        rest = self.rest(experts.part(set(experts.specs()) - set(routed) - set(kept)))
        masks: Masks = self.neurons.masks(experts) if self.static else {}
        own, fixed, energy = {}, {}, {}

        def decompose(key: str, tau: Tensor) -> Tensor:
            own[key] = bank = self._bank(experts, key, tau)
            if tau.ndim == 3:
                residual = tau - bank.mix(torch.eye(len(tau)))
                energy[key] = kept_energy(tau, residual)
                axis, block = experts.naming.hidden(key), experts.naming.depth(key)
                if axis is not None and block is not None and block in masks:
                    fixed[key] = self._correction(residual, masks[block], axis)
            return tau[0, ..., :0]

        experts.map(decompose, routed, heavy=True)
        inorder = lambda found: {key: found[key] for key in routed if key in found}  # noqa: E731
        return experts.merged(
            rest.shared, rest.scale, inorder(own), Routing("learned", init=self.init),
            fixed=inorder(fixed), energy=inorder(energy),
        )  # fmt: skip

    def _routed(self, experts: Experts, key: str) -> bool:
        kind, matrix = experts.naming.kind(key), len(experts.specs()[key].shape) > 1
        if kind == "ffn":
            return matrix or self.bias == "dynamic"
        if self.routes == "ffn":
            return False
        inside = experts.naming.depth(key) is not None or experts.naming.after(key)
        return inside and (matrix or self.bias == "dynamic")

    def _bank(self, experts: Experts, key: str, tau: Tensor) -> Bank:
        if tau.ndim != 3:
            return Dense(tau.clone())
        ranks = self.ranks.resolve(tau)
        if self.factors == "svd":
            rank = max(1, min(matched_rank(stored(tau.shape, ranks), tau.shape), min(tau.shape[1:])))
            parts = experts.svd(key, tau, rank)
            return LowRank.of(
                torch.stack([part.u * part.s for part in parts]), torch.stack([part.vh for part in parts])
            )

        def make() -> dict[str, Tensor]:
            found = tucker(tau, ranks, engine=self.engine)
            return {"core": found.core, "task": found.task, "out": found.out, "into": found.in_}

        if experts.cache is None:
            return Tucker(**make())  # type: ignore[arg-type]
        ids = [each.id for each in experts.checkpoints]
        return Tucker(**experts.cache.tensors(key_of("tucker", key, experts.origin.id, ids, ranks, self.engine), make))

    def _correction(self, residual: Tensor, mask: Tensor, axis: int) -> Tensor:
        """The static change [m, n] from the residuals [T, m, n] of all tasks."""
        total = self.neurons.apply(residual, mask, axis).sum(0)
        if self.average == "all":
            return self.static_coef * total / len(residual)
        keepers = mask.sum(0).clamp_min(1)
        return self.static_coef * total / (keepers[:, None] if axis == 0 else keepers)
