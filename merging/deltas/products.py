"""Products that deltas share: gating weights spread over features, matrices applied in place."""

import torch
from torch import Tensor


def alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All in the dtype that holds every one: fp32 weights mix bf16 factors in fp32."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def in_use(weights: Tensor) -> list[int]:
    """Indices of the parts with a non-zero weight; all where looking would cost a wait, a gradient or a graph."""
    every = list(range(weights.shape[-1]))
    blind = torch.compiler.is_compiling() or weights.requires_grad or weights.device.type == "meta"
    if blind or (weights.ndim > 1 and weights.device.type != "cpu"):
        return every
    used = (weights if weights.ndim == 1 else weights.flatten(0, -2).any(0)).tolist()
    return [index for index in every if used[index]]


def over_tokens(weights: Tensor) -> Tensor:
    """Weights [G], [B, G] or [B, N, G] as they multiply features [B, N, G]."""
    return weights[:, None] if weights.ndim == 2 else weights


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor; in place where no gradient is recorded, so x must be nobody else's."""
    factor = factor.to(x.dtype)
    return x * factor if torch.is_grad_enabled() else x.mul_(factor)


def add_product(onto: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """onto [B, N, m] += x [B, N, k] weight [m, k]^T in one product, without a tensor of that size beside it."""
    rows = onto.view(-1, onto.shape[-1])
    rows.addmm_(x.flatten(0, -2).to(onto.dtype), weight.T.to(onto.dtype))
    return onto
