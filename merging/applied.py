"""Matrices as they are applied, [out, in], and as they are stored, which some architectures do as [in, out]."""

from torch import Tensor

from merging.backbones.base import FAMILIES
from merging.errors import UserError
from merging.experts import Experts


def is_turned(experts: Experts, key: str) -> bool:
    """Whether a table says that a matrix of attention or FFNs is stored as [in, out].

    All else is taken as it is stored: names that no table has, and CLIP's projection as in published code.
    """
    try:
        info = experts.param(key)
    except UserError:
        return False
    return info.transposed and info.family in FAMILIES


def turned(experts: Experts, key: str, matrices: Tensor) -> Tensor:
    """Matrices [..., m, n] as they are stored as [..., out, in], and the other way: see is_turned."""
    return matrices.mT.contiguous() if is_turned(experts, key) else matrices


def as_applied(experts: Experts, key: str, tensor: Tensor) -> Tensor:
    """A matrix as it is stored, as [out, in]; a convolution by its flattened patches; a vector as it is."""
    matrix = tensor.flatten(1) if tensor.ndim > 2 else tensor
    return matrix.T.contiguous() if experts.param(key).transposed else matrix


def as_stored(experts: Experts, key: str, matrix: Tensor) -> Tensor:
    """The inverse of `as_applied`, in fp32."""
    matrix = matrix.float()
    stored = matrix.T.contiguous() if experts.param(key).transposed else matrix
    return stored.view(experts.specs()[key].shape)
