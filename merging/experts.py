"""Experts: everything a merge method may look at, read one parameter at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from merging.backbones.base import ParamInfo, Table, table_for
from merging.cache import Cache
from merging.checkpoints import Change, Checkpoint, Flat, Known, Spec
from merging.checkpoints.opening import Source, open_alike, split_head
from merging.checkpoints.tied import tied
from merging.checkpoints.views import same_source
from merging.checkpoints.vocabulary import aligned
from merging.decompose import cached
from merging.decompose.svd import SVD, polar
from merging.decompose.tucker import Tucker
from merging.deltas import Delta, LowRank, OnDemand
from merging.errors import UserError
from merging.merged import Merged, Routing
from merging.owned import HEADS, Owned
from merging.preflight import check_experts, check_finite, differing, listed, some
from merging.qkv import Joined, fused_name, join_deltas, separated
from merging.threads import each, workers

Sparsifier = Callable[[str, str, Tensor], Tensor]  # (key, task, tau_t) -> a tensor of its shape; run in threads
# One that looks at no entry beside another has `along`, see merging.methods.dare; at rows: merging.sparsifiers.ByRow.


@dataclass(frozen=True)
class Experts(Owned):
    """A base and its experts, seen as task vectors tau_t = theta_t - theta_0 in fp32.

    separate_qkv: show query, key and value of every attention as three parameters (`attn.q_proj_weight`, ...) instead
    of one fused matrix, as Hugging Face stores them: methods that work matrix by matrix then differ. Checkpoints and
    what a merge results in are fused either way.
    owned: what belongs to a task, is not merged, and answers with its expert's numbers when the task is scored: its
    head, or its biases too, those of norms included, as Twin-Merging and WUDI evaluate.
    """

    tasks: tuple[str, ...]
    origin: Checkpoint
    checkpoints: tuple[Checkpoint, ...]
    table: str | None = None  # of the architecture's parameters; None is the one that has all their names
    cache: Cache | None = None
    sparsifiers: tuple[Sparsifier, ...] = ()  # that every task vector passes, the first one first
    device: torch.device = cached.CPU  # where matrices are decomposed; all that is read and returned is on the CPU
    only: frozenset[str] | None = None  # the parameters in view, None is all
    separate_qkv: bool = False
    left_out: tuple[Checkpoint, ...] = ()  # what of each expert is its task's head
    owned: str = HEADS

    @classmethod
    def open(
        cls,
        base: Source,
        experts: Sequence[Source],
        tasks: Sequence[str] | None = None,
        cache: Cache | None = None,
        vocabulary: str = "same",
        other_base: bool = False,
        **facts,
    ) -> "Experts":
        """Open paths, state dicts, checkpoints; tasks default to task0, ...; see checkpoints.vocabulary, base_names.

        Where names differ, those of wrappers are left out (`module.` of DDP, `_orig_mod.` of torch.compile), as
        `remarks` tell. Heads of tasks (`classifier.*` and the like, by the table) may differ: they are left out, see
        `heads`. Raises UserError, from headers alone, unless all else has the same keys, shapes and kinds of numbers.
        """
        experts, tasks = listed(experts, tasks)
        if not (cache is None or isinstance(cache, Cache)):
            raise UserError(f"The cache is given as a {type(cache).__name__}. Write merging.Cache(folder).")
        names = tuple(tasks) if tasks is not None else tuple(f"task{i}" for i in range(len(experts)))
        whole = open_alike(base, experts, cache, other_base)
        (origin, _), *pairs = [split_head(checkpoint, facts.get("table")) for checkpoint in whole]
        opened, heads = [body for body, _ in pairs], [head for _, head in pairs]
        origin, *opened = aligned((origin, *opened), ("the base", *names), vocabulary)
        check_experts(origin, opened, names)
        return cls(names, origin, tuple(opened), cache=cache, left_out=tuple(heads), **facts)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is to be said of how base and experts were read, each with the tasks that it is true of."""
        of: dict[str, list[str]] = {}
        for name, checkpoint in zip(("the base", *self.tasks), (self.origin, *self.checkpoints), strict=True):
            for remark in checkpoint.remarks:
                of.setdefault(remark, []).append(name)
        return tuple(f"{', '.join(names)}: {remark}" for remark, names in of.items())

    @cached_property
    def differing(self) -> str:
        """What to say of counters and positions that differ, which are not merged; empty if none do. See preflight."""
        keys = differing(self.origin, self.checkpoints)
        return f"not merged, the base's is kept although the experts' differ: {some(keys)}" if keys else ""

    @property
    def inputs(self) -> tuple[Checkpoint | Known, ...]:
        """What a merge remembers of the experts; of those in memory not their tensors."""
        return tuple(expert if expert.files else Known(expert.id) for expert in self.checkpoints)

    @cached_property
    def _seen(self) -> tuple[Checkpoint, ...]:
        """Base and experts as methods see them."""
        return tuple(separated(stored) if self.separate_qkv else stored for stored in (self.origin, *self.checkpoints))

    def specs(self) -> Mapping[str, Spec]:
        """Shape and widest dtype of every parameter that is merged, keys sorted."""
        return self._specs

    @cached_property
    def _specs(self) -> dict[str, Spec]:
        return {key: spec for key, spec in self._stored().items() if not self.is_owned(key)}

    def _stored(self) -> dict[str, Spec]:
        """As `specs`, with the parameters that belong to tasks."""
        base, *experts = (checkpoint.specs() for checkpoint in self._seen)
        return {
            key: Spec(spec.shape, reduce(torch.promote_types, (expert[key].dtype for expert in experts), spec.dtype))
            for key, spec in sorted(base.items())
            if spec.merged and (self.only is None or key in self.only or self.is_owned(key))
        }

    def keys(self, kind: str | None = None) -> tuple[str, ...]:
        """Floating keys in fixed order, all or of one kind or family (ffn, attention), see ParamInfo."""
        return tuple(key for key in self.specs() if kind is None or self.param(key).is_a(kind))

    def param(self, key: str) -> ParamInfo:
        """What a parameter is. Raises UserError, naming table and key, where no table or not the one named has it."""
        return self._table.param(key)

    @cached_property
    def _table(self) -> Table:
        return table_for(self.table, [key for key, spec in self.origin.specs().items() if spec.merged])

    def base(self, key: str) -> Tensor:
        """The pretrained parameter in fp32."""
        return self._seen[0].tensor(key).float()

    def task_vector(self, key: str, task: int, base: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """tau_t of one expert, fp32, in `out` if given; `base` where it was read already.

        Raises UserError on NaN or Inf, naming the parameter.
        """
        expert = self._seen[1 + task]
        tau = torch.empty(self._seen[0].specs()[key].shape) if out is None else out
        if self._adapted:
            up, down = expert.change(key)
            torch.mm(up.float(), down.float(), out=tau.view(len(up), down.shape[1]))
        else:
            torch.sub(expert.tensor(key).float(), self.base(key) if base is None else base, out=tau)
        self.check_finite(key, task, tau)
        return reduce(lambda changed, sparsifier: sparsifier(key, self.tasks[task], changed), self.sparsifiers, tau)

    def check_finite(self, key: str, task: int, tau: Tensor) -> None:
        """Raises UserError, naming parameter and expert, for a piece of its task vector that holds NaN or Inf."""
        check_finite(tau, key, f"the expert for {self.tasks[task]}", self.checkpoints[task], self.origin)

    def tau(self, key: str, out: Tensor | None = None) -> Tensor:
        """Task vectors of one parameter, [T, *shape] fp32, in task order."""
        base = None if self._adapted else self.base(key)
        stack = torch.empty(len(self.tasks), *self._seen[0].specs()[key].shape) if out is None else out

        def fill(task: int, out: Tensor) -> None:
            tau = self.task_vector(key, task, base, out)
            if tau.data_ptr() != out.data_ptr():
                out.copy_(tau)

        each(fill, range(len(self.tasks)), stack)
        return stack

    def stream(self, keys: Sequence[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(key, tau) in fixed order. `tau` is one buffer used again for the next key: copy what is to be kept."""
        keys = self.keys() if keys is None else keys
        specs = self._seen[0].specs()
        largest = max((specs[key].shape.numel() for key in keys), default=0)
        buffer = torch.empty(len(self.tasks) * largest)
        for key in keys:
            shape = (len(self.tasks), *specs[key].shape)
            yield key, self.tau(key, buffer[: torch.Size(shape).numel()].view(shape))
            self.release()

    @cached_property
    def _adapted(self) -> bool:
        """Whether all experts are adapters of the base."""
        bases = [expert.adapts for expert in self.checkpoints]
        return all(base is not None and same_source(base, self.origin) for base in bases)

    def low_rank(self, key: str) -> LowRank | None:
        """The task vectors of one parameter as factors, where the experts are adapters of the base, else None.

        Raises UserError on NaN or Inf, naming the parameter.
        """
        return None if self.sparsifiers else self.factors(key)

    def factors(self, key: str) -> LowRank | None:
        """As `low_rank`, of the task vectors before any sparsifier."""
        if not self._adapted:
            return None
        changes: list[Change] = [expert.change(key) for expert in self._seen[1:]]
        for task, change in enumerate(changes):
            for factor in change:
                self.check_finite(key, task, factor)
        shape = self._seen[0].specs()[key].shape
        return LowRank.of((change.up.float() for change in changes), (change.down.float() for change in changes), shape)

    def delta(self, key: str) -> Delta:
        """The task vectors of one parameter: factors of adapters, else read one by one when mixed, keeping no pages."""
        if (delta := self.low_rank(key)) is not None:
            return delta

        def read(task: int) -> Tensor:
            tau = self.task_vector(key, task)
            self.release()
            return tau

        return OnDemand(read, self.specs()[key].shape, len(self.tasks))

    def flat(self, key: str) -> list[Tensor | Flat]:
        """Base and experts of one parameter, each [n]."""
        return [checkpoint.flat(key) for checkpoint in self._seen]

    def map(
        self, merge: Callable[[str, Tensor], Tensor], keys: Sequence[str] | None = None, heavy: bool = False
    ) -> dict[str, Tensor]:
        """`merge(key, tau)` for every parameter, with at most one of all experts in memory; `heavy`: `in_threads`."""
        if heavy:
            return self.in_threads(lambda key: merge(key, self.tau(key)), keys)
        merged = {}
        for key, tau in self.stream(keys):
            value = merge(key, tau)
            shares = value.untyped_storage().data_ptr() == tau.untyped_storage().data_ptr()
            merged[key] = value.clone() if shares else value
        return merged

    def in_threads(self, work: Callable[[str], Any], keys: Sequence[str] | None = None) -> dict[str, Any]:
        """`work(key)` for every parameter, by a single-threaded worker per torch thread: for decompositions."""

        def one(key: str) -> Any:
            value = work(key)
            self.release()
            return value

        keys = self.keys() if keys is None else keys
        with workers() as run, threadpool_limits(1):  # numpy's and scipy's BLAS is not reached by torch's setting
            return dict(zip(keys, run(one, keys), strict=True))

    def svd(self, matrices: Tensor, rank: int | None = None, kept: bool = True) -> list[SVD]:
        """Leading `rank` singular triplets (default: all) of each of the matrices [T, m, n], see decompose.cached.

        kept: whether the cache keeps them.
        """
        return [cached.svd(matrix, self.cache if kept else None, rank, self.device) for matrix in matrices]

    def polar(self, matrix: Tensor) -> Tensor:
        """U V^T of a matrix [m, n] = U S V^T, see decompose.svd.polar."""
        return cached.on(self.device, polar, matrix)

    def tucker(
        self, stack: Tensor, ranks: Sequence[int], engine: str = "hooi", sides: Sequence[int] | None = None
    ) -> Tucker:
        """Tucker decomposition of a stack [T, m, n] at ranks (r_t, r_o, r_i), see decompose.cached."""
        return cached.tucker(stack, self.cache, ranks, engine, self.device, sides)

    def merged(
        self,
        shared: Mapping[str, Tensor],
        scale: float | None = None,
        deltas: Mapping[str, Delta] | None = None,
        routing: Routing | None = None,
        **more: Any,
    ) -> Merged:
        """The result of a method: changes of the base for every input, and deltas for those that depend on it."""
        more = {"owned": self.kept} | more
        if not self.separate_qkv:
            return Merged(self.origin, self.tasks, self._stored(), shared, deltas or {}, routing, scale, **more)
        only = None if self.only is None else frozenset(map(fused_name, self.only))
        specs = replace(self, separate_qkv=False, only=only)._stored()
        return Joined(self.origin, self.tasks, specs, shared, join_deltas(deltas or {}), routing, scale, **more)

    @cached_property
    def tied(self) -> Mapping[str, str]:
        """The first name of every parameter that base and experts also hold under another one, see checkpoints.tied."""
        return tied(self._seen)

    def part(self, keys: Iterable[str]) -> "Experts":
        """The same experts with only these parameters in view: a method applied to them merges nothing else."""
        return replace(self, only=frozenset(keys))

    def release(self) -> None:
        """Give back the file pages read so far."""
        for checkpoint in (self.origin, *self.checkpoints):
            checkpoint.release()

    def sparsified(self, sparsifier: Sparsifier) -> "Experts":
        """The same experts, every task vector passed through `sparsifier` (DARE, neuron masks) after earlier ones."""
        return replace(self, sparsifiers=(*self.sparsifiers, sparsifier), cache=None)
