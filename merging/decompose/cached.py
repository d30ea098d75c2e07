"""Decompositions, each computed once per content where there is a cache."""

from collections.abc import Sequence

from torch import Tensor

from merging.cache import Cache, code, key_of
from merging.checkpoints import digest
from merging.decompose import svd as factors
from merging.decompose import tucker as core
from merging.decompose.svd import SVD
from merging.decompose.tucker import Tucker

SVD_CODE, SVD_LIBRARIES = ("merging.decompose.svd",), ("numpy", "scipy")  # what an entry of the cache was made by
TUCKER_CODE, TUCKER_LIBRARIES = (*SVD_CODE, "merging.decompose.tucker", "merging.ops"), (*SVD_LIBRARIES, "tensorly")


def svd(matrix: Tensor, cache: Cache | None, rank: int | None = None) -> SVD:
    """Leading `rank` singular triplets (default: all) of a matrix [m, n].

    A smaller rank is cut from what the cache holds, a larger one replaces it.
    """
    most = min(matrix.shape) if rank is None else rank
    if cache is None:
        return factors.svd(matrix, most)
    key, enough = key_of("svd", code(SVD_CODE, SVD_LIBRARIES), digest(matrix)), lambda stored: len(stored["s"]) >= most
    u, s, vh = SVD(**cache.tensors(key, lambda: factors.svd(matrix, most)._asdict(), enough))
    return SVD(u[:, :most], s[:most], vh[:most])


def tucker(stack: Tensor, cache: Cache | None, ranks: Sequence[int], engine: str = "hooi") -> Tucker:
    """Tucker decomposition of a stack [T, m, n] at ranks (r_t, r_o, r_i).

    Smaller ranks are never cut from larger ones in the cache: where spectra are flat that costs up to 0.4 % of the
    error, and a result would depend on what was computed before it. A sweep that accepts this: tucker_many.
    """
    if cache is None:
        return core.tucker(stack, ranks, engine=engine)
    key = key_of("tucker", code(TUCKER_CODE, TUCKER_LIBRARIES), digest(stack), list(ranks), engine)
    return Tucker(**cache.tensors(key, lambda: core.tucker(stack, ranks, engine=engine)._asdict()))
