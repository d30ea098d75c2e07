"""Attention and FFN of every block merged for groups of tasks, and put together again as the tasks need them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from merging.applied import as_applied
from merging.backbones.base import FAMILIES
from merging.combined import Changes, total
from merging.deltas import Coded, Delta, Dense, Grouped
from merging.experts import Experts
from merging.fit.black_box import Point
from merging.merged import Merged, Routing
from merging.packed import Grid
from merging.regression import shared

Groups = Mapping[str, Sequence[Sequence[str]]]  # component, the attention or FFN of a block -> its tasks in groups


@dataclass(frozen=True)
class Library:
    """Modules of attention and FFNs for groups of tasks, and merges made of them.

    merge: what merges the experts of a group, into one model. coded: the matrices that are held in codes of `grid`.
    """

    experts: Experts
    merge: Callable[[Experts], Merged]
    grid: Grid
    coded: frozenset[str]

    @cached_property
    def components(self) -> dict[str, list[str]]:
        """The parameters of every component."""
        components, several = dict[str, list[str]](), shared(self.experts)
        for key in self.experts.specs():
            info = self.experts.param(key)
            if info.block is not None and info.family in FAMILIES and key not in several:
                components.setdefault(f"{info.block}.{info.family}", []).append(key)
        return components

    @cached_property
    def rest(self) -> Merged:
        """What is no component."""
        inside = {key for keys in self.components.values() for key in keys}
        return self.merge(self.experts.part({*self.experts.specs()} - inside))

    @cached_property
    def _still(self) -> dict[str, Tensor]:
        return {**_changes(self.rest)}

    def start(self, families: Sequence[str]) -> Groups:
        """All experts apart in the components of these families, together in the others."""
        names = sorted(self.experts.tasks)
        apart, together = [[task] for task in names], [names]
        return {name: apart if name.rpartition(".")[2] in families else together for name in self.components}

    def groups(self, point: Point) -> Groups:
        """Tasks of one whole number at a component are a group."""
        groups: dict[str, list[list[str]]] = {}
        for component in self.components:
            members: dict[int, list[str]] = {}
            for task in sorted(self.experts.tasks):
                number = min(int(point[f"{component}/{task}"]), len(self.experts.tasks) - 1)
                members.setdefault(number, []).append(task)
            groups[component] = [*members.values()]
        return groups

    def point(self, groups: Groups) -> dict[str, float]:
        """The numbers of groups, counted from 0 and between two whole ones, so that no rounding moves them."""
        return {f"{component}/{task}": index + 0.5 for component, some in groups.items()
                for index, tasks in enumerate(some) for task in tasks}  # fmt: skip

    def storage(self, groups: Groups) -> float:
        """The numbers of all modules as a share of those of the experts."""
        specs = self.experts.specs()
        sizes = {name: sum(specs[key].shape.numel() for key in keys) for name, keys in self.components.items()}
        kept = sum(size * len(groups[name]) for name, size in sizes.items())
        return kept / max(1, len(self.experts.tasks) * sum(sizes.values()))

    def merged(self, groups: Groups) -> Merged:
        """The merge of these groups."""
        fixed, deltas = {**self._still}, dict[str, Delta]()
        for component, some in groups.items():
            modules = [self._module(self.components[component], tasks) for tasks in some]
            if len(some) == 1:
                fixed |= modules[0]
                continue
            of = [next(index for index, tasks in enumerate(some) if task in tasks) for task in self.experts.tasks]
            for key in self.components[component]:
                deltas[key] = Grouped(self._stored(key, [module[key] for module in modules]), of)
        routing = Routing("learned") if deltas else None
        return self.experts.merged({}, deltas=deltas, routing=routing, fixed=fixed)

    def _module(self, keys: Sequence[str], tasks: Sequence[str]) -> Changes:
        """The changes of one component for a group."""
        experts, indices = self.experts, [self.experts.tasks.index(task) for task in tasks]
        if len(tasks) == 1:
            return {key: experts.task_vector(key, indices[0]) for key in keys}
        checkpoints = tuple(experts.checkpoints[index] for index in indices)
        some = replace(experts, tasks=tuple(tasks), checkpoints=checkpoints, only=frozenset(keys))
        changes, specs = _changes(self.merge(some)), some.specs()
        return {key: changes[key] if key in changes else torch.zeros(specs[key].shape) for key in keys}

    def _stored(self, key: str, changes: Sequence[Tensor]) -> Delta:
        if key not in self.coded:
            return Dense(torch.stack([*changes]))
        turned = self.experts.param(key).transposed
        as_it_is = (as_applied(self.experts, key, change) for change in changes)
        return Coded.of([self.grid.nearest(change, changes[0].shape, turned) for change in as_it_is])


def _changes(merged: Merged) -> Changes:
    """What a static merge changes, at its own coefficient."""
    return total((1.0 if merged.scale is None else merged.scale, merged.shared), (1.0, merged.fixed))
