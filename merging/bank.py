"""What every bank of changes can do, and the banks that hold whole changes one by one."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from merging.products import add_product, alike, in_use, over_tokens


class Bank(nn.Module):
    """`parts` changes of a parameter of `shape`. The tensors are buffers, so that a bank moves with its model."""

    shape: torch.Size
    parts: int
    factored = False  # whether x can be changed at less work than by a matrix of its own

    def mix(self, weights: Tensor) -> Tensor:
        """sum_g weights[..., g] own_g as dense tensors [..., *shape]."""
        raise NotImplementedError

    def forward(self, x: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
        """onto [B, N, m] plus the mixed change applied to x [B, N, n], a new tensor."""
        return self.add_(x, weights, onto.clone(memory_format=torch.contiguous_format))

    def add_(self, x: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
        """As calling the bank, but written into `onto`, which must be nobody else's. Gradients flow."""
        raise NotImplementedError

    def transposed(self) -> "Bank":
        """The bank of the transposed matrix."""
        every = torch.eye(self.parts, device=next((tensor.device for tensor in self.buffers()), None))
        return Dense(self.mix(every).transpose(1, 2))

    def stored(self) -> "Bank":
        """The bank as a file holds it: all its numbers in tensors, `bytes` of them."""
        return self

    def opened(self) -> "Bank":
        """What a bank as a file holds it becomes in memory."""
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
        """Multiply-accumulates that the bank adds for one sample of `tokens` tokens, `used` of its parts at work."""
        raise NotImplementedError

    def mix_macs(self) -> int:
        """Multiply-accumulates of one dense mixed change."""
        return self.parts * self.shape.numel()


class Whole(Bank):
    """Changes that are known one by one, as dense tensors."""

    def part(self, index: int) -> Tensor:
        """own_index [*shape]."""
        raise NotImplementedError

    def mix(self, weights: Tensor) -> Tensor:
        total = weights.new_zeros((*weights.shape[:-1], *self.shape))
        for index in in_use(weights):
            share = weights[..., index].view((*weights.shape[:-1], *[1] * len(self.shape)))
            total = total + share * self.part(index)
        return total

    def add_(self, x: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
        for index in in_use(weights):  # one change at a time: no matrix per sample, and none of all changes
            share = over_tokens(weights[..., index : index + 1])
            onto = add_product(onto, x * share.to(x.dtype), self.part(index).reshape(self.sides()))
        return onto

    def macs(self, tokens: int, per_token: bool = False, used: int | None = None) -> int:
        return (used or self.parts) * self.shape.numel() * (tokens if per_token and len(self.shape) > 1 else 1)


class Dense(Whole):
    """Full changes [G, *shape], of matrices (a layer then builds one private matrix per sample) and of vectors."""

    def __init__(self, changes: Tensor, shape: torch.Size | None = None):
        super().__init__()
        self.register_buffer("changes", changes)
        self.changes: Tensor
        self.parts, self.shape = len(changes), torch.Size(changes.shape[1:] if shape is None else shape)

    def part(self, index: int) -> Tensor:
        return self.changes[index].view(self.shape)

    def mix(self, weights: Tensor) -> Tensor:
        weights, flat = alike(weights, self.changes.reshape(self.parts, self.shape.numel()))
        return (weights @ flat).view((*weights.shape[:-1], *self.shape))

    def stored(self) -> "Bank":
        """As it is, or compressed where most numbers are zero."""
        return Sparse.of(self.changes, self.shape) if self.bytes < self.changes.nbytes else self

    @property
    def params(self) -> int:
        """Numbers, or where most are zero the others, and 32 bits of the mask counted as one."""
        whole, kept = self.changes.numel(), int(self.changes.count_nonzero())
        return min(whole, kept + -(-whole // 32))

    @property
    def bytes(self) -> int:
        """Values, or where most are zero the other values and one bit for each."""
        whole, kept = self.changes.nbytes, int(self.changes.count_nonzero())
        return min(whole, kept * self.changes.element_size() + -(-self.changes.numel() // 8))


class Sparse(Bank):
    """Dense changes as a file holds them where most are zero: the other `values` [K], one after the other, and `bits`.

    Opened it is Dense again, equal in every number (a zero that was negative is positive).
    """

    def __init__(self, values: Tensor, bits: Tensor, parts: int, shape: torch.Size):
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("bits", bits)
        self.values: Tensor
        self.bits: Tensor
        self.parts, self.shape = parts, shape

    @classmethod
    def of(cls, changes: Tensor, shape: torch.Size) -> "Sparse":
        """From changes [G, *shape]."""
        flat = changes.reshape(-1)
        kept = flat != 0
        return cls(flat[kept], packed(kept[None])[0], len(changes), shape)

    def opened(self) -> Dense:
        size = self.parts * self.shape.numel()
        changes = self.values.new_zeros(size).masked_scatter_(unpacked(self.bits, size), self.values)
        return Dense(changes.view(self.parts, *self.shape))

    def mix(self, weights: Tensor) -> Tensor:
        return self.opened().mix(weights)

    def add_(self, x: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
        return self.opened().add_(x, weights, onto)

    def macs(self, tokens: int, per_token: bool = False, used: int | None = None) -> int:
        return self.opened().macs(tokens, per_token, used)


def packed(flags: Tensor) -> Tensor:
    """Booleans [G, n] as bits, uint8 [G, ceil(n / 8)], the first in the lowest one."""
    padded = functional.pad(flags, (0, -flags.shape[1] % 8)).unflatten(1, (-1, 8))
    return (padded * _powers(flags.device)).sum(-1, dtype=torch.uint8)


def unpacked(bits: Tensor, count: int) -> Tensor:
    """The first `count` booleans of one row of bits."""
    return (bits[:, None] & _powers(bits.device)).bool().flatten()[:count]


def _powers(device: torch.device) -> Tensor:
    return 2 ** torch.arange(8, dtype=torch.uint8, device=device)


def identity(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """Equal for two names of the same numbers, as long as both exist; a tensor without numbers is like no other."""
    return id(tensor) if tensor.is_meta else tensor.data_ptr(), tensor.shape, tensor.stride()


def repeated(banks: Iterable[Bank]) -> list[Tensor]:
    """Tensors that an earlier one of the banks holds too: those decomposed together share factors."""
    tensors = [tensor for bank in banks for tensor in bank.buffers()]
    first = {identity(tensor): index for index, tensor in reversed(list(enumerate(tensors)))}
    return [tensor for index, tensor in enumerate(tensors) if first[identity(tensor)] != index]
