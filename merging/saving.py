"""A merge as one safetensors file: dense weights by their names; deltas, gates, heads, corrections, packed weights
below own/, gate/, head/, behind/, packed/.

As a folder of Hugging Face: see merging.saving_folder.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from merging.checkpoints import Checkpoint, Known, SafetensorsFile, Spec
from merging.checkpoints.safetensors_file import write_safetensors
from merging.checkpoints.views import View, selected
from merging.correction import corrections_from
from merging.deltas import Delta, below, identity, rebuild
from merging.errors import UserError
from merging.files import check_room
from merging.ops import BLOCK
from merging.packed import named, rebuilt, told
from merging.routing.gates import WIDTHS, Gate, GateShape
from merging.threads import in_order

if TYPE_CHECKING:
    from merging.merged import Merged

NAME, VERSION = "duet-merging", 4  # 1: dense in fp32, no compressed deltas; 2: other names in Rows; 3: nothing of 4
OWN, GATE, HEAD, BEHIND, PACKED = PREFIXES = "own/", "gate/", "head/", "behind/", "packed/"  # behind, packed: since 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # that a dense part may be saved in


def dtype_of(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype by its name. Raises UserError for one that no merge is saved in."""
    named = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if named not in DTYPES.values():
        raise UserError(f"dtype={dtype} is none that a merge is saved in. Choose one of {', '.join(DTYPES)}.")
    return named  # type: ignore[return-value]


def rounded(key: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`. Raises UserError where a finite number becomes infinite."""
    cast = weight.to(dtype)
    if dtype.itemsize >= weight.dtype.itemsize or cast.sum().isfinite():  # to look at every number costs more
        return cast
    if not cast.isfinite().all() and weight.isfinite().all():
        raise UserError(
            f"{key} has numbers up to {weight.abs().max():.4g}, beyond the largest of {str(dtype)[6:]}, "
            f"{torch.finfo(dtype).max:.4g}: saved so it would hold infinity. Save it wider, with save_dtype=bf16 or "
            f"fp32 on the command line and dtype='bf16' or 'fp32' in the library."
        )
    return cast


def is_folder(path: str | Path) -> bool:
    """Whether a path is to become a folder: it ends in / or is one. `*.safetensors` is a file.

    Raises UserError for a new path that may be meant as either, and for none.
    """
    if not str(path):
        raise UserError("There is no path to save to. Name a file, <name>.safetensors, or a folder, <name>/.")
    if str(path).endswith(("/", os.sep)) or Path(path).is_dir():
        return True
    if Path(path).suffix != ".safetensors" and not Path(path).exists():
        raise UserError(
            f"{path} may be meant as a file or as a folder. Write {path}/ for a folder that Hugging Face's libraries "
            f"load, or {path}.safetensors for one file."
        )
    return False


def check_target(path: str | Path, inputs: Iterable[Checkpoint | Known]) -> None:
    """Raises UserError for a path that is a file or a folder that a merge is made from, by whatever name."""
    path = Path(path)
    for file in (file for checkpoint in inputs for file in checkpoint.files):
        if any(path.exists() and taken.exists() and path.samefile(taken) for taken in (file, file.parent)):
            raise UserError(
                f"{path} is one of the inputs ({file}): the result would overwrite it. Choose another name."
            )


def write(merged: "Merged", path: str | Path, **facts: object) -> Path:
    """Write `merged`, provenance and `facts` in the header. Atomic.

    Every tensor keeps its dtype: what is loaded computes the bits of what was merged, and the tensors take
    `merged.stored_bytes`. Raises UserError for a path that cannot be written or is an input, and for a number that its
    dtype has not.
    """
    inputs = (merged.base, *merged.inputs)
    check_target(path, inputs)
    extra, about = beside(merged)
    whole = {key: spec for key, spec in dense_specs(merged).items() if key not in merged.packed}
    if merged.packed:
        extra |= named(merged.packed, PACKED)
        about["packed"] = told(merged.packed, merged.specs)
    specs = whole | specs_of(extra)
    check_room(path, sum(spec.bytes for spec in specs.values()))

    def header(ids: Sequence[str]) -> dict[str, str]:
        return about | {"provenance": json.dumps(record(merged, ids, facts))}

    draft = header(["0" * 64 if isinstance(checkpoint, SafetensorsFile) else checkpoint.id for checkpoint in inputs])
    tensors = chain(dense(merged, whole), extra.items())
    return write_safetensors(path, specs, tensors, draft, lambda: header(ids_of(inputs)))


def dense_specs(merged: "Merged") -> dict[str, Spec]:
    """What all inputs share, as it is stored: merged parameters, and the base's counters."""
    return {key: merged.specs.get(key, spec) for key, spec in sorted(merged.base.specs().items())}


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    """Shapes and dtypes of tensors in memory."""
    return {key: Spec(tensor.shape, tensor.dtype) for key, tensor in tensors.items()}


def record(merged: "Merged", ids: Sequence[str], facts: Mapping[str, object]) -> dict[str, Any]:
    """Where a merge came from, as JSON; ids: of the base and of the experts."""
    known = {**merged.provenance, "scale": merged.scale, "base": ids[0], "tasks": merged.tasks, **facts}
    return known | ({"experts": list(ids[1:])} if merged.inputs else {})


def beside(merged: "Merged") -> tuple[dict[str, Tensor], dict[str, str]]:
    """What is stored beside the dense weights, deltas, gates, heads, corrections, and what a header says of them."""
    deltas = {key: delta.stored() for key, delta in merged.deltas.items()}
    extra, same = _once(dict(_extra(merged, deltas)))
    about = {"format": f"{NAME}/{VERSION if merged.corrections or merged.packed else 3}", "written_by": written_by()}
    about |= {"same": json.dumps(same)} if same or merged.deltas else {}
    if merged.deltas:
        about["banks"] = json.dumps({key: delta.facts() for key, delta in deltas.items()})
        about["routing"] = json.dumps(_routing_facts(merged))
    return extra, about


def dense(merged: "Merged", specs: Mapping[str, Spec]) -> Iterator[tuple[str, Iterable[Tensor]]]:
    """These tensors of what all inputs share, as they are stored, each in flat pieces; all cores work at once."""

    def block(start: tuple[str, int]) -> tuple[str, Tensor]:
        key, first = start
        return key, merged.block(key, first) if key in merged.specs else merged.base.tensor(key)

    sizes = {key: spec.shape.numel() if key in merged.specs else 1 for key, spec in specs.items()}
    starts = ((key, first) for key, size in sizes.items() for first in range(0, max(1, size), BLOCK))
    for key, pieces in groupby(in_order(block, starts), itemgetter(0)):
        yield key, map(itemgetter(1), pieces)


def ids_of(inputs: Sequence[Checkpoint | Known]) -> list[str]:
    """Their ids, asked for in reverse: a thread that computes them ahead comes from the front."""
    return [checkpoint.id for checkpoint in reversed(inputs)][::-1]


def written_by() -> str:
    """This library and its version, which a reader of an earlier one names."""
    try:
        return f"{NAME} {version(NAME)}"
    except PackageNotFoundError:
        return NAME


def _extra(merged: "Merged", deltas: Mapping[str, Delta]) -> Iterator[tuple[str, Tensor]]:
    for key, delta in deltas.items():
        yield from ((f"{OWN}{key}/{name}", tensor) for name, tensor in delta.named_buffers())
    for task, head in merged.heads.items():
        yield from ((f"{HEAD}{task}/{key}", tensor) for key, tensor in head.items())
    for task, correction in merged.corrections.items():
        yield from ((f"{BEHIND}{task}/{name}", tensor) for name, tensor in correction.state_dict().items())
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
    """A saved merge, a file or a folder, with its deltas and trained gates.

    Raises UserError for a file that is none, is damaged, or of a later format than this library knows.
    """
    from merging.saving_folder import heads_of, opened

    if Path(path).is_dir():
        (file, shared), heads = opened(Path(path)), heads_of(Path(path))
    else:
        file = shared = SafetensorsFile(path)
        heads = None
    check_format(path, file.metadata)
    try:
        return _read(file, shared, heads)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is damaged: its header does not fit its tensors ({reason}). Copy or save it again."
        ) from error


def check_format(path: str | Path, header: Mapping[str, str]) -> None:
    """Raises UserError for the header of a file that is no merge, or one of a later format."""
    name, _, number = str(header.get("format", "")).partition("/")
    if name != NAME or not number.isdecimal():
        raise UserError(
            f"{path} was not written by this library: its header names no format {NAME}/{VERSION}. Load plain weights "
            f"with safetensors."
        )
    if int(number) > VERSION:
        by = header.get("written_by", f"a later version of {NAME}")
        raise UserError(
            f"{path} is of format {NAME}/{number}, written by {by}; this is {written_by()}, which reads formats up to "
            f"{VERSION}. Update it to read the file: pip install -U {NAME}."
        )


def _read(file: SafetensorsFile, shared: Checkpoint, heads: Mapping[str, Mapping[str, Tensor]] | None) -> "Merged":
    """Of the file with header, deltas and gates, and the checkpoint with what all inputs share.

    heads: of a folder; those of a file are in it.
    """
    from merging.merged import Merged, Routing

    record = json.loads(file.metadata["provenance"])
    tasks = tuple(record.get("tasks", ()))
    extra = {key: file.tensor(key).clone() for key in file.specs() if key.startswith(PREFIXES)}
    extra |= {key: extra[known] for key, known in json.loads(file.metadata.get("same", "{}")).items()}
    specs = {key: spec for key, spec in shared.specs().items() if not key.startswith(PREFIXES)}
    if heads is None:
        heads = {task: head for task in tasks if (head := below(extra, f"{HEAD}{task}/"))}
    else:  # a single one is among the weights too
        inside = {key for head in heads.values() for key in head}
        specs = {key: spec for key, spec in specs.items() if key not in inside}
    packed, opened_as = rebuilt(file.metadata.get("packed", "{}"), below(extra, PACKED))
    floating = dict(sorted({**{key: spec for key, spec in specs.items() if spec.merged}, **opened_as}.items()))
    dense = _Dense(selected(shared, specs).pieces, *dict.fromkeys((shared, file)))
    corrections, known = corrections_from(below(extra, BEHIND)), {"provenance": record, "heads": heads}
    merged = Merged(dense, tasks, floating, **known, packed=packed, corrections=corrections)
    if "banks" not in file.metadata:
        return replace(merged, routing=Routing("oracle")) if corrections else merged
    facts = json.loads(file.metadata["banks"])  # named so in all formats
    deltas = {key: rebuild(fact, below(extra, f"{OWN}{key}/")) for key, fact in facts.items()}
    routing = json.loads(file.metadata["routing"])
    if routing is not None:
        shape = GateShape(**routing["gate"]) if routing["gate"] is not None else None
        check_choice(file, shape)
        gates = rebuilt_gates(below(extra, GATE), shape, routing["gates"], next(iter(deltas.values())).parts)
        routing = Routing(**routing | {"gate": shape, "gates": gates})
    return replace(merged, deltas=deltas, routing=routing)


def check_choice(file: SafetensorsFile, shape: GateShape | None) -> None:
    """Raises UserError for gates of format 1 that chose the largest weights before they averaged: now it is after."""
    if shape is None or file.metadata["format"] != f"{NAME}/1":
        return
    averaged = shape.pool == "after" or shape.granularity in ("batch", "mixed", "group")
    if shape.activation == "soft_top_k" or (averaged and shape.top_k is not None):
        raise UserError(
            f"{file.name} is of format {NAME}/1, whose gates chose the largest weights of every token or sample and "
            f"averaged them; now the average is taken first, as published, and this file would answer otherwise than "
            f"when it was saved. Merge and train it again."
        )


def rebuilt_gates(
    tensors: Mapping[str, Tensor], shape: GateShape | None, count: int, parts: int
) -> nn.ModuleList | None:
    """Gates from their state dict, None for none."""
    if shape is None or not count:
        return None
    width = tensors["0.mean"].shape[0] // WIDTHS[shape.features]
    gates = nn.ModuleList([Gate(width, parts, shape) for _ in range(count)])
    gates.load_state_dict(dict(tensors))
    return gates.eval().requires_grad_(False)


class _Dense(View):
    """The dense tensors of a saved merge; what is loaded does not hang on its file."""

    def tensor(self, key: str) -> Tensor:
        return super().tensor(key).clone()
