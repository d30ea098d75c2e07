"""Merged: the one result of every method."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from merging.banks import Bank
from merging.checkpoints import Checkpoint, Spec, write_safetensors
from merging.errors import UserError

FORMAT = "duet-merging/1"


@dataclass(frozen=True)
class Routing:
    """How the weights w of the banks come about."""

    router: str  # "oracle": w is one-hot at the true task
    granularity: str = "sample"


@dataclass(frozen=True)
class Merged:
    """W(x) = W_0 + scale * shared + sum_t w_t(x) own_t, every part keyed by parameter; a key without parts stays W_0.

    `scale` None means that the method has no coefficient to choose.
    """

    base: Checkpoint
    tasks: tuple[str, ...]
    specs: Mapping[str, Spec]  # floating parameters in fixed order
    shared: Mapping[str, Tensor] = field(default_factory=dict)  # fp32 changes for every input
    own: Mapping[str, Bank] = field(default_factory=dict)
    routing: Routing | None = None
    scale: float | None = None
    provenance: Mapping[str, object] = field(default_factory=dict)

    def scaled(self, scale: float) -> "Merged":
        """The same merge at another coefficient."""
        return replace(self, scale=scale)

    def weight(self, key: str, gate: Tensor | None = None) -> Tensor:
        """One parameter in fp32, folded; `gate` [T] weighs the banks and may be left out when there are none."""
        weight = self.base.tensor(key).float()
        if key in self.shared:
            weight = torch.add(weight, self.shared[key], alpha=1.0 if self.scale is None else self.scale)
        if key in self.own:
            if gate is None:
                raise UserError(
                    f"{key} depends on the task: give the gate weights, one per task of {', '.join(self.tasks)}."
                )
            weight = weight + self.own[key].mix(gate)
        return weight

    def state(self, gate: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
        """(key, fp32 weight) for every floating parameter, one in memory at a time."""
        for key in self.specs:
            yield key, self.weight(key, gate)

    @property
    def stored_bytes(self) -> int:
        """What must be kept to use the model: one dense backbone as `save` would write it, plus the banks."""
        backbone = sum(spec.bytes for spec in {**self.base.specs(), **self.specs}.values())
        return backbone + sum(bank.bytes for bank in self.own.values())

    def save(self, path: str | Path, **facts: object) -> Path:
        """Write one safetensors file, provenance in its header, tensors in the experts' dtype. Atomic.

        Raises UserError for a merge that depends on the task and for a path that cannot be written.
        """
        if self.own:
            raise UserError(
                f"This merge keeps separate weights for {len(self.tasks)} tasks and cannot be saved as one model."
            )
        specs = {key: self.specs.get(key, spec) for key, spec in sorted(self.base.specs().items())}

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for key, spec in specs.items():
                yield key, self.weight(key).to(spec.dtype) if key in self.specs else self.base.tensor(key)
                self.base.release()

        record = {**self.provenance, "scale": self.scale, "base": self.base.id, "tasks": self.tasks, **facts}
        return write_safetensors(path, specs, tensors(), {"format": FORMAT, "provenance": json.dumps(record)})
