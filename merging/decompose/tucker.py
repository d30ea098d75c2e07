"""Tucker decompositions of stacks of task matrices [T, m, n].

Bases come from the smaller Gram matrix of each unfolding in double precision, never from an unfolding itself. HOOI
sweeps work in fp32: a basis is replaced by the best one in the span of itself and its image under the Gram matrix,
which keeps more energy in every step and, after a sweep or two, as much as a new decomposition would.

Several threads may decompose at once (the interpreter lock is not held); each should then use one BLAS thread.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from merging.decompose.svd import leading_vectors
from merging.errors import UserError
from merging.ops import generator
from merging.threads import each

Bases = dict[int, Tensor]  # by mode; where there is none, the factor is the identity
Triple = tuple[int, int, int]  # task, out, in
Engine = Literal["hooi", "st_hosvd", "hosvd", "randomised", "hooi_random", "tensorly"]
ENGINES = get_args(Engine)
EXACT = 256  # up to this size a Gram matrix is decomposed in every sweep
LARGE = 1 << 20  # from this many numbers on, tasks are worth spreading over the cores


class Tucker(NamedTuple):
    """X_t ~ out (sum_j task[t, j] core[j]) in_^T with orthonormal columns in all three factors, fp32."""

    core: Tensor  # [r_t, r_o, r_i]
    task: Tensor  # [T, r_t], the identity if r_t = T
    out: Tensor  # [m, r_o]
    in_: Tensor  # [n, r_i]

    @property
    def shape(self) -> Triple:
        return len(self.task), len(self.out), len(self.in_)

    def dense(self) -> Tensor:
        """The approximation [T, m, n]."""
        return self.out @ _times(self.core, self.task.T, 0) @ self.in_.T


def full_ranks(shape: Sequence[int]) -> Triple:
    """The ranks that lose nothing of any stack [T, m, n]: no unfolding has a larger rank."""
    tasks, m, n = shape
    return min(tasks, m * n), min(m, tasks * n), min(n, tasks * m)


def stored(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """Numbers in the core and the three factors."""
    return math.prod(ranks) + sum(size * rank for size, rank in zip(shape, ranks, strict=True))


def matched_rank(tucker_params: int, shape: Sequence[int]) -> int:
    """The largest rank at which T singular value decompositions store no more numbers than that."""
    return tucker_params // (shape[0] * (sum(shape[1:]) + 1))


def tucker(
    stack: Tensor,
    ranks: Sequence[int],
    *,
    engine: str = "hooi",
    sweeps: int = 10,
    tol: float = 1e-6,
    sides: Sequence[int] | None = None,
) -> Tucker:
    """Decompose [T, m, n] at ranks (r_t, r_o, r_i), on the stack's device.

    Engines: "hosvd" truncates every unfolding; "st_hosvd" truncates one after the other, smaller sides first; "hooi"
    starts there and sweeps until the norm kept grows by less than `tol` of itself, "hooi_random" from random bases;
    "randomised" is "st_hosvd" with bases from random sketches (Halko et al., 2011); "tensorly" is that library's HOOI.
    A rank as large as its side asks for no decomposition: the factor is the identity (for "hosvd" only the task's).
    sides: those of a larger stack whose core this one is; their order is that of the modes. Raises UserError for a
    stack that is not finite and for ranks below 1 or above the full ones.
    """
    check(stack, ranks)
    if engine not in ENGINES:
        raise UserError(f"Tucker engine {engine!r} is unknown; engines are {', '.join(ENGINES)}.")
    return _decompose(stack, ranks, engine, sweeps, tol, stack.shape if sides is None else sides)


def tucker_many(stack: Tensor, triples: Sequence[Sequence[int]]) -> list[Tucker]:
    """HOOI at several ranks for little more than once at the largest: the others by four sweeps on the core of that.

    Optimal within its subspaces only: on ten ranks of a noisy 8 x 3072 x 768 errors were up to 0.3% above direct ones.
    """
    large = tucker(stack, [max(ranks) for ranks in zip(*triples, strict=True)])

    def cut(ranks: Sequence[int]) -> Tucker:
        small = _decompose(large.core, ranks, "hooi", 4, 1e-6, large.core.shape)
        return Tucker(small.core, large.task @ small.task, large.out @ small.out, large.in_ @ small.in_)

    return [large if tuple(ranks) == tuple(large.core.shape) else cut(ranks) for ranks in triples]


def check(source: Tensor | Tucker, ranks: Sequence[float] = (1, 1, 1)) -> Triple:
    """The largest ranks of a stack, or one known by its factors; UserError for what is no finite one, and beyond."""
    if len(source.shape) != 3 or 0 in source.shape:
        raise UserError(f"A Tucker decomposition takes a stack [tasks, m, n], not a shape {[*source.shape]}.")
    matrices = source.core if isinstance(source, Tucker) else source
    if broken := [task for task, matrix in enumerate(matrices) if not matrix.isfinite().all()]:
        raise UserError(f"The matrices of tasks {broken} of the stack hold NaN or infinity.")
    limits, (t, m, n) = full_ranks(source.shape), source.shape
    sides = (("T, m n", t, m * n), ("m, T n", m, t * n), ("n, T m", n, t * m))
    for mode, rank, limit, (names, size, others) in zip(("task", "out", "in"), ranks, limits, sides, strict=True):
        if isinstance(rank, str) or rank < 1 or rank != int(rank):
            raise UserError(f"{mode} rank {rank} is not a whole number from 1 on.")
        if rank > limit:
            raise UserError(
                f"{mode} rank {rank} is above the full rank {limit} = min({names}) = min({size}, {others})."
            )
    return limits


def _decompose(
    stack: Tensor, ranks: Sequence[int], engine: str, sweeps: int, tol: float, sides: Sequence[int]
) -> Tucker:
    """`tucker` without checks; ranks may be too large for each other, then bases are completed."""
    if stack.device.type != "cpu" and engine == "hooi":
        from merging.decompose import accelerated  # late: it builds on this module

        return accelerated.tucker(stack, ranks, sweeps, tol)
    tensor = stack.detach().float().cpu().contiguous()
    order = sorted((0, 1, 2), key=lambda mode: sides[mode])
    full = (len(tensor), math.inf, math.inf) if engine in ("hosvd", "tensorly") else tensor.shape
    free = [mode for mode in order if ranks[mode] < full[mode]]
    alone = torch.get_num_threads() > 1 and engine != "tensorly"
    with threadpool_limits(1 if alone else None, "blas"):  # `each` spreads the work: BLAS threads would fight it
        bases = (_tensorly if engine == "tensorly" else _bases)(tensor, ranks, free, engine, sweeps, tol)
    factors = [bases[mode] if mode in bases else torch.eye(tensor.shape[mode]) for mode in range(3)]
    return Tucker(*(part.contiguous().to(stack.device) for part in (_project(tensor, bases), *factors)))


def _bases(tensor: Tensor, ranks: Sequence[int], free: Sequence[int], engine: str, sweeps: int, tol: float) -> Bases:
    """HOSVD or, if the tensor shrinks with every basis, its sequentially truncated form; then HOOI sweeps over it."""
    bases, rest, begin = {}, tensor, {"randomised": _sketched, "hooi_random": _random}.get(engine, _basis)
    begin = _basis if len(free) == 1 and engine != "randomised" else begin  # a single basis is optimal
    for mode in free:
        bases[mode] = begin(rest, mode, ranks[mode])
        if engine not in ("hosvd", "hooi_random"):
            rest = _times(rest, bases[mode], mode)
    kept = norm = 0.0 if rest is tensor else float(rest.double().norm())
    for _ in range(sweeps if engine.startswith("hooi") and len(free) > 1 else 0):
        for mode, basis in bases.items():
            projected = _project(tensor, {other: bases[other] for other in bases if other != mode})
            bases[mode] = _better(projected, mode, basis)
            norm = float(_times(projected, bases[mode], mode).double().norm())
        if norm - kept <= tol * norm:
            break
        kept = norm
    return bases


def _tensorly(tensor: Tensor, ranks: Sequence[int], free: Sequence[int], _: str, sweeps: int, tol: float) -> Bases:
    import tensorly
    from tensorly import decomposition

    with tensorly.backend_context("numpy"):  # pyright: ignore[reportAttributeAccessIssue]
        factors = decomposition.tucker(tensor.numpy(), rank=list(ranks), n_iter_max=sweeps, init="svd", tol=tol)
    return {mode: torch.from_numpy(np.ascontiguousarray(factors[1][mode])) for mode in free}


def _times(tensor: Tensor, basis: Tensor, mode: int) -> Tensor:
    """The tensor with one mode multiplied by basis^T: [size, rank] turns a size into a rank."""
    if mode == 0:
        return (basis.T @ tensor.flatten(1)).unflatten(1, tensor.shape[1:])
    if tensor.numel() < LARGE:
        return basis.T @ tensor if mode == 1 else tensor @ basis
    array = basis.numpy()
    product = (lambda matrix: array.T @ matrix.numpy()) if mode == 1 else (lambda matrix: matrix.numpy() @ array)
    return torch.from_numpy(np.stack(each(product, tensor)))


def _project(tensor: Tensor, bases: Bases) -> Tensor:
    """The tensor in all the bases, the one that shrinks it most first."""
    for mode in sorted(bases, key=lambda mode: bases[mode].shape[1] / len(bases[mode])):
        tensor = _times(tensor, bases[mode], mode)
    return tensor


def _gram(tensor: Tensor, mode: int) -> np.ndarray:
    """The Gram matrix of the rows or columns of an unfolding, whichever are fewer; fp64."""
    size = tensor.shape[mode]
    if size * size > tensor.numel():
        unfolded = tensor.movedim(mode, 0).flatten(1).double().numpy()
        return unfolded.T @ unfolded

    def add(pieces: Iterable[Tensor]) -> np.ndarray:
        total = np.zeros((size, size))
        for piece in pieces:
            double = piece.double().numpy()
            total += double @ double.T
        return total

    pieces = tensor.flatten(1).split(1 << 18, 1) if mode == 0 else tensor if mode == 1 else tensor.mT
    return np.add(*each(add, (pieces[::2], pieces[1::2]))) if tensor.numel() >= LARGE else add(pieces)


def spectrum(tensor: Tensor, mode: int) -> np.ndarray:
    """Squared singular values of an unfolding, descending, fp64."""
    return np.linalg.eigvalsh(_gram(tensor.detach().float().cpu(), mode))[::-1].clip(0)


def _basis(tensor: Tensor, mode: int, rank: int) -> Tensor:
    """The leading left singular vectors [size, rank] of an unfolding, completed if it has fewer."""
    gram = _gram(tensor, mode)
    vectors = leading_vectors(torch.from_numpy(gram), min(rank, len(gram)))[1].contiguous()
    if len(gram) < tensor.shape[mode]:  # vectors of the columns
        images = tensor.movedim(mode, 0).flatten(1).double() @ vectors
        vectors = torch.linalg.qr(torch.nn.functional.pad(images, (0, rank - images.shape[1])))[0]
    return vectors.float()


def _random(tensor: Tensor, mode: int, rank: int) -> Tensor:
    """Orthonormal columns [size, rank] without a look at the entries; the same for the same sizes."""
    size = tensor.shape[mode]
    return torch.linalg.qr(torch.randn(size, rank, generator=generator("tucker", mode, size, rank)))[0]


def _sketched(tensor: Tensor, mode: int, rank: int) -> Tensor:
    """A basis of an unfolding in the span of a random sketch, eight columns wider, after two power iterations."""
    unfolded = tensor.movedim(mode, 0).flatten(1)
    span = _random(tensor, mode, min(len(unfolded), rank + 8))
    for _ in range(2):
        span = torch.linalg.qr(unfolded @ (unfolded.T @ span))[0]
    return _best_inside(span, unfolded, rank)


def _better(tensor: Tensor, mode: int, basis: Tensor) -> Tensor:
    """A basis of an unfolding that keeps no less energy: the best in the span of this one and its image."""
    unfolded, rank = tensor.movedim(mode, 0).flatten(1), basis.shape[1]
    small = min(unfolded.shape)
    if small <= EXACT or 4 * rank > small:
        return _basis(tensor, mode, rank)
    image = unfolded @ (unfolded.T @ basis)
    image /= image.norm(dim=0).clamp_min(1e-30)
    return _best_inside(torch.linalg.qr(torch.cat([basis, image], 1))[0], unfolded, rank)


def _best_inside(span: Tensor, unfolded: Tensor, rank: int) -> Tensor:
    """The basis [size, rank] in the span of orthonormal columns that keeps the most energy of an unfolding."""
    inside = (span.T @ unfolded).double().numpy()
    return span @ leading_vectors(torch.from_numpy(inside @ inside.T), rank)[1].float()
