"""Singular value decompositions and polar factors: the only place that decomposes.

Everything goes through the Gram matrix of the short side in double precision, where products of fp32 numbers are exact.
Rounding a matrix to fp32 creates singular values of up to `EPS * ||A||_F` out of nothing: twice that is the limit below
which a direction counts as absent. Near that limit vectors are known to a few digits only, however they are computed.

Several threads may decompose at once (the interpreter lock is not held); each should then use one BLAS thread.
"""

import ctypes
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

EPS = float(np.finfo(np.float32).eps)


class SVD(NamedTuple):
    """A ~ u diag(s) vh: u [m, k], s [k] descending, vh [k, n]."""

    u: Tensor
    s: Tensor
    vh: Tensor


def svd(matrix: Tensor, rank: int | None = None) -> SVD:
    """The leading `rank` singular triplets of [m, n] (default and at most min(m, n)), in fp32 on the matrix's device.

    A triplet beyond the numerical rank is zero in all three parts, so u and vh have orthonormal or zero vectors. The
    largest entry of each vector of the short side is positive. Raises ValueError for a matrix that is not finite.
    """
    if not matrix.numel():
        return SVD(matrix.new_empty(len(matrix), 0), matrix.new_empty(0), matrix.new_empty(0, matrix.shape[1]))
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vh = svd(matrix.T, rank)
        return SVD(vh.T, s, u.T)
    tall = matrix.detach().double()
    _, v = leading_vectors(tall.T @ tall, tall.shape[1] if rank is None else min(rank, tall.shape[1]))
    v = v * v.gather(0, v.abs().argmax(0, keepdim=True)).sign()
    u = tall @ v
    s, order = u.norm(dim=0).sort(descending=True, stable=True)  # more exact than square roots of the eigenvalues
    present = s > _absent(tall)
    u, v = u[:, order] * present / s.where(present, 1), v[:, order] * present
    return SVD(*(part.float().contiguous() for part in (u, s * present, v.T)))


def polar(matrix: Tensor) -> Tensor:
    """U V^T of [m, n] = U S V^T over the numerical rank: the nearest matrix with orthonormal columns or rows, fp32.

    `(polar(matrix) * matrix).sum()` is the sum of singular values. Raises ValueError for a matrix that is not finite.
    """
    if not matrix.numel():
        return matrix.new_empty(matrix.shape)
    if matrix.shape[0] < matrix.shape[1]:
        return polar(matrix.T).T
    tall = matrix.detach().double()
    values, v = leading_vectors(tall.T @ tall, tall.shape[1])
    s = values.clamp_min(0).sqrt()
    half = v * (s > _absent(tall)) / s.sqrt().clamp_min(1e-300)
    return (tall @ (half @ half.T)).float()


def leading_vectors(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenvalues [count] of a Gram matrix [n, n] in fp64, descending, and eigenvectors [n, count].

    On a CPU bisection finds a few pairs for half the price of all; from a quarter of them on, all at once is cheaper.
    Overwrites its argument. Raises ValueError for a matrix that is not finite.
    """
    size = len(gram)
    if not gram.trace().isfinite():
        raise ValueError("the matrix holds NaN or infinity")
    if gram.device.type != "cpu":
        values, vectors = torch.linalg.eigh(gram)
    else:
        values, rows = _syevr(gram.numpy(), 0 if 4 * count > size else size - max(count, 1))
        values, vectors = torch.from_numpy(values), torch.from_numpy(rows).T
    return values.flip(0)[:count], vectors.flip(1)[:, :count]


def _absent(matrix: Tensor) -> float:
    """The singular value that rounding to fp32 may create."""
    return 2 * EPS * float(matrix.norm())


def _syevr(symmetric: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues from the `first` on, ascending, and eigenvectors as rows (LAPACK); overwrites its argument."""
    size = len(symmetric)
    values, vectors = np.empty(size), np.empty((size - first, size))
    # 64-bit zeros also serve a LAPACK with 32-bit integers (little-endian machines)
    work, indices, support = np.empty(72 * size), np.zeros(10 * size, np.int64), np.zeros(2 * size, np.int64)
    count, status, unused = ctypes.c_int64(), ctypes.c_int64(), ctypes.byref(ctypes.c_double())
    number = lambda value: ctypes.byref(ctypes.c_int64(value))  # noqa: E731
    _routine("dsyevr", 21)(
        *(b"V", b"I", b"L", number(size), symmetric.ctypes, number(size)),
        *(unused, unused, number(first + 1), number(size), unused),
        *(ctypes.byref(count), values.ctypes, vectors.ctypes, number(size), support.ctypes),
        *(work.ctypes, number(work.size), indices.ctypes, number(indices.size), ctypes.byref(status)),
    )
    if status.value or count.value != len(vectors):
        raise np.linalg.LinAlgError(f"dsyevr found {count.value} of {len(vectors)} eigenvalues (status {status.value})")
    return values[: len(vectors)], vectors


@cache
def _routine(name: str, arguments: int):
    """scipy's LAPACK as a plain C function: scipy.linalg.eigh runs the same code, but keeps the interpreter lock."""
    from scipy.linalg import cython_lapack  # pyright: ignore[reportAttributeAccessIssue]

    prototype, objects = ctypes.PYFUNCTYPE, ctypes.pythonapi
    signature = prototype(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", objects))
    address = prototype(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", objects))
    capsule = cython_lapack.__pyx_capi__[name]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(address(capsule, signature(capsule)))
