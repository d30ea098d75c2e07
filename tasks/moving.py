"""A merge inside a tower at one coefficient after the other, without building it anew."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from merging.merged import Merged


@dataclass(frozen=True)
class Moving:
    """W(s) = still + s moves + own of every parameter, in fp32 on one device: two models, and one of a task's parts.

    What all inputs share is rounded to the dtype it is stored in, as in `Merged.static`; too large a number is Inf.
    """

    still: Mapping[str, Tensor]
    moves: Mapping[str, Tensor]
    narrow: Mapping[str, torch.dtype]
    own: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, merged: Merged, place: torch.device) -> "Moving":
        """What all tasks share of a merge."""
        still, moves = {}, {}
        for key in merged.specs:
            stays, moved = merged.pieces(key)
            still[key] = stays.to(place)
            if moved is not None:
                moves[key] = moved.to(place)
        narrow = {key: spec.dtype for key, spec in merged.specs.items() if spec.dtype != torch.float32}
        return cls(still, moves, narrow)

    def with_parts(self, merged: Merged, task: int) -> "Moving":
        """The same with the parts of one task."""
        gate = merged.one_hot(task)
        places = {key: weight.device for key, weight in self.still.items()}
        return replace(self, own={key: delta.mix(gate).to(places[key]) for key, delta in merged.deltas.items()})

    @torch.no_grad()
    def put(self, tower: nn.Module, scale: float) -> None:
        """Write W(scale) into the parameters of a tower."""
        for key, weight in tower.state_dict().items():
            if key not in self.still:
                continue
            if key in self.moves:
                torch.add(self.still[key], self.moves[key], alpha=scale, out=weight)
            else:
                weight.copy_(self.still[key])
            if key in self.narrow:
                weight.copy_(weight.to(self.narrow[key]))
            if key in self.own:
                weight.add_(self.own[key])
