"""Published methods that work matrix by matrix, written down step by step in fp64, sharing no code with merging/.

Each maps task vectors {key: [T, *shape]} to the change of the base {key: [*shape]}, or a stack [T, m, n] to [m, n].
"""

import math

import torch
from torch.linalg import eigh


def _matrices(taus, merge):
    """`merge` for matrices, the mean for all else."""
    return {key: merge(tau) if tau.ndim == 3 else sum(tau) / len(tau) for key, tau in taus.items()}


def _normal_equations(tau):
    """C and D of WUDI's loss: its minimum is D C^-1."""
    c = sum(t.T @ t / t.square().sum() for t in tau)
    d = sum(t @ t.T @ t / t.square().sum() for t in tau)
    values, vectors = eigh(c)
    return d, values.clamp(min=1e-8), vectors


def swudi(taus, f, kept):
    """f: of one eigenvalue and the largest."""

    def merge(tau):
        d, values, v = _normal_equations(tau)
        n = len(values)
        weights = torch.tensor([f(float(value), float(values.max())) for value in values]).double()
        weights[: n - math.ceil(n * kept)] = 0  # ascending
        start = sum(tau)
        minimum = d @ v @ torch.diag(1 / values) @ v.T
        return start + (minimum - start) @ v @ torch.diag(weights) @ v.T

    return _matrices(taus, merge)


def aswudi(taus, rank):
    """rank: of the list of eigenvalues."""

    def merge(tau):
        d, values, v = _normal_equations(tau)
        count = math.ceil(rank(values.tolist()))
        leading = v[:, len(values) - count :]
        exact = d @ leading @ torch.diag(1 / values[len(values) - count :]) @ leading.T
        return exact + sum(tau) - sum(tau) @ leading @ leading.T

    return _matrices(taus, merge)
