"""Merges that are linear in the weights of the experts, with coefficients from their inner products."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from merging.combined import Changes
from merging.entries import Entry, entrywise, sweep
from merging.experts import Experts

Rows = Mapping[str, Tensor]  # by parameter, for every row of it


def products(experts: Experts, by_row: bool = False) -> Rows:
    """Inner products [rows, 1 + T, 1 + T] fp64 of the base's weights and the task vectors, by parameter.

    A parameter is one row, or has those along its last axis. Products of fp32 are exact in fp64, only sums are rounded.
    """
    widths = {key: _width(spec.shape, by_row) for key, spec in experts.specs().items()}

    def work(entry: Entry, tau: Tensor) -> tuple[Entry, Tensor]:
        width, count = widths[entry.key], tau.shape[1]
        vectors = torch.cat([_of_base(experts, entry, count)[None], tau]).double()
        if 0 < width < entry.first % width + count:  # several rows: zeros for what other pieces have of them
            before, after = entry.first % width, -(entry.first + count) % width
            vectors = torch.nn.functional.pad(vectors, (before, after))
            vectors = vectors.view(len(vectors), -1, width).transpose(0, 1)
        else:
            vectors = vectors[None]
        return entry, vectors @ vectors.mT

    sizes = {key: spec.shape.numel() for key, spec in experts.specs().items()}
    count = 1 + len(experts.tasks)
    total = {key: torch.zeros(size // max(1, widths[key]), count, count).double() for key, size in sizes.items()}
    for entry, piece in sweep(experts, work):
        first = entry.first // widths[entry.key]
        total[entry.key][first : first + len(piece)] += piece
    return total


def combined_by(experts: Experts, coefficients: Rows) -> Changes:
    """The changes sum_t c_t tau_t + c_0 base, coefficients c [rows, 1 + T] by parameter."""
    shapes = {key: spec.shape for key, spec in experts.specs().items()}

    def merge(entry: Entry, tau: Tensor) -> Tensor:
        rows = coefficients[entry.key].float()
        width, count = shapes[entry.key].numel() // len(rows), tau.shape[1]
        if len(rows) > 1:
            rows = rows[(torch.arange(count) + entry.first) // width]
        merged = (rows[:, 1:].mT * tau).sum(0)
        return merged + rows[:, 0] * _of_base(experts, entry, count) if rows[:, 0].any() else merged

    return entrywise(experts, merge)


def on_sphere(experts: Experts, origin: str, mean: Callable[[Tensor], Tensor]) -> Changes:
    """Every parameter as the combination of the experts that `mean` takes: coefficients [T] of products [T, T] fp64.

    origin: of the vectors whose products these are, "zero" (weights) or "base" (task vectors).
    """
    coefficients = {}
    for key, product in products(experts).items():
        if not len(product):
            continue
        (gram,) = product
        if origin == "base":
            coefficients[key] = torch.cat([torch.zeros(1).double(), mean(gram[1:, 1:])])[None]
        else:  # W_s W_t = (W_0 + tau_s)(W_0 + tau_t)
            across = gram[0, 1:]
            c = mean(gram[0, 0] + across[:, None] + across + gram[1:, 1:])
            coefficients[key] = torch.cat([c.sum()[None] - 1, c])[None]
    empty = {key: torch.zeros(1, 1 + len(experts.tasks)) for key in experts.specs()}
    return combined_by(experts, empty | coefficients)


def _width(shape: torch.Size, by_row: bool) -> int:
    return shape[-1] if by_row and shape else shape.numel()


def _of_base(experts: Experts, entry: Entry, count: int) -> Tensor:
    return experts.flat(entry.key)[0][entry.first : entry.first + count].float()
