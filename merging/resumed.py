"""Forwards that go on behind the blocks that are done: what those gave is kept, and nothing before is run again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from merging.calibration import Calibration
from merging.experts import Experts
from merging.regression import expert_weights, put, stages
from merging.statistics import Pair, gram_sums, paired


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
    """A model whose blocks are calibrated one after the other, beside every expert on the inputs of its task.

    A block runs twice a batch: when what goes into it is measured, and once more, after it is calibrated, for the next
    (of an expert in the same way, so that equal models agree to the last bit).
    """

    experts: Experts
    data: Calibration
    model: nn.Module
    other: nn.Module  # another one, that takes the weights of each expert in turn
    blocks: Sequence[str]  # names of all
    samples: int  # per task
    done: list[str] = field(default_factory=list)  # blocks
    kept: dict[int, tuple[Kept, Kept]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)  # by block, see statistics.paired

    def pairs(self, task: int, keys: Sequence[str], unread: float = 1.0) -> tuple[dict[str, Pair], dict[str, Pair]]:
        """What goes into layers of the next block: over all tokens alike, and with those behind the first weighed."""
        block = self.blocks[len(self.done)]
        others = tuple(f"{name}." for name in self.blocks if name not in (*self.done[-1:], block))
        put(self.other, expert_weights(self.experts, task, lambda key: not key.startswith(others)))
        ours, theirs = self.kept.setdefault(task, (Kept(), Kept()))
        with ours.behind(self.model, self.done), theirs.behind(self.other, self.done):
            batches = self.data.batches(task, self.samples)
            found = paired(self.model, self.other, keys, batches, unread != 1, self.calls.get(block))
        self.calls[block] = found.calls
        every, first = found.every, found.first
        if unread == 1:
            return every, every
        return every, {key: first[key].plus(every[key].plus(first[key], -1.0), unread) for key in keys}

    def grams(self, task: int, keys: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """`gram_sums` of layers of the next block of the model that is calibrated, alone."""
        ours, _ = self.kept.setdefault(task, (Kept(), Kept()))
        with ours.behind(self.model, self.done):
            return gram_sums(self.model, keys, self.data.batches(task, self.samples))


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
    names = [str(experts.param(block[0]).block) for block in blocks]
    streams = Streams(experts, data, model, data.model(experts.origin), names, samples)
    for name, block in zip(names, blocks, strict=True):
        changes |= solve(streams, block, changes, block is blocks[-1])
        put(model, {key: experts.base(key) + changes[key] for key in block})
        streams.done.append(name)
    return changes
