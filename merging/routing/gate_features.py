"""What gates and heads see of calibration samples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from merging.backbones.language import Asked
from merging.calibration import Calibration
from merging.errors import UserError
from merging.merged import Merged
from merging.routing.gates import Gate
from merging.routing.mixing import PerThread
from merging.routing.routed import Reached, Routed, reached
from merging.threads import each


def features_of(model: Routed, merged: Merged, calibration: Calibration, inputs: Sequence[Any]) -> Sequence[Tensor]:
    """What heads read of some samples of each task, [n, D]: all in one batch, unless a batch is to be of one task.

    Inputs that do not fit into one batch, such as texts padded to different lengths, are run task by task too.
    """
    single = merged.routing is not None and merged.routing.granularity == "batch"
    batch = None if single else batched(inputs)
    if batch is None:
        return [calibration.features(model, some) for some in inputs]
    together, sizes = batch
    return calibration.features(model, together).split(sizes)


def batched(inputs: Sequence[Any]) -> tuple[Any, list[int]] | None:
    """Tensors, or mappings of tensors, as one batch, and how many samples each has; None where their shapes differ."""
    if isinstance(inputs[0], Asked):
        return None
    if isinstance(inputs[0], Mapping):
        parts = {name: batched([some[name] for some in inputs]) for name in inputs[0]}
        if any(part is None for part in parts.values()):
            return None
        return {name: part[0] for name, part in parts.items() if part}, next(part[1] for part in parts.values() if part)
    if len({some.shape[1:] for some in inputs}) > 1:
        return None
    return torch.cat(list(inputs)), [len(some) for some in inputs]


def show_gates(model: Routed, calibration: Calibration, merged: Merged, act: Callable[[Gate, Tensor], object]) -> None:
    """Show every gate its features on all calibration samples [n, F], in the order of the network.

    `act` may train the gate: blocks behind it then see what it routes. A shared gate is shown all its blocks at once,
    under the weights of the true task. Batches are spread over single-threaded workers.
    """
    batches, read = calibration.every(), calibration.inputs  # read when their turn comes: all at once may be gigabytes
    over = partial(_over, calibration)
    gate = model.gate
    assert gate is not None
    if model.sees != "block":
        act(gate, joined(over(lambda some: gate.features(*seen(model, read(*some))), batches)))
        return
    indices = [index for index, block in enumerate(model.blocks) if block.routed]
    if len(model.gates) == 1 and len(indices) > 1:
        truth = [merged.one_hot(task).to(calibration.device) for task, _ in batches]
        visits = over(lambda some, w: under(model, read(*some), w), batches, truth)
        act(gate, joined([features[index] for index in indices for features in visits]))
        return
    progress: list[tuple] = [(0, None)] * len(batches)
    with resumable(model) as current:
        for index in indices:
            show = lambda some, state, i=index: resumed(model, current, state, i, read(*some))  # noqa: E731
            features, progress = map(list, zip(*over(show, batches, progress), strict=True))
            act(model.gate_of(index), joined(features))


def seen(model: Routed, inputs: Any) -> tuple[Tensor, Tensor | None]:
    """The tokens that the one gate of a model is shown, and which of them are no padding."""
    tokens = applied(model.seen, inputs)
    return tokens, model.mask_of(tokens)


def under(model: Routed, inputs: Any, w: Tensor) -> dict[int, Tensor]:
    """The features that every block's gate is shown when all of them answer w."""
    shown = {}

    def observer(index: int, tokens: Tensor) -> Tensor:
        shown[index] = model.gate_of(index).features(tokens, model.mask_of(tokens))
        return w

    applied(partial(model.observed, observer), inputs)
    return shown


class Current(PerThread):
    """How far the batch of this thread is: its finished blocks, and what the last of them gave."""

    done, output = 0, None


def resumed(model: Routed, current: Current, progress: tuple, stop: int, inputs: Any) -> tuple[Tensor, tuple]:
    """The features that a block's gate is shown, and how far the forward is that went on from `progress`."""

    def observer(index: int, tokens: Tensor) -> Tensor:
        gate, mask = model.gate_of(index), model.mask_of(tokens)
        if index == stop:
            raise Reached(gate.features(tokens, mask))
        return gate(tokens, mask)

    current.done, current.output = progress
    features = reached(partial(applied, partial(model.observed, observer), inputs), stop)
    return features, (current.done, current.output)


@contextmanager
def resumable(model: Routed) -> Iterator[Current]:
    """Blocks that a batch is through give what the last of them gave, which is all that goes on."""
    current = Current()

    def resume(index: int, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        if index >= current.done:
            current.output, current.done = forward(*args, **kwargs), index + 1
        return current.output

    for index, block in enumerate(model.blocks):
        block.module.forward = partial(resume, index, block.module.forward)
    try:
        yield current
    finally:
        for block in model.blocks:
            del block.module.forward


def applied(function: Callable, inputs: Any) -> Any:
    """`function` of what a backbone prepared: a tensor, or named ones."""
    return function(**inputs) if isinstance(inputs, Mapping) else function(inputs)


def _over(calibration: Calibration, function: Callable[..., Any], *items: list) -> list:
    """`function` of every item, in order, without autograd, in the calibration's precision."""

    @torch.no_grad()
    def one(*item: Any) -> Any:  # set here: the workers start with autograd on, and without autocast
        with calibration.running():
            return function(*item)

    return each(one, *items)


def joined(features: list[Tensor]) -> Tensor:
    """Raises UserError for what is not finite."""
    every = torch.cat(features).float()
    if not every.isfinite().all():
        raise UserError(
            "The merged model gives NaN or Inf on the samples that train its gates. Lower the scale or check the "
            "experts."
        )
    return every
