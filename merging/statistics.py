"""What goes into every layer of a model on unlabelled samples: moments and Gram matrices, streaming, per task."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
Add = Callable[[str, Tensor], None]  # what is done with the rows [R, n] of a key


class Finished(Exception):
    """Ends a forward when all matrices have been seen."""


def grams(
    calibration: Calibration, checkpoint: Checkpoint, task: int, keys: Sequence[str], count: int | None = None
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """`gram_sums` of a checkpoint on a task's first `count` samples.

    All of `keys` are in memory at once: for a large model ask block by block, each of which ends its forwards behind
    its last matrix. Raises UserError for a parameter that is no matrix of features, nor the gain of a norm.
    """
    return gram_sums(calibration.model(checkpoint), keys, calibration.batches(task, count))


def gram_sums(
    model: nn.Module, keys: Sequence[str], batches: Iterable[Any]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """X^T X [n, n] fp64 of the inputs X [rows, n] of each matrix, and how many rows there were.

    Products are in the model's dtype, summed in fp64. A matrix [m, n] is any that is applied to features: linear
    layers, fused attention, patch embeddings (n of flattened patches), projections; padding does not count. Of the gain
    of a norm it is the diagonal [n], of what is normalised.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(keys, 0)
    gains = {key for key in keys if is_gain(model, key)}

    def add(key: str, rows: Tensor) -> None:
        product = _product(rows, rows, key in gains)
        sums[key] = product if key not in sums else sums[key].add_(product)
        counts[key] += len(rows)

    observe(model, keys, batches, add)
    return {key: sums[key].cpu() for key in keys}, counts


class Pair(NamedTuple):
    """Sums over rows of what goes into a layer of one model, x [n], and of another on the same inputs, y [n]; fp64."""

    gram: Tensor  # x x^T [n, n]; of the gain of a norm the diagonal [n] of what is normalised
    drift: Tensor  # (y - x) x^T [n, n], of gains its diagonal; exactly zero where both models are the same
    mean: Tensor  # x [n]
    shift: Tensor  # y - x [n]
    rows: Tensor  # how many, []

    def plus(self, other: "Pair", weight: float = 1.0) -> "Pair":
        """The sum of two, the other times `weight`."""
        return Pair(*(mine + weight * theirs for mine, theirs in zip(self, other, strict=True)))

    def means(self) -> "Pair":
        """Per row."""
        return Pair(*(part / self.rows for part in self))


class Pairs(NamedTuple):
    """By layer: over all tokens, and over the first of each sample; and how often a forward calls what is watched."""

    every: dict[str, Pair]
    first: dict[str, Pair]
    calls: int


def paired(
    model: nn.Module,
    other: nn.Module,
    keys: Sequence[str],
    batches: Iterable[Any],
    first: bool = False,
    calls: int | None = None,
) -> Pairs:
    """How what goes into layers differs between two models, run side by side; keys as in `gram_sums`.

    first: whether sums over first tokens are asked for. calls: of both models, see `watched`.
    """
    kinds = ("all", "class") if first else ("all",)
    gains, sums = {key for key in keys if is_gain(model, key)}, ({}, {})
    seen: tuple[dict[str, list[tuple[Tensor, ...]]], ...] = ({}, {})

    def several(x: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(rows_of(x, mask, kind) for kind in kinds)

    def note(rows_of_key: dict[str, list[tuple[Tensor, ...]]], key: str, rows: tuple[Tensor, ...]) -> None:
        rows_of_key.setdefault(key, []).append(rows)

    one, two = (partial(note, rows) for rows in seen)
    with (
        torch.inference_mode(),
        watched(model, keys, one, several, calls=calls) as run,
        watched(other, keys, two, several, calls=calls) as beside,
    ):
        for inputs in batches:
            calls = run(inputs)
            beside(inputs)
            for key in list(seen[0]):
                of_models = [[torch.cat(parts) for parts in zip(*rows.pop(key), strict=True)] for rows in seen]
                for total, x, y in zip(sums, *of_models, strict=False):
                    pair = _pair(x, y, key in gains)
                    total[key] = total[key].plus(pair) if key in total else pair
    every, firsts = ({key: Pair(*(part.cpu() for part in pair)) for key, pair in total.items()} for total in sums)
    return Pairs(every, firsts, calls or 0)


def _pair(x: Tensor, y: Tensor, diagonal: bool) -> Pair:
    """Of rows [R, n] each."""
    change, rows = y - x, torch.tensor(len(x), dtype=torch.float64, device=x.device)
    mean, shift = (part.sum(0, dtype=torch.float64) for part in (x, change))
    return Pair(_product(x, x, diagonal), _product(change, x, diagonal), mean, shift, rows)


def _product(left: Tensor, right: Tensor, diagonal: bool) -> Tensor:
    """left^T right of rows [R, n], or its diagonal, in fp64."""
    left, right = (rows if rows.dtype.itemsize >= 4 else rows.float() for rows in (left, right))
    return (left * right).sum(0, dtype=torch.float64) if diagonal else (left.T @ right).double()


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


def observe(
    model: nn.Module, keys: Sequence[str], batches: Iterable[Any], add: Add, tokens: str = "all", side: str = "input"
) -> None:
    """Run batches (tensors, or named inputs) and hand to `add` what goes into the layers of `keys`, as rows.

    Tokens that an `attention_mask` among the inputs leaves out are padding and do not count. tokens: "all", or the
    first alone ("class"). side: "input", or "output" for what comes out. Of the gain of a norm the rows are what is
    normalised, before gain and shift.
    """
    rows = partial(rows_of, tokens=tokens)
    with torch.inference_mode(), watched(model, keys, add, rows, side) as run:
        for inputs in batches:
            run(inputs)


@contextmanager
def watched(
    model: nn.Module,
    keys: Sequence[str],
    add: Callable[[str, Any], None],
    rows: Callable[[Tensor, Tensor | None], Any],
    side: str = "input",
    calls: int | None = None,
) -> Iterator[Callable[[Any], int]]:
    """As `observe`, batch by batch: what runs one, and says how often it called what is watched.

    rows: what `add` gets, of features and a mask of tokens. calls: how many a forward makes, where that is known; else
    the first one runs to its end.
    """
    copied = duplicate(model)
    layers = {key: _layer(copied, key) for key in keys}
    mask: Tensor | None = None
    seen, done, expected = set(), 0, calls

    def note(key: str, read: Callable[[Tensor], Tensor], _: nn.Module, inputs: tuple, output: Tensor) -> None:
        nonlocal done
        add(key, rows(read(inputs[0]) if side == "input" else output, mask))
        seen.add(key)
        done += 1
        if done == expected:
            raise Finished

    def run(inputs: Any) -> int:
        nonlocal mask, done, expected
        named, done = isinstance(inputs, Mapping), 0
        mask = inputs.get("attention_mask") if named else None
        with suppress(Finished):
            copied(**inputs) if named else copied(inputs)
        expected = done  # from now on a forward ends there
        return done

    hooks = [layer.register_forward_hook(partial(note, key, read)) for key, (layer, read) in layers.items()]
    try:
        yield run
    finally:
        for hook in hooks:
            hook.remove()
    if unseen := [key for key in keys if key not in seen]:
        raise UserError(f"Nothing went into {unseen[0]}: the forward does not use it, or there were no samples.")


def is_gain(model: nn.Module, key: str) -> bool:
    """Whether a parameter is what a norm multiplies by, feature by feature."""
    path, _, name = key.rpartition(".")
    weight = getattr(model.get_submodule(path), name, None)
    return name == "weight" and isinstance(weight, Tensor) and weight.ndim == 1


def _layer(model: nn.Module, key: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The module that applies a parameter, and what it makes of its input before that."""
    if not is_gain(model, key):
        return linear_in(model, key), lambda x: x
    norm = model.get_submodule(key.rpartition(".")[0])
    one, zero = _filled(norm, 1.0), _filled(norm, 0.0)
    return norm, lambda x: one(x) - zero(x)  # some add 1 to their gain: linear in it they all are


@torch.no_grad()
def _filled(norm: nn.Module, gain: float) -> nn.Module:
    """A norm of one gain for all features, and no shift."""
    copied = copy.deepcopy(norm)
    for name, parameter in copied.named_parameters():
        parameter.fill_(gain if name == "weight" else 0.0)
    return copied


def rows_of(x: Tensor, mask: Tensor | None, tokens: str) -> Tensor:
    """Features [rows, n] of [B, n] or [B, ..., n], without padding; tokens: "all", or the first alone."""
    if tokens == "class" and x.ndim > 2:
        return x[:, 0].flatten(0, -2)
    return x.flatten(0, -2) if mask is None or mask.shape != x.shape[:-1] else x[mask.bool()]
