"""Reversible Model Merging written down place by place, sharing no code with merging/."""

import torch


def points(vectors, count):
    """T vectors of r numbers: their mean and what of the rest lies along the `count` leading directions."""
    mean = sum(vectors) / len(vectors)
    centred = torch.stack([vector - mean for vector in vectors], 1)
    values, directions = torch.linalg.eigh(centred @ centred.T)
    leading = directions[:, values.argsort(descending=True)[:count]]
    return [mean + leading @ (leading.T @ (vector - mean)) for vector in vectors]


def rmm(factors, count):
    """Changes [m, n] of factors (up [m, r], down [r, n]) of each task."""
    ups, downs = ([factor.clone() for factor in side] for side in zip(*factors, strict=True))
    for row in range(len(ups[0])):
        for up, point in zip(ups, points([up[row].clone() for up in ups], count), strict=True):
            up[row] = point
    for column in range(downs[0].shape[1]):
        for down, point in zip(downs, points([down[:, column].clone() for down in downs], count), strict=True):
            down[:, column] = point
    return [up @ down for up, down in zip(ups, downs, strict=True)]


def canonical(matrix, rank):
    """U sqrt(S) and sqrt(S) V^T, the largest entry of every column of U positive."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    for index in range(rank):
        if u[:, index][u[:, index].abs().argmax()] < 0:
            u[:, index], vh[index] = -u[:, index], -vh[index]
    return u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * vh[:rank]
