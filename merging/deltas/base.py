"""What every task-specific delta can do: T changes of one parameter, stored in some way, mixed by gating weights."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from merging.deltas.products import add_product, alike, in_use, over_tokens


class Delta(nn.Module):
    """`parts` changes of a parameter of `shape`. The tensors are buffers, so that a delta moves with its model."""

    shape: torch.Size
    parts: int
    factored = False  # whether x can be changed at less work than by a matrix of its own

    def mix(self, weights: Tensor) -> Tensor:
        """sum_g weights[..., g] delta_g as dense tensors [..., *shape]."""
        raise NotImplementedError

    def mixes(self, weights: Tensor, samples: int) -> Iterator[Tensor]:
        """`mix` of weights [B, G], `samples` rows at a time."""
        return map(self.mix, weights.split(samples))

    def forward(self, x: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
        """onto [B, N, m] plus the mixed change applied to x [B, N, n], a new tensor."""
        return self.add_(x, weights, onto.clone(memory_format=torch.contiguous_format))

    def add_(self, x: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
        """In-place variant of `forward`: `onto` must be nobody else's. Gradients flow."""
        raise NotImplementedError

    def transposed(self) -> "Delta":
        """The delta of the transposed matrix, in the same form."""
        raise NotImplementedError

    def looked_up(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Rows `ids` [B, N] of the mixed change of a table [V, d], as [B, N, d]: what an embedding adds."""
        raise NotImplementedError

    def stored(self) -> "Delta":
        """The delta as a file holds it: all its numbers in tensors, `bytes` of them."""
        return self

    def sides(self) -> tuple[int, int]:
        """(m, n) of the matrix; a convolution is one over its flattened patches."""
        return self.shape[0], self.shape[1:].numel()

    def facts(self) -> dict[str, Any]:
        """What `rebuild` needs beside the tensors, as JSON."""
        return {"kind": type(self).__name__, "shape": list(self.shape), "parts": self.parts}

    @property
    def params(self) -> int:
        """Stored numbers."""
        return sum(tensor.numel() for tensor in self.buffers())

    @property
    def bytes(self) -> int:
        """Bytes that a file needs for them."""
        return sum(tensor.nbytes for tensor in self.buffers())

    def macs(self, tokens: int, per_token: bool = False, used: int | None = None) -> int:
        """Multiply-accumulates that the delta adds for one sample of `tokens` tokens, `used` of its parts at work."""
        raise NotImplementedError

    def mix_macs(self) -> int:
        """Multiply-accumulates of one dense mixed change."""
        return self.parts * self.shape.numel()


class Whole(Delta):
    """Changes that are known one by one, as dense tensors."""

    def part(self, index: int) -> Tensor:
        """delta_index [*shape]."""
        raise NotImplementedError

    def mix(self, weights: Tensor) -> Tensor:
        total = weights.new_zeros((*weights.shape[:-1], *self.shape))
        for index in in_use(weights):
            share = weights[..., index].view((*weights.shape[:-1], *[1] * len(self.shape)))
            total = total + share * self.part(index)
        return total

    def mixes(self, weights: Tensor, samples: int) -> Iterator[Tensor]:
        """A change is unpacked once for all rows."""
        used = in_use(weights) or [0]
        weights, changes = alike(weights[:, used], torch.stack([self.part(index).flatten() for index in used]))
        return ((some @ changes).view(-1, *self.shape) for some in weights.split(samples))

    def add_(self, x: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
        for index in in_use(weights):  # one change at a time: no matrix per sample, and none of all changes
            share = over_tokens(weights[..., index : index + 1])
            onto = add_product(onto, x * share.to(x.dtype), self.part(index).reshape(self.sides()))
        return onto

    def looked_up(self, ids: Tensor, weights: Tensor) -> Tensor:
        total = weights.new_zeros((*ids.shape, self.shape[1]))
        for index in in_use(weights):
            total = total + over_tokens(weights[..., index : index + 1]) * self.rows(index, ids)
        return total

    def rows(self, index: int, ids: Tensor) -> Tensor:
        """Rows `ids` of delta_index [V, d], as [*ids.shape, d]."""
        return self.part(index)[ids]

    def macs(self, tokens: int, per_token: bool = False, used: int | None = None) -> int:
        return (used or self.parts) * self.shape.numel() * (tokens if per_token and len(self.shape) > 1 else 1)


def identity(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """Equal for two names of the same numbers, as long as both exist; a tensor without numbers is like no other."""
    return id(tensor) if tensor.is_meta else tensor.data_ptr(), tensor.shape, tensor.stride()


def repeated(deltas: Iterable[Delta]) -> list[Tensor]:
    """Tensors that an earlier one of the deltas holds too: those decomposed together share factors."""
    tensors = [tensor for delta in deltas for tensor in delta.buffers()]
    first = {identity(tensor): index for index, tensor in reversed(list(enumerate(tensors)))}
    return [tensor for index, tensor in enumerate(tensors) if first[identity(tensor)] != index]
