"""Twin-Merging in groups (its appendix E): samples with similar weights share one merge. Needs all samples at once."""

import torch
from torch import Tensor

from merging.errors import UserError
from merging.ops import generator
from merging.routing.gates import Gate, answered


def group(
    weights: Tensor, count: int, *, per_bin: bool = False, seed: int = 0, points: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Labels [n] and the mean weights [groups, G] of samples with weights [n, G]; the mean is taken of the weights.

    Samples are first binned by their largest weight, then clustered inside each bin by k-means on `points` [n, d],
    the router's logits as published, or by default the weights themselves. count: groups of every bin (per_bin), or
    of all together: at least one per bin that is in use, the others in proportion to the bins' sizes. From as many
    groups as samples on, only equal samples share one. Raises UserError for a count below 1 and shapes that differ.
    """
    points = weights if points is None else points
    if count < 1 or weights.ndim != 2 or len(points) != len(weights):
        raise UserError(
            f"Grouping takes weights [n, G], points [n, d] and at least 1 group, not {tuple(weights.shape)}, "
            f"{tuple(points.shape)} and {count}."
        )
    bins = weights.argmax(1)
    sizes = torch.bincount(bins, minlength=weights.shape[1]).tolist()
    counts = [min(count, size) for size in sizes] if per_bin else shares(sizes, count)
    labels, used = torch.empty(len(weights), dtype=torch.int64), 0
    for index, count in enumerate(counts):
        inside = (bins == index).nonzero()[:, 0]
        if count:
            found = k_means(points[inside], count, seed)
            labels[inside] = used + found
            used += int(found.max()) + 1
    sums = torch.zeros(used, weights.shape[1], dtype=torch.float64).index_add(0, labels, weights.double())
    return labels, (sums / torch.bincount(labels, minlength=used)[:, None]).to(weights.dtype)


def grouped(gate: Gate, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Labels [n] and weights of the groups [groups, G] as a gate's shape says, from logits [n, (N,) G] of samples."""
    shape, weights = gate.shape, answered(gate.of_all(logits))
    points = weights if shape.points == "weights" else logits.mean(1) if logits.ndim == 3 else logits
    labels, means = group(weights, shape.groups, per_bin=shape.per_bin, points=points)
    return labels, gate.chosen(means)


def shares(sizes: list[int], count: int) -> list[int]:
    """`count` split over bins in proportion to their sizes: at least 1 for each in use, at most its size."""
    given = [min(1, size) for size in sizes]
    while sum(given) < min(count, sum(sizes)):  # to the bin with the most samples per group
        best = max((i for i, size in enumerate(sizes) if given[i] < size), key=lambda i: sizes[i] / given[i])
        given[best] += 1
    return given


def k_means(points: Tensor, count: int, seed: int = 0, rounds: int = 100) -> Tensor:
    """Labels [n] from 0 on, without gaps, of at most `count` clusters; starts spread out (k-means++), deterministic."""
    points, rng = points.double(), generator("k_means", seed)
    centres = points[torch.randint(len(points), (1,), generator=rng)]
    while len(centres) < count:
        gaps = distances(points, centres).min(1).values
        if not gaps.any():  # every distinct point is a centre
            break
        centres = torch.cat([centres, points[torch.multinomial(gaps, 1, generator=rng)]])
    labels = distances(points, centres).argmin(1)
    for _ in range(rounds):
        found = labels.unique(return_inverse=True)[1]
        sums = torch.zeros(int(found.max()) + 1, points.shape[1], dtype=points.dtype).index_add(0, found, points)
        labels = distances(points, sums / torch.bincount(found)[:, None]).argmin(1)
        if torch.equal(labels, found):
            break
    return labels.unique(return_inverse=True)[1]


def distances(points: Tensor, centres: Tensor) -> Tensor:
    """Squared distances [n, k], exactly zero between equal points."""
    return torch.stack([(points - centre).square().sum(1) for centre in centres], 1)
