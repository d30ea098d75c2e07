"""What goes into every matrix of a model on unlabelled samples: moments and Gram matrices, streaming, per task."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

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
Add = Callable[[str, Tensor], None]  # what is done with the rows [R, n] of a key


class Finished(Exception):
    """Ends a forward when all matrices have been seen."""


def grams(
    calibration: Calibration, checkpoint: Checkpoint, task: int, keys: Sequence[str], count: int | None = None
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """X^T X [n, n] fp64 of the inputs X [rows, n] of each matrix, of a checkpoint on a task's first `count` samples.

    Also how many rows there were. Products are in the model's dtype, summed in fp64. A matrix [m, n] is any that is
    applied to features: linear layers, fused attention, patch embeddings (n of flattened patches), projections; padding
    does not count. All of `keys` are in memory at once: for a large model ask block by block, each of which ends its
    forwards behind its last matrix. Raises UserError for a parameter that is no such matrix.
    """
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
    names: Sequence[str],
    count: int | None = None,
    statistic: str = "mean_abs",
    tokens: str = "all",
    side: str = "input",
) -> dict[str, Tensor]:
    """`moments` of what goes into the matrices `names`, [T, inputs] fp32: checkpoint t is run on samples of task t.

    For the second layer of an FFN the input is the activation of its hidden neurons.
    """

    def one(task: int) -> dict[str, Tensor]:
        batches = calibration.batches(task, count)
        return moments(calibration.model(checkpoints[task]), names, batches, statistic, tokens=tokens, side=side)

    tasks = each(one, range(len(checkpoints)))
    return {name: torch.stack([means[name] for means in tasks]) for name in names}


def moments(
    model: nn.Module, names: Sequence[str], batches: Iterable[Any], statistic: str = "mean_abs", **where: str
) -> dict[str, Tensor]:
    """One number per input of the matrices `names`, over samples and tokens; summed in fp64.

    statistic: mean_abs, mean, positive (share above zero) or rms. where: `tokens` and `side` of `observe`.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(names, 0)

    def add(name: str, rows: Tensor) -> None:
        total = STATISTICS[statistic](rows).sum(0, dtype=torch.float64)
        sums[name] = total if name not in sums else sums[name] + total
        counts[name] += len(rows)

    observe(model, names, batches, add, **where)
    means = {name: sums[name] / counts[name] for name in names}
    return {name: (mean.sqrt() if statistic == "rms" else mean).float().cpu() for name, mean in means.items()}


@torch.inference_mode()
def observe(
    model: nn.Module, keys: Sequence[str], batches: Iterable[Any], add: Add, tokens: str = "all", side: str = "input"
) -> None:
    """Run batches (tensors, or named inputs) and hand to `add` what goes into the matrices `keys`, as rows.

    Tokens that an `attention_mask` among the inputs leaves out are padding and do not count. tokens: "all", or the
    first alone ("class"). side: "input", or "output" for what comes out.
    """
    copied = duplicate(model)
    layers = {key: linear_in(copied, key) for key in keys}
    mask: Tensor | None = None
    seen, calls, expected = set(), 0, None

    def note(key: str, _: nn.Module, inputs: tuple, output: Tensor) -> None:
        nonlocal calls
        add(key, rows_of(inputs[0] if side == "input" else output, mask, tokens))
        seen.add(key)
        calls += 1
        if calls == expected:
            raise Finished

    hooks = [layer.register_forward_hook(partial(note, key)) for key, layer in layers.items()]
    try:
        for inputs in batches:
            named, calls = isinstance(inputs, Mapping), 0
            mask = inputs.get("attention_mask") if named else None
            try:
                copied(**inputs) if named else copied(inputs)
            except Finished:
                continue
            expected = calls  # from now on a forward ends there
    finally:
        for hook in hooks:
            hook.remove()
    if unseen := [key for key in keys if key not in seen]:
        raise UserError(f"Nothing went into {unseen[0]}: the forward does not use it, or there were no samples.")


def rows_of(x: Tensor, mask: Tensor | None, tokens: str) -> Tensor:
    """Features [rows, n] of [B, n] or [B, ..., n], without padding; tokens: "all", or the first alone."""
    if tokens == "class" and x.ndim > 2:
        return x[:, 0]
    return x.flatten(0, -2) if mask is None or mask.shape != x.shape[:-1] else x[mask.bool()]
