"""Tucker decompositions in torch alone and in double precision, for tensors on an accelerator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from merging.decompose.svd import leading_vectors
from merging.decompose.tucker import Tucker


def tucker(stack: Tensor, ranks: Sequence[int], sweeps: int = 10, tol: float = 1e-6) -> Tucker:
    """HOOI as in decompose.tucker.tucker, with a new basis in every step: fp32 on the stack's device."""
    tensor, bases = stack.detach().double(), {}
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


def _project(tensor: Tensor, bases: dict[int, Tensor]) -> Tensor:
    """The tensor with every mode that has a basis [size, rank] multiplied by its transpose."""
    for mode, basis in bases.items():
        tensor = (tensor.movedim(mode, -1) @ basis).movedim(-1, mode)
    return tensor


def _leading(tensor: Tensor, mode: int, rank: int) -> Tensor:
    """The leading left singular vectors [size, rank] of an unfolding, completed if it has fewer."""
    unfolded = tensor.movedim(mode, 0).flatten(1)
    if len(unfolded) <= unfolded.shape[1]:
        return leading_vectors(unfolded @ unfolded.T, rank)[1]
    images = unfolded @ leading_vectors(unfolded.T @ unfolded, rank)[1]
    return torch.linalg.qr(torch.nn.functional.pad(images, (0, rank - images.shape[1])))[0]
