"""What gates and heads see of the calibration images."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from merging.calibration import Calibration
from merging.errors import UserError
from merging.merged import Merged
from merging.routed import RoutedTower
from merging.routing.gates import Gate
from merging.threads import each


def features_of(
    tower: RoutedTower, merged: Merged, calibration: Calibration, chosen: list[Tensor]
) -> tuple[Tensor, ...]:
    """Unit features [n, D] of some images of each task: all in one batch, unless a batch is to be of one task."""
    images = [calibration.images(task, indices) for task, indices in enumerate(chosen)]
    if merged.routing is not None and merged.routing.granularity == "batch":
        return tuple(functional.normalize(tower(some), dim=-1) for some in images)
    return functional.normalize(tower(torch.cat(images)), dim=-1).split([len(some) for some in images])


def visit(tower: RoutedTower, calibration: Calibration, merged: Merged, act: Callable[[Gate, Tensor], object]) -> None:
    """Show every gate its features on all calibration images [n, F], in the order of the network.

    `act` may train the gate: blocks behind it then see what it routes. A shared gate is shown all its blocks at once,
    under the weights of the true task. Batches are spread over single-threaded workers.
    """
    shape = merged.routing.gate if merged.routing is not None else None
    assert shape is not None
    batches = calibration.every()  # images are read when their turn comes: all at once may be gigabytes
    if shape.sees != "block":
        first = (lambda x: tower.run(x)[0]) if shape.sees == "pass" else tower.prefix
        see = lambda some: gate_of(tower).features(first(tower.embed(calibration.images(*some))))  # noqa: E731
        return _shown(gate_of(tower), _over(see, batches), act)
    tokens, together = _over(lambda some: tower.embed(calibration.images(*some)), batches), []
    truth = [merged.one_hot(task).to(calibration.device) for task, _ in batches]
    last = max(index for index, block in enumerate(tower.steps) if block.gate is not None)  # nobody sees what follows
    for index, block in enumerate(tower.steps[: last + 1]):
        if block.gate is None:
            tokens = _over(lambda x, block=block: block(x)[0], tokens)
            continue
        asked = _over(block.ask, tokens)
        hidden = [seen for _, seen in asked]
        features = _over(block.gate.features, hidden)
        if shape.shared:
            together += features
        else:
            _shown(block.gate, features, act)
            truth = _over(block.gate, hidden) if index < last else truth
        if index < last:
            tokens = _over(lambda state, w, block=block: block.answer(state[0], state[1], w)[0], asked, truth)
    if shape.shared:
        _shown(gate_of(tower), together, act)


def gate_of(tower: RoutedTower) -> Gate:
    """The one gate of a tower, or the first of its blocks'."""
    return next(gate for gate in (tower.gate, *(block.gate for block in tower.steps)) if gate is not None)


def _over(function: Callable[..., Any], *items: list) -> list:
    """`function` of every item, in order, without autograd."""
    return each(torch.no_grad()(function), *items)  # in the workers, which start with autograd on


def _shown(gate: Gate, features: list[Tensor], act: Callable[[Gate, Tensor], object]) -> None:
    every = torch.cat(features)
    if not every.isfinite().all():
        raise UserError(
            "The merged model gives NaN or Inf on the images that train its gates. Lower the scale or check the "
            "experts."
        )
    act(gate, every)
