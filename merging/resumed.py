"""Forwards that go on behind the blocks that are done: what those gave is kept, and nothing before is run again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from merging.calibration import Calibration
from merging.experts import Experts
from merging.regression import expert_model, put, stages
from merging.statistics import Pair, paired


class Kept:
    """What the last block that is done gave, in every stack of blocks, for each batch of one model on one task."""

    def __init__(self) -> None:
        self.outputs: dict[tuple[str, int], Any] = {}
        self._fresh: dict[tuple[str, int], Any] = {}
        self._done: tuple[str, ...] = ()

    @contextmanager
    def behind(self, model: nn.Module, done: Sequence[str]) -> Iterator[None]:
        """A model whose forwards run the last of the blocks `done`, by name, and what comes after it.

        Those before give what was kept. The batches are the same, in order, every time; `done` grows by one at most.
        """
        if tuple(done) != self._done:
            self.outputs |= self._fresh
            self._fresh, self._done = {}, tuple(done)
        modules = [(name.rpartition(".")[0], model.get_submodule(name)) for name in done]
        batch = -1

        def begin(*_: Any) -> None:
            nonlocal batch
            batch += 1

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            self._fresh[modules[-1][0], batch] = output

        handles = [model.register_forward_pre_hook(begin)]
        for stack, module in modules[:-1]:
            module.forward = lambda *_, stack=stack, **__: self.outputs[stack, batch]
        if modules:
            handles.append(modules[-1][1].register_forward_hook(keep))
        try:
            yield
        finally:
            for _, module in modules[:-1]:
                del module.forward
            for handle in handles:
                handle.remove()


@dataclass
class Streams:
    """A model whose blocks are calibrated one after the other, beside every expert on the inputs of its task."""

    experts: Experts
    data: Calibration
    model: nn.Module
    samples: int  # per task
    done: list[str] = field(default_factory=list)  # blocks
    kept: dict[int, tuple[Kept, Kept]] = field(default_factory=dict)

    def pairs(self, task: int, keys: Sequence[str], unread: float = 1.0) -> tuple[dict[str, Pair], dict[str, Pair]]:
        """What goes into layers of the next block: over all tokens alike, and with those behind the first weighed."""
        expert = expert_model(self.experts, self.data, task)
        every = self._pairs(task, expert, keys, "all")
        if unread == 1:
            return every, every
        first = self._pairs(task, expert, keys, "class")
        return every, {key: first[key].plus(every[key].plus(first[key], -1.0), unread) for key in keys}

    def _pairs(self, task: int, expert: nn.Module, keys: Sequence[str], tokens: str) -> dict[str, Pair]:
        ours, theirs = self.kept.setdefault(task, (Kept(), Kept()))
        with ours.behind(self.model, self.done), theirs.behind(expert, self.done):
            return paired(self.model, expert, keys, self.data.batches(task, self.samples), tokens)


Solve = Callable[[Streams, Sequence[str], Mapping[str, Tensor], bool], Mapping[str, Tensor]]


def calibrated(
    experts: Experts, data: Calibration, changes: Mapping[str, Tensor], samples: int, solve: Solve
) -> dict[str, Tensor]:
    """A merge, given by its changes of all parameters, after one block after the other was solved anew.

    solve: (streams, the parameters of a block, all changes so far, whether it is the last one) -> new changes of some.
    """
    changes, model = dict(changes), data.model(experts.origin)
    put(model, {key: experts.base(key) + change for key, change in changes.items()})
    blocks = [stage for stage in stages(experts, data) if experts.param(stage[0]).block is not None]
    streams = Streams(experts, data, model, samples)
    for block in blocks:
        changes |= solve(streams, block, changes, block is blocks[-1])
        put(model, {key: experts.base(key) + changes[key] for key in block})
        streams.done.append(str(experts.param(block[0]).block))
    return changes
