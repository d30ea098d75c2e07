import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from merging.checkpoints import SafetensorsFile
from merging.decompose.svd import svd
from merging.errors import UserError
from merging.experts import Experts
from merging.interference import Matrices
from merging.merged import Merged
from merging.ops import generator
from merging.options import Options, Share
from merging.preflight import check_order


@dataclass(frozen=True)
class Opcm(Options):
    """OPCM: experts arrive one after the other; each adds what lies outside the leading directions of the merge so far.

    Tang et al., 2025, arXiv 2501.09522. With U S V^T of the merged change, tau_t loses its block between the first rho
    directions of either side, rho being the index at which the share of singular values exceeds `alpha`; the sum is
    scaled to the mean norm of the task vectors. Two models are in memory, whatever T. zero_diagonal: drop u_i^T tau_t
    v_i too, up to the numerical rank; the published numbers were made without, as the authors' line had no effect.
    order: of the tasks; null shuffles them by `seed`, as published. matrices: "linear", those of attention and FFNs, or
    "all"; what else there is, is added up (of Hugging Face's class embedding the authors' code keeps the first alone).
    continues: the expert that is a merge of this method, saved as one file: it comes first, with all it stands for.
    """

    alpha: Share = 0.5
    zero_diagonal: bool = False
    order: Sequence[str] | None = None
    seed: int = 0
    matrices: Matrices = "linear"
    continues: str | None = None
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts) -> Merged:
        """Raises UserError for an order of other tasks, and for a merge of another base or method to continue."""
        shapes = {key: spec.shape for key, spec in experts.specs().items()}
        total = {key: torch.zeros(shape) for key, shape in shapes.items()}
        norms: list[float] = []
        for task in self.ordered(experts.tasks):
            count, weight = self._record(experts) if task == self.continues else (1, 1.0)

            def add(key: str, index: int = experts.tasks.index(task), weight: float = weight) -> float:
                tau = experts.task_vector(key, index)
                total[key] += weight * self._cleaned(experts, key, total[key], tau)
                return float(tau.double().square().sum())

            norms += [sum(experts.in_threads(add).values()) ** 0.5] * count
        mean, norm = sum(norms) / len(norms), sum(float(change.double().square().sum()) for change in total.values())
        weight = norm**0.5 / mean if mean > 0 and norm > 0 else 1.0
        done = {"experts": len(norms), "weight": weight}
        return experts.merged({key: change / weight for key, change in total.items()}, provenance={"opcm": done})

    def ordered(self, tasks: Sequence[str]) -> list[str]:
        """Tasks as they arrive."""
        if self.continues is not None and self.continues not in tasks:
            raise UserError(f"opcm: continues={self.continues!r} is no expert. There are {', '.join(tasks)}.")
        names = sorted(tasks)
        if self.order is None:
            shuffled = torch.randperm(len(names), generator=generator("opcm", self.seed)).tolist()
            order = [names[index] for index in shuffled]
        else:
            check_order("opcm", self.order, tasks)
            order = list(self.order)
        return sorted(order, key=lambda task: task != self.continues)

    def _cleaned(self, experts: Experts, key: str, merged: Tensor, tau: Tensor) -> Tensor:
        """tau [m, n] without what the merge so far occupies."""
        linear = self.matrices == "all" or experts.param(key).family in ("ffn", "attention")
        if tau.ndim != 2 or not linear or not merged.any():
            return tau
        u, s, vh = svd(merged.to(experts.device))
        rho = int((s.cumsum(0) / s.sum() > self.alpha).float().argmax())
        change = tau.to(u)
        core = u.T @ change @ vh.T
        lost = u[:, :rho] @ core[:rho, :rho] @ vh[:rho]
        if self.zero_diagonal:
            lost = lost + (u[:, rho:] * core.diagonal()[rho:]) @ vh[rho:]
        return (change - lost).cpu()

    def _record(self, experts: Experts) -> tuple[int, float]:
        """How many experts the merge to continue holds, and by how much it was scaled down."""
        checkpoint = experts.checkpoints[experts.tasks.index(str(self.continues))]
        file = checkpoint.files[0] if checkpoint.files else None
        header = SafetensorsFile(file).metadata if file is not None and file.suffix == ".safetensors" else {}
        record = json.loads(header.get("provenance", "{}"))
        if "opcm" not in record:
            raise UserError(f"opcm: {checkpoint.name} is no merge of this method in one file. Leave out continues.")
        if record["base"] != experts.origin.id:
            raise UserError(
                f"opcm: {checkpoint.name} was merged from another base than {experts.origin.name}. Give its own base."
            )
        return record["opcm"]["experts"], record["opcm"]["weight"]
