"""A merge inside a tower at one coefficient after the other, without building it anew."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from merging.merged import Merged


@dataclass(frozen=True)
class Moving:
    """W(s) = fixed + s change + delta of every parameter, in fp32 on one device; the delta is that of one task.

    What all inputs share is rounded to the dtype it is stored in, as in `Merged.static`; too large a number is Inf.
    """

    fixed: Mapping[str, Tensor]
    change: Mapping[str, Tensor]
    dtypes: Mapping[str, torch.dtype]
    delta: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, merged: Merged, device: torch.device) -> "Moving":
        """What all tasks share of a merge."""
        pieces = {key: merged.pieces(key) for key in merged.specs}
        fixed = {key: fixed.to(device) for key, (fixed, _) in pieces.items()}
        change = {key: change.to(device) for key, (_, change) in pieces.items() if change is not None and change.any()}
        return cls(fixed, change, {key: spec.dtype for key, spec in merged.specs.items()})

    def with_delta(self, merged: Merged, task: int) -> "Moving":
        """The same with the deltas of one task."""
        gate = merged.one_hot(task)
        deltas = merged.deltas.items()
        return replace(self, delta={key: delta.mix(gate).to(self.fixed[key].device) for key, delta in deltas})

    @torch.no_grad()
    def put(self, tower: nn.Module, scale: float, whole: bool = True) -> None:
        """Write W(scale) into a tower; whole=False: into one that has W of another scale, what the scale changes."""
        for key, weight in tower.state_dict().items():
            if key not in (self.fixed if whole else self.change):
                continue
            if key in self.change:
                torch.add(self.fixed[key], self.change[key], alpha=scale, out=weight)
            else:
                weight.copy_(self.fixed[key])
            if self.dtypes[key] != torch.float32:
                weight.copy_(weight.to(self.dtypes[key]))
            if key in self.delta:
                weight.add_(self.delta[key])
