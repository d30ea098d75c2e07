"""Twin-Merging in groups (its appendix E): samples with similar weights share one merge. Needs all samples at once."""

import torch
from torch import Tensor

from merging.errors import UserError
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
            labels[inside] = used + k_means(points[inside], count, seed)
            used = int(labels[inside].max()) + 1
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
    counts = [min(1, size) for size in sizes]
    while sum(counts) < min(count, sum(sizes)):  # to the bin with the most samples per group
        largest = max((i for i, size in enumerate(sizes) if counts[i] < size), key=lambda i: sizes[i] / counts[i])
        counts[largest] += 1
    return counts


def k_means(points: Tensor, count: int, seed: int = 0) -> Tensor:
    """Labels [n] from 0 on, without gaps, of at most `count` clusters; starts spread out (k-means++), deterministic."""
    from scipy.cluster.vq import kmeans2  # here, because it is rarely needed

    points = points.detach().cpu().double()
    clusters = min(count, len(points.unique(dim=0)))
    labels = kmeans2(points.numpy(), clusters, iter=100, minit="++", seed=seed)[1]  # type: ignore[call-arg]  # `rng` in later ones
    return torch.from_numpy(labels).long().unique(return_inverse=True)[1]
