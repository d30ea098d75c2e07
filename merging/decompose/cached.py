"""Decompositions on a device, each computed once per content where there is a cache."""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from merging.cache import Cache, code, key_of
from merging.checkpoints import digest
from merging.decompose import svd as factors
from merging.decompose import tucker as core
from merging.decompose.svd import SVD
from merging.decompose.tucker import Tucker

CPU = torch.device("cpu")
SVD_CODE, SVD_LIBRARIES = ("merging.decompose.svd",), ("numpy", "scipy")  # what made an entry of the cache
TUCKER_CODE = (*SVD_CODE, "merging.decompose.accelerated", "merging.decompose.tucker", "merging.ops")
TUCKER_LIBRARIES = (*SVD_LIBRARIES, "tensorly")
_ACCELERATOR = threading.Lock()  # torch.linalg sets itself up at its first call on a GPU, in one thread only


def on(device: torch.device, function: Callable[..., Any], tensor: Tensor, *options: Any) -> Any:
    """`function(tensor, ...)` computed on a device; the tensor, or tuple of tensors, that it gives lies on the CPU."""
    if device.type == "cpu":
        return function(tensor, *options)
    with _ACCELERATOR:
        result = function(tensor.to(device), *options)
    return result.cpu() if isinstance(result, Tensor) else type(result)(*(part.cpu() for part in result))


def svd(matrix: Tensor, cache: Cache | None, rank: int | None = None, device: torch.device = CPU) -> SVD:
    """Leading `rank` singular triplets (default: all) of a matrix [m, n].

    A smaller rank is cut from what the cache holds, a larger one replaces it.
    """
    most = min(matrix.shape) if rank is None else rank
    if cache is None:
        return on(device, factors.svd, matrix, most)
    key = key_of("svd", code(SVD_CODE, SVD_LIBRARIES), digest(matrix), device.type)
    u, s, vh = SVD(**cache.tensors(key, lambda: on(device, factors.svd, matrix, most)._asdict(),
                                   lambda stored: len(stored["s"]) >= most))  # fmt: skip
    return SVD(u[:, :most], s[:most], vh[:most])


def tucker(
    stack: Tensor,
    cache: Cache | None,
    ranks: Sequence[int],
    engine: str = "hooi",
    device: torch.device = CPU,
    sides: Sequence[int] | None = None,
) -> Tucker:
    """Tucker decomposition of a stack [T, m, n], or the core of one with these sides, at ranks (r_t, r_o, r_i).

    Smaller ranks are never cut from larger ones in the cache: where spectra are flat that costs up to 0.4 % of the
    error, and a result would depend on what was computed before it. A sweep that accepts this: tucker_many.
    """
    decompose = partial(core.tucker, engine=engine, sides=sides)
    if cache is None:
        return on(device, decompose, stack, ranks)
    how = (list(ranks), engine, device.type, sides and list(sides))
    key = key_of("tucker", code(TUCKER_CODE, TUCKER_LIBRARIES), digest(stack), *how)
    return Tucker(**cache.tensors(key, lambda: on(device, decompose, stack, ranks)._asdict()))
