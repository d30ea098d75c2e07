"""Changes with shared factors and a small core."""

import torch
from torch import Tensor
from torch.nn import functional

from merging.deltas.base import Delta
from merging.deltas.products import add_product, alike, over_tokens


class Tucker(Delta):
    """delta_g = out (sum_j task[g, j] core[j]) in^T: core [r_t, r_o, r_i], task [G, r_t], out [m, r_o], in [n, r_i]."""

    factored = True

    def __init__(self, core: Tensor, task: Tensor, out: Tensor, into: Tensor, shape: torch.Size | None = None):
        super().__init__()
        for name, tensor in (("core", core), ("task", task), ("out", out), ("into", into)):
            self.register_buffer(name, tensor)
        self.core: Tensor
        self.task: Tensor
        self.out: Tensor
        self.into: Tensor
        self.parts, self.shape = len(task), torch.Size((len(out), len(into)) if shape is None else shape)

    def _mixed(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One core [..., r_o, r_i] for weights [..., G], `out` and `into`, all in one dtype."""
        weights, task, core, out, into = alike(weights, self.task, self.core, self.out, self.into)
        return ((weights @ task) @ core.flatten(1)).unflatten(-1, core.shape[1:]), out, into

    def mix(self, weights: Tensor) -> Tensor:
        core, out, into = self._mixed(weights)
        return (out @ core @ into.T).view((*weights.shape[:-1], *self.shape))

    def add_(self, x: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
        inner, mixed = x @ self.into, weights.to(self.task.dtype) @ self.task
        if weights.ndim < 3:  # a small core per sample
            core = (mixed @ self.core.flatten(1)).unflatten(-1, self.core.shape[1:])
            return add_product(onto, inner @ core.mT.to(inner.dtype), self.out)
        total = torch.zeros(*inner.shape[:-1], self.core.shape[1], dtype=inner.dtype, device=inner.device)
        for index, core in enumerate(self.core):
            total = add_product(total, inner * mixed[..., index : index + 1].to(inner.dtype), core)
        return add_product(onto, total, self.out)

    def looked_up(self, ids: Tensor, weights: Tensor) -> Tensor:
        core, out, into = self._mixed(over_tokens(weights))  # [.., 1 or N, r_o, r_i]
        return (functional.embedding(ids, out)[..., None, :] @ core)[..., 0, :] @ into.T

    def transposed(self) -> "Tucker":
        return Tucker(self.core.transpose(1, 2).contiguous(), self.task, self.into, self.out)

    def macs(self, tokens: int, per_token: bool = False, used: int | None = None) -> int:
        (_, r_o, r_i), core = self.core.shape, self.core.numel()
        outside = tokens * (self.into.numel() + self.out.numel())
        return outside + (tokens * core if per_token else core + tokens * r_o * r_i)

    def mix_macs(self) -> int:
        return self.core.numel() + self.core.shape[1] * self.into.numel() + self.core.shape[1] * self.shape.numel()
