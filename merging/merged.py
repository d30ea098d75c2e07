"""Merged: the one result of every method."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from merging import saving
from merging.checkpoints import Checkpoint, Known, Spec
from merging.combined import chosen, spans
from merging.correction import Corrections
from merging.deltas import Delta, repeated
from merging.errors import UserError
from merging.ops import BLOCK, SPAN
from merging.owned import check_shared
from merging.packed import Packed
from merging.routing.gates import GateShape


@dataclass(frozen=True)
class Routing:
    """How the weights w of the deltas come about."""

    router: str  # oracle: w is one-hot at the true task; subspace: SMILE; learned: not trained yet; or what trained it
    granularity: str = "sample"
    init: float = 0.0  # weight of every part before training, and what a part without a gate keeps
    gate: GateShape | None = None  # of a trained router
    gates: nn.ModuleList | None = None  # one for the model, or one per routed block unless shared
    gate_rank: int = 0  # subspace: directions a part is recognised by
    top_k: int | None = None  # subspace: parts kept per token
    adaptation: str | None = None  # the split whose unlabelled images trained it

    @property
    def by_task(self) -> bool:
        """Whether the true task chooses: by intention, or because the gates are still to be trained."""
        return self.router in ("oracle", "learned")

    @property
    def params(self) -> int:
        """Numbers stored for the gates."""
        return 0 if self.gates is None else sum(tensor.numel() for tensor in self.gates.state_dict().values())

    @property
    def bytes(self) -> int:
        """Bytes stored for the gates."""
        return 0 if self.gates is None else sum(tensor.nbytes for tensor in self.gates.state_dict().values())


@dataclass(frozen=True)
class Merged:
    """W(x) = W_0 + fixed + scale * shared + sum_t w_t(x) delta_t, keyed by parameter; a key without parts stays W_0.

    `scale` None means that the method has no coefficient to choose. What all inputs share is rounded to the dtype of
    its spec, as it is stored: what is scored is what is saved. Deltas and gates have dtypes of their own.
    """

    base: Checkpoint
    tasks: tuple[str, ...]
    specs: Mapping[str, Spec]  # floating parameters in fixed order
    shared: Mapping[str, Tensor] = field(default_factory=dict)  # fp32 changes for every input
    deltas: Mapping[str, Delta] = field(default_factory=dict)
    routing: Routing | None = None
    scale: float | None = None
    provenance: Mapping[str, object] = field(default_factory=dict)
    fixed: Mapping[str, Tensor] = field(default_factory=dict)  # fp32 changes that the scale leaves alone
    energy: Mapping[str, Sequence[float]] = field(
        default_factory=dict
    )  # key -> share of ||tau_t||^2 that delta_t holds
    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # of tasks whose experts came with one
    owned: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # task -> changes of what it does not share
    inputs: tuple[Checkpoint | Known, ...] = ()  # the experts in task order; none where they are not known
    remarks: tuple[str, ...] = ()  # what a reader of its scores should know
    remade: Callable[[float], "Merged"] | None = None  # the merge at another coefficient, if more than `shared` follows
    corrections: Corrections = field(default_factory=dict)  # task -> what is done to its features in front of its head
    packed: Mapping[str, Packed] = field(default_factory=dict)  # parameters that are held in a few bits, as they are

    @property
    def is_static(self) -> bool:
        """Whether it is one model for all inputs and tasks."""
        return not self.deltas and not self.corrections

    @property
    def parts(self) -> int:
        """How many weights a gate gives: one per task, unless the deltas are finer."""
        return next((delta.parts for delta in self.deltas.values()), len(self.tasks))

    def scaled(self, scale: float) -> "Merged":
        """The same merge at another coefficient."""
        if self.remade is None:
            return replace(self, scale=scale)
        return replace(self.remade(scale), provenance=self.provenance, inputs=self.inputs, heads=self.heads)

    def cast(self, dtype: "str | torch.dtype") -> "Merged":
        """The same merge with what all inputs share in another dtype (fp32, bf16, fp16); deltas stay as they are."""
        cast, remade = saving.dtype_of(dtype), self.remade
        specs = {key: Spec(spec.shape, cast) for key, spec in self.specs.items()}
        return replace(self, specs=specs, remade=remade and (lambda scale: remade(scale).cast(cast)))

    def holding(self, packed: Mapping[str, Packed]) -> "Merged":
        """The same merge with these parameters held in a few bits, which no coefficient moves any more."""
        shared, fixed = (
            chosen(changes, {key: 1.0 for key in changes if key not in packed}) for changes in (self.shared, self.fixed)
        )
        return replace(self, shared=shared, fixed=fixed, packed=packed, remade=None)

    def of(self, task: str) -> "Merged":
        """The merge as it answers for a task: with the parameters that belong to it, where any do.

        Raises UserError for a task whose parameters are not there.
        """
        if not self.owned:
            return self
        if task not in self.owned:
            raise UserError(
                f"Every task has biases of its own here (owned=heads+biases), and {task} has no expert to take them "
                f"from. Leave the task out, or choose owned=heads."
            )
        changes, remade = {**self.fixed, **self.owned[task]}, self.remade
        return replace(self, fixed=changes, owned={}, remade=remade and (lambda scale: remade(scale).of(task)))

    def static(self, key: str) -> Tensor:
        """What all inputs share of one parameter, in fp32, rounded to the dtype it is stored in.

        Raises UserError for a finite number that this dtype has not.
        """
        weight = self.unrounded(key)
        return weight if key not in self.specs else saving.rounded(key, weight, self.specs[key].dtype).float()

    def unrounded(self, key: str) -> Tensor:
        """As `static`, as computed."""
        weight, moves = self.pieces(key)
        return weight if moves is None else torch.add(weight, moves, alpha=1.0 if self.scale is None else self.scale)

    def block(self, key: str, first: int) -> Tensor:
        """As `static`, in the dtype it is stored in: the entries [n] of one parameter from `first` on, a multiple of
        BLOCK, and at most as many."""
        shape, dtype = self.specs[key]
        last = min(first + BLOCK, shape.numel())
        if key in self.packed:
            return saving.rounded(key, self.packed[key].entries(first, last), dtype)
        base, scale = self.base.flat(key), 1.0 if self.scale is None else self.scale
        block = torch.empty(last - first, dtype=dtype)
        fixed, shared = (spans(changes, key, first, last) for changes in (self.fixed, self.shared))
        for start in range(first, last, SPAN):
            stop = min(start + SPAN, last)
            weight = base[start:stop].float()
            weight = weight if fixed is None else weight + next(fixed)
            weight = weight if shared is None else torch.add(weight, next(shared), alpha=scale)
            block[start - first : stop - first] = saving.rounded(key, weight, dtype)
        self.base.release()
        return block

    def pieces(self, key: str) -> tuple[Tensor, Tensor | None]:
        """Of one parameter in fp32, W_0 + fixed, and what the scale multiplies, if anything."""
        if key in self.packed:
            return self.packed[key].opened(), None
        weight = self.base.tensor(key).float()
        return weight + self.fixed[key] if key in self.fixed else weight, self.shared.get(key)

    def weight(self, key: str, gate: Tensor | None = None) -> Tensor:
        """One parameter in fp32, folded; `gate` [parts] weighs the deltas and may be left out when there are none."""
        weight = self.static(key)
        if key in self.deltas:
            if gate is None:
                raise UserError(
                    f"{key} depends on the input: give the gate's weights, one per part of {', '.join(self.tasks)}."
                )
            weight = weight + self.deltas[key].mix(gate)
        return weight

    def one_hot(self, task: int) -> Tensor:
        """The gate [parts] of one task: 1 for each of its parts."""
        per_task = self.parts // len(self.tasks)
        return functional.one_hot(torch.tensor(task), len(self.tasks)).float().repeat_interleave(per_task)

    def state(self, gate: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
        """(key, fp32 weight) for every floating parameter, one in memory at a time."""
        for key in self.specs:
            yield key, self.weight(key, gate)

    @property
    def params(self) -> int:
        """Numbers stored beside one dense backbone: deltas, gates, corrections."""
        twice = sum(tensor.numel() for tensor in repeated(self.deltas.values()))
        parts = (*self.deltas.values(), *self.corrections.values())
        return (sum(part.params for part in parts) - twice + (self.routing.params if self.routing else 0)) + sum(
            change.numel() for changes in self.owned.values() for change in changes.values()
        )

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors that `save` writes into a file: the backbone as it is held, and what lies beside it."""
        specs = {**self.base.specs(), **self.specs}
        backbone = sum(self.packed[key].bytes if key in self.packed else spec.bytes for key, spec in specs.items())
        gates = self.routing.bytes if self.routing is not None else 0
        heads = sum(tensor.nbytes for of in (self.heads, self.owned) for own in of.values() for tensor in own.values())
        twice = sum(tensor.nbytes for tensor in repeated(self.deltas.values()))
        parts = (*self.deltas.values(), *self.corrections.values())
        return backbone + gates + heads + sum(part.bytes for part in parts) - twice

    def save(
        self,
        path: str | Path,
        dtype: "str | torch.dtype | None" = None,
        shard_gb: float = 5.0,
        adapter: bool = False,
        **facts: object,
    ) -> Path:
        """Write what `merging.load` reads: one safetensors file, or where `path` ends in / or is a folder, a folder
        that Hugging Face's libraries load too; see merging.saving and merging.saving_folder. Atomic. A file holds
        packed parameters as they are, a folder all their numbers.

        dtype: of what all inputs share (fp32, bf16, fp16) instead of its own, the widest of base and experts. shard_gb:
        size of a file of the folder's weights at most. Raises UserError where tasks answer with biases of their own.
        """
        from merging import saving_folder  # here, because it reads configurations and tokenizers

        check_shared(self.owned)
        merged = self if dtype is None else self.cast(dtype)
        if saving.is_folder(path):
            return saving_folder.write(merged, path, shard_gb, adapter, **facts)
        if adapter:
            raise UserError(f"An adapter is a folder, and {path} is a file. Write a folder's name with / behind it.")
        return saving.write(merged, path, **facts)
