"""A merge as one safetensors file: dense weights under their own names, banks under own/, gates under gate/."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from merging.bank import identity
from merging.banks import rebuild
from merging.checkpoints import SafetensorsFile, Spec, write_safetensors
from merging.errors import UserError
from merging.routers import Gate, GateShape

if TYPE_CHECKING:
    from merging.merged import Merged

FORMAT = "duet-merging/1"
OWN, GATE = "own/", "gate/"


def write(merged: "Merged", path: str | Path, **facts: object) -> Path:
    """Write `merged`, provenance and `facts` in the header. Atomic.

    A static merge keeps the experts' dtype. Beside banks the dense part is fp32: what is loaded computes the same bits.
    Raises UserError for a path that cannot be written.
    """
    kept = {key: merged.specs.get(key, spec) for key, spec in sorted(merged.base.specs().items())}
    if merged.own:
        kept |= {key: Spec(spec.shape, torch.float32) for key, spec in merged.specs.items()}
    extra, same = _once(dict(_extra(merged)))
    specs = kept | {key: Spec(tensor.shape, tensor.dtype) for key, tensor in extra.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for key, spec in kept.items():
            yield key, merged.static(key).to(spec.dtype) if key in merged.specs else merged.base.tensor(key)
            merged.base.release()
        yield from extra.items()

    record = {**merged.provenance, "scale": merged.scale, "base": merged.base.id, "tasks": merged.tasks, **facts}
    header = {"format": FORMAT, "provenance": json.dumps(record)}
    if merged.own:
        header["same"] = json.dumps(same)
        header["banks"] = json.dumps({key: bank.stored().facts() for key, bank in merged.own.items()})
        header["routing"] = json.dumps(_routing_facts(merged))
    return write_safetensors(path, specs, tensors(), header)


def _extra(merged: "Merged") -> Iterator[tuple[str, Tensor]]:
    for key, bank in merged.own.items():
        yield from ((f"{OWN}{key}/{name}", tensor) for name, tensor in bank.stored().named_buffers())
    gates = merged.routing.gates if merged.routing is not None else None
    if gates is not None:
        yield from ((f"{GATE}{name}", tensor) for name, tensor in gates.state_dict().items())


def _once(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors without those that have two names, and for each further name the first."""
    first: dict[Any, str] = {}
    names = {name: first.setdefault(identity(tensor), name) for name, tensor in named.items() if tensor.numel()}
    same = {name: known for name, known in names.items() if known != name}
    return {name: tensor for name, tensor in named.items() if name not in same}, same


def _routing_facts(merged: "Merged") -> dict[str, Any] | None:
    routing = merged.routing
    if routing is None:
        return None
    plain = {name: getattr(routing, name) for name in ("router", "granularity", "init", "gate_rank", "top_k")}
    gate = None if routing.gate is None else routing.gate.facts()
    return plain | {"adaptation": routing.adaptation, "gate": gate, "gates": len(routing.gates or ())}


def read(path: str | Path) -> "Merged":
    """A saved merge with its banks and trained gates. Raises UserError for a file that is none, or is damaged."""
    file = SafetensorsFile(path)
    if file.metadata.get("format") != FORMAT:
        raise UserError(f"{path} was not written by this library ({FORMAT}). Load plain weights with safetensors.")
    try:
        return _read(file)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is damaged: its header does not fit its tensors ({reason}). Copy or save it again."
        ) from error


def _read(file: SafetensorsFile) -> "Merged":
    from merging.merged import Merged, Routing

    record = json.loads(file.metadata["provenance"])
    tasks = tuple(record.get("tasks", ()))
    specs = {key: spec for key, spec in file.specs().items() if not key.startswith((OWN, GATE))}
    floating = {key: spec for key, spec in specs.items() if spec.dtype.is_floating_point}
    merged = Merged(_Dense(file, specs), tasks, floating, provenance=record)
    if "banks" not in file.metadata:
        return merged
    extra = {key: file.tensor(key).clone() for key in file.specs() if key.startswith((OWN, GATE))}
    extra |= {key: extra[known] for key, known in json.loads(file.metadata.get("same", "{}")).items()}
    banks = json.loads(file.metadata["banks"])
    own = {key: rebuild(facts, _below(extra, f"{OWN}{key}/")) for key, facts in banks.items()}
    routing = json.loads(file.metadata["routing"])
    if routing is not None:
        shape = GateShape(**routing["gate"]) if routing["gate"] is not None else None
        gates = rebuilt_gates(_below(extra, GATE), shape, routing["gates"], next(iter(own.values())).parts)
        routing = Routing(**routing | {"gate": shape, "gates": gates})
    return replace(merged, own=own, routing=routing)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def rebuilt_gates(
    tensors: Mapping[str, Tensor], shape: GateShape | None, count: int, parts: int
) -> nn.ModuleList | None:
    """Gates from their state dict, None for none."""
    if shape is None or not count:
        return None
    width = tensors["0.mean"].shape[0] // (2 if shape.features == "mean_std" else 1)
    gates = nn.ModuleList([Gate(width, parts, shape) for _ in range(count)])
    gates.load_state_dict(dict(tensors))
    return gates.eval().requires_grad_(False)


class _Dense:
    """The dense tensors of a saved merge as a checkpoint."""

    def __init__(self, file: SafetensorsFile, specs: Mapping[str, Spec]):
        self._file, self._specs = file, specs

    @property
    def name(self) -> str:
        return self._file.name

    @property
    def id(self) -> str:
        return self._file.id

    def specs(self) -> Mapping[str, Spec]:
        return self._specs

    def tensor(self, key: str) -> Tensor:
        return self._file.tensor(key).clone()  # what is loaded does not hang on its file

    def release(self) -> None:
        self._file.release()
