"""Where gating weights w lie while a model runs, and how rows of equal weights are run together."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from merging.deltas import Delta
from merging.errors import UserError

Run = Callable[[Tensor, tuple, Mapping[str, Any]], Any]


class PerThread(threading.local):
    """Values that every thread has of its own; a copy starts without."""

    def __deepcopy__(self, memo: dict) -> Any:
        return type(self)()


class Holder(PerThread):
    """The weights in force in one block, or outside the blocks: [T], [B, T] or [B, N, T]; None: the static model.

    Every thread has its own, so that several may run one model. Every block has its own, so that a backward that runs
    a block again finds the weights of that block and not those of the last one.
    """

    w: Tensor | None = None
    asker: nn.Module | None = None  # the part of the block at whose entry its gate gave w


def per_row(w: Tensor, rows: int, tokens: int | None, name: str) -> Tensor:
    """w for an input of `rows` samples with `tokens` tokens (None: no token axis). Raises UserError if it is not."""
    if w.ndim == 1:
        return w
    if len(w) != rows:
        raise UserError(
            f"{name} got {rows} rows, but w is for {len(w)}: what it is given has no batch axis in front, so that it "
            f"cannot be mixed per sample. Keep it static, or give one w [T] for all."
        )
    if w.ndim == 2 or tokens is None:
        return w if w.ndim == 2 else w[:, 0]
    if w.shape[1] != tokens:
        raise UserError(f"{name} got {tokens} tokens, but w is for {w.shape[1]}: give w per sample, [B, T].")
    return w


def vector(value: Tensor, delta: Delta, w: Tensor, x: Tensor) -> Tensor:
    """A parameter [d] plus its mixed change, shaped to act on the features of x [B, ..., d]."""
    mixed = value + delta.mix(w.to(value.dtype))
    rows = mixed.shape[:-1]
    return mixed.view(*rows, *[1] * (x.ndim - 1 - len(rows)), -1) if rows else mixed


def clustered(run: Run, w: Tensor, kernel: str, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """run(w, args, kwargs), with the rows sorted into groups where that pays; their order is kept.

    Samples with equal weights run with their one w [T]. Where most weights differ, but not all experts are in use
    (top-k gates), those with the same experts run together. "auto" sorts into groups of eight or more on average, as
    smaller products run slower, and on a CPU alone, as looking at the weights stalls an accelerator. Where gradients
    flow to w nothing is sorted: each row has its own.
    """
    groups = grouping(w, kernel)
    if groups is None:
        return run(w, args, kwargs)
    order, sizes, weights = groups
    leaves, spec = tree_flatten((args, dict(kwargs)))
    if any(hasattr(leaf, "get_seq_length") for leaf in leaves):  # a cache of keys and values is written into
        return run(w, args, kwargs)
    pieces = {id(leaf): leaf[order].split(sizes) for leaf in leaves if batched(leaf, len(w))}
    outputs = []
    for index, group in enumerate(weights):
        some = [pieces[id(leaf)][index] if id(leaf) in pieces else leaf for leaf in leaves]
        outputs.append(tree_flatten(run(group, *tree_unflatten(some, spec))))
    columns, back = list(zip(*(flat for flat, _ in outputs), strict=True)), order.argsort()
    if not all(batched(leaf, size) or leaf is None for part in columns for leaf, size in zip(part, sizes, strict=True)):
        return run(w, args, kwargs)  # an output over all rows, such as a mean loss
    return tree_unflatten([None if part[0] is None else torch.cat(part)[back] for part in columns], outputs[0][1])


def batched(leaf: object, rows: int) -> bool:
    """Whether something is a tensor of that many rows."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == rows


def grouping(w: Tensor, kernel: str) -> tuple[Tensor, list[int], tuple[Tensor, ...]] | None:
    """(order of the rows, sizes of the groups, w of each) if the rows are to be sorted."""
    most = {"auto": len(w) // 8, "grouped": len(w) - 1, "folded": len(w)}.get(kernel, 0)  # groups that still pay
    blind = torch.compiler.is_compiling() or w.device.type != "cpu"
    if w.ndim != 2 or most < 1 or (torch.is_grad_enabled() and w.requires_grad) or (kernel == "auto" and blind):
        return None
    groups, index = w.unique(dim=0, return_inverse=True)
    equal = len(groups) <= most
    if not equal:
        groups, index = (w != 0).unique(dim=0, return_inverse=True)
        if not 1 < len(groups) <= most:
            return None
    order = index.argsort(stable=True)
    sizes = torch.bincount(index, minlength=len(groups)).tolist()
    return order, sizes, groups.unbind() if equal else w[order].split(sizes)


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any], name: str | None = None) -> Tensor:
    """The tensor that a module is called for: of that name, or the first. Raises UserError where there is none."""
    values = ((kwargs.get(name),) if name is not None else ()) + (*args, *kwargs.values())
    tensors = (value for value in values if isinstance(value, Tensor))
    tensor = next(tensors, None)
    if tensor is None:
        raise UserError("A routed model was called without a tensor, so that there are no samples to route.")
    return tensor


def continued(cache: Any) -> bool:
    """Whether keys and values of a prompt are there."""
    return cache is not None and hasattr(cache, "get_seq_length") and bool(cache.get_seq_length() > 0)
