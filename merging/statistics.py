"""What goes into every matrix of a model on unlabelled samples: moments and Gram matrices, streaming, per task."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from merging.calibration import Calibration
from merging.checkpoints import Checkpoint
from merging.errors import UserError
from merging.routing.install import duplicate, linear_in
from merging.threads import each

STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean_abs": torch.abs,
    "mean": lambda x: x,
    "positive": lambda x: x > 0,
    "rms": torch.square,
}
TOKENS = ("all", "class")
Add = Callable[[str, Tensor], None]  # what is done with the rows [R, n] of a key


class Grams(NamedTuple):
    """X^T X of the inputs X [rows, n] of each matrix, and how many rows there were."""

    sums: dict[str, Tensor]  # [T, n, n] fp64
    rows: dict[str, Tensor]  # [T]


class Finished(Exception):
    """Ends a forward when all matrices have been seen."""


def grams(
    calibration: Calibration, checkpoints: Sequence[Checkpoint], keys: Sequence[str], count: int | None = None
) -> Grams:
    """Checkpoint t is run on the first `count` samples of task t; products in the model's dtype, summed in fp64.

    A matrix [m, n] is any that is applied to features: linear layers, fused attention, patch embeddings (n of flattened
    patches), projections; padding does not count. All of `keys` are in memory at once, T n^2 doubles each: for a
    large model ask block by block, each of which ends its forwards behind its last matrix. Raises UserError for a
    parameter that is no such matrix.
    """
    outcomes = [grams_of(calibration, checkpoint, task, keys, count) for task, checkpoint in enumerate(checkpoints)]
    sums = {key: torch.stack([sums.pop(key) for sums, _ in outcomes]) for key in keys}
    return Grams(sums, {key: torch.tensor([rows[key] for _, rows in outcomes]) for key in keys})


def grams_of(
    calibration: Calibration, checkpoint: Checkpoint, task: int, keys: Sequence[str], count: int | None = None
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """As `grams`, of one checkpoint on one task: sums [n, n] fp64, and rows."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(keys, 0)

    def add(key: str, rows: Tensor) -> None:
        rows = rows if rows.dtype.itemsize >= 4 else rows.float()
        product = (rows.T @ rows).double()
        sums[key] = product if key not in sums else sums[key].add_(product)
        counts[key] += len(rows)

    observe(calibration.model(checkpoint), keys, calibration.batches(task, count), add)
    return {key: sums[key].cpu() for key in keys}, counts


def activations(
    calibration: Calibration,
    checkpoints: Sequence[Checkpoint],
    names: tuple[str, ...],
    count: int | None = None,
    statistic: str = "mean_abs",
    tokens: str = "all",
    side: str = "input",
) -> dict[str, Tensor]:
    """What goes into each matrix `names`, as statistics [T, inputs] fp32.

    Checkpoint t is run on the samples of task t. For the second layer of an FFN the input is the activation of its
    hidden neurons; side="output" measures what comes out of the layers instead, [T, outputs]. statistic and tokens: see
    `linear_statistics`.
    """

    def one(task: int) -> dict[str, Tensor]:
        model, batches = calibration.model(checkpoints[task]), calibration.batches(task, count)
        return linear_statistics(model, names, batches, statistic, tokens, side)

    moments = each(one, range(len(checkpoints)))
    return {name: torch.stack([means[name] for means in moments]) for name in names}


def linear_statistics(
    model: nn.Module,
    names: tuple[str, ...],
    batches: Iterable[Any],
    statistic: str = "mean_abs",
    tokens: str = "all",
    side: str = "input",
) -> dict[str, Tensor]:
    """One number per input of the matrices `names`, over samples and tokens; summed in fp64.

    Tokens that an `attention_mask` among the inputs leaves out are padding and do not count. statistic: mean_abs, mean,
    positive (share above zero) or rms. tokens: all, or the first alone ("class"). side: "input", or "output" for one
    number per output.
    """
    sums: dict[str, Tensor] = {}
    counts, measure = dict.fromkeys(names, 0), STATISTICS[statistic]

    def add(name: str, rows: Tensor) -> None:
        total = measure(rows).sum(0, dtype=torch.float64)
        sums[name] = total if name not in sums else sums[name] + total
        counts[name] += len(rows)

    observe(model, names, batches, add, tokens, side)
    means = {name: sums[name] / counts[name] for name in names}
    return {name: (mean.sqrt() if statistic == "rms" else mean).float().cpu() for name, mean in means.items()}


@torch.inference_mode()
def observe(
    model: nn.Module, keys: Sequence[str], batches: Iterable[Any], add: Add, tokens: str = "all", side: str = "input"
) -> None:
    """Run batches (tensors, or named inputs) and hand to `add` what goes into the matrices `keys`, or comes out."""
    copied = duplicate(model)
    mask: Tensor | None = None
    layers = {key: linear_in(copied, key) for key in keys}
    seen, calls, expected = set(), 0, None

    def note(key: str, inputs: tuple, output: Tensor) -> None:
        nonlocal calls
        add(key, rows_of(inputs[0] if side == "input" else output, mask, tokens))
        seen.add(key)
        calls += 1
        if calls == expected:
            raise Finished

    with hooked(layers, note):
        for inputs in batches:
            named, calls = isinstance(inputs, Mapping), 0
            mask = inputs.get("attention_mask") if named else None
            try:
                copied(**inputs) if named else copied(inputs)
            except Finished:
                continue
            expected = calls  # from now on a forward ends there
    if unseen := [key for key in keys if key not in seen]:
        raise UserError(f"Nothing went into {unseen[0]}: the forward does not use it, or there were no samples.")


@contextmanager
def hooked(layers: Mapping[str, nn.Module], note: Callable[[str, tuple, Tensor], None]) -> Iterator[None]:
    """`note` is called with the inputs and outputs of the layers."""
    hooks = [layer.register_forward_hook(partial(_called, note, key)) for key, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _called(note: Callable[[str, tuple, Tensor], None], key: str, _: nn.Module, inputs: tuple, output: Tensor) -> None:
    note(key, inputs, output)


def rows_of(x: Tensor, mask: Tensor | None, tokens: str) -> Tensor:
    """Features [rows, n] of [B, n] or [B, ..., n], without padding; tokens: "all", or the first alone."""
    if tokens == "class" and x.ndim > 2:
        return x[:, 0]
    return x.flatten(0, -2) if mask is None or mask.shape != x.shape[:-1] else x[mask.bool()]
