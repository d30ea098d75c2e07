"""The decompositions of this package in torch alone and in double precision, for tensors on an accelerator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from merging.decompose.svd import EPS, SVD
from merging.decompose.tucker import Tucker


def svd(matrix: Tensor, rank: int | None = None) -> SVD:
    """As decompose.svd.svd, up to rounding: fp32 on the matrix's device."""
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vh = svd(matrix.T, rank)
        return SVD(vh.T, s, u.T)
    tall = _double(matrix)
    v = torch.linalg.eigh(tall.T @ tall)[1].flip(1)[:, :rank]
    v = v * v.gather(0, v.abs().argmax(0, keepdim=True)).sign()
    u = tall @ v
    s = u.norm(dim=0)  # more exact than the square root of the eigenvalue
    s, order = s.sort(descending=True, stable=True)
    present = s > 2 * EPS * tall.norm()
    u, v = u[:, order] / s.where(present, 1), v[:, order]
    return SVD((u * present).float(), (s * present).float(), (v * present).T.float())


def polar(matrix: Tensor) -> Tensor:
    """As decompose.svd.polar, up to rounding: fp32 on the matrix's device."""
    if matrix.shape[0] < matrix.shape[1]:
        return polar(matrix.T).T
    tall = _double(matrix)
    values, v = torch.linalg.eigh(tall.T @ tall)
    s = values.clamp_min(0).sqrt()
    half = v * (s > 2 * EPS * tall.norm()) / s.sqrt().clamp_min(1e-300)
    return (tall @ (half @ half.T)).float()


def tucker(stack: Tensor, ranks: Sequence[int], sweeps: int = 10, tol: float = 1e-6) -> Tucker:
    """HOOI as in decompose.tucker.tucker, with a new basis in every step: fp32 on the stack's device."""
    tensor, bases = _double(stack), {}
    free = [mode for mode in sorted(range(3), key=lambda mode: stack.shape[mode]) if ranks[mode] < stack.shape[mode]]
    for mode in free:
        bases[mode] = _leading(_project(tensor, bases), mode, ranks[mode])
    kept = _project(tensor, bases).norm()
    for _ in range(sweeps if len(free) > 1 else 0):
        for mode in free:
            others = {other: basis for other, basis in bases.items() if other != mode}
            bases[mode] = _leading(_project(tensor, others), mode, ranks[mode])
        norm = _project(tensor, bases).norm()
        if norm - kept <= tol * norm:
            break
        kept = norm
    core = _project(tensor, bases)
    factors = [bases[mode] if mode in bases else torch.eye(stack.shape[mode]).to(tensor) for mode in range(3)]
    return Tucker(*(part.float().contiguous() for part in (core, *factors)))


def _double(tensor: Tensor) -> Tensor:
    """Raises ValueError for a tensor that is not finite."""
    if not tensor.isfinite().all():
        raise ValueError("the matrix holds NaN or infinity")
    return tensor.detach().double()


def _project(tensor: Tensor, bases: dict[int, Tensor]) -> Tensor:
    """The tensor with every mode that has a basis [size, rank] multiplied by its transpose."""
    for mode, basis in bases.items():
        tensor = (tensor.movedim(mode, -1) @ basis).movedim(-1, mode)
    return tensor


def _leading(tensor: Tensor, mode: int, rank: int) -> Tensor:
    """The leading left singular vectors [size, rank] of an unfolding, completed if it has fewer."""
    unfolded = tensor.movedim(mode, 0).flatten(1)
    if len(unfolded) <= unfolded.shape[1]:
        return torch.linalg.eigh(unfolded @ unfolded.T)[1].flip(1)[:, :rank]
    images = unfolded @ torch.linalg.eigh(unfolded.T @ unfolded)[1].flip(1)[:, :rank]
    return torch.linalg.qr(torch.nn.functional.pad(images, (0, rank - images.shape[1])))[0]
