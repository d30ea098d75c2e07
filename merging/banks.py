"""How the input-dependent part of a merge is stored: changes of one parameter, mixed by the weights of a gate.

Every bank is own_t in W(x) = W_0 + shared + sum_t w_t(x) own_t. Weights w are any reals: [G] shared by all samples,
[B, G] one row per sample, [B, N, G] one per token. A matrix W is [m, n] and acts as x W^T on x [B, N, n].
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Bank(nn.Module):
    """`parts` changes of a parameter of `shape`. The tensors are buffers, so that a bank moves with its model."""

    shape: torch.Size
    parts: int

    def mix(self, weights: Tensor) -> Tensor:
        """sum_g weights[..., g] own_g as dense tensors [..., *shape]."""
        raise NotImplementedError

    def forward(self, x: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
        """onto [B, N, m] plus the mixed change applied to x [B, N, n]; may write into `onto` without autograd."""
        raise NotImplementedError

    def transposed(self) -> "Bank":
        """The bank of the transposed matrix."""
        raise NotImplementedError

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

    def macs(self, tokens: int, per_token: bool = False) -> int:
        """Multiply-accumulates that the bank adds for one sample of `tokens` tokens."""
        raise NotImplementedError


class Dense(Bank):
    """Full changes [G, *shape]: of matrices (one private matrix per sample is built) and of vectors alike."""

    def __init__(self, changes: Tensor, shape: torch.Size | None = None):
        super().__init__()
        self.register_buffer("changes", changes)
        self.changes: Tensor
        self.parts, self.shape = len(changes), torch.Size(changes.shape[1:] if shape is None else shape)

    def mix(self, weights: Tensor) -> Tensor:
        flat = self.changes.reshape(self.parts, self.shape.numel())
        return (weights @ flat.to(weights.dtype)).view(*weights.shape[:-1], *self.shape)

    def forward(self, x: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
        m, n = self.sides()
        if weights.ndim == 3:  # every change acts on every token
            each = functional.linear(x, self.changes.reshape(-1, n)).unflatten(-1, (self.parts, m))
            return onto + (each * weights[..., None].to(each.dtype)).sum(-2)
        return onto + x @ self.mix(weights).reshape(*weights.shape[:-1], m, n).transpose(-1, -2).to(x.dtype)

    def transposed(self) -> "Dense":
        return Dense(self.changes.transpose(1, 2))

    @property
    def bytes(self) -> int:
        """Values, or where most are zero, the other values and one bit for each."""
        whole, kept = self.changes.nbytes, int(self.changes.count_nonzero())
        return min(whole, kept * self.changes.element_size() + -(-self.changes.numel() // 8))

    def macs(self, tokens: int, per_token: bool = False) -> int:
        size = self.shape.numel()
        return self.parts * size * (tokens if per_token and len(self.shape) > 1 else 1)


class LowRank(Bank):
    """own_g = up_g down_g of rank r: `up` [m, G r] and `down` [G r, n] hold the factors side by side."""

    def __init__(self, up: Tensor, down: Tensor, parts: int, shape: torch.Size | None = None):
        super().__init__()
        self.register_buffer("up", up)
        self.register_buffer("down", down)
        self.up: Tensor
        self.down: Tensor
        self.parts, self.shape = parts, torch.Size((len(up), down.shape[1]) if shape is None else shape)

    @classmethod
    def of(cls, u: Tensor, vh: Tensor, shape: torch.Size | None = None) -> "LowRank":
        """From factors u [G, m, r] and vh [G, r, n]."""
        return cls(u.permute(1, 0, 2).flatten(1).contiguous(), vh.flatten(0, 1).contiguous(), len(u), shape)

    @property
    def rank(self) -> int:
        return self.up.shape[1] // self.parts

    def mix(self, weights: Tensor) -> Tensor:
        scale = weights.repeat_interleave(self.rank, -1)
        return ((self.up * scale[..., None, :]) @ self.down).view(*weights.shape[:-1], *self.shape)

    def forward(self, x: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
        up, down, parts = self.up, self.down, self.parts
        if weights.ndim == 1:  # only those in use
            used = weights.nonzero()[:, 0]
            rows = (used[:, None] * self.rank + torch.arange(self.rank, device=used.device)).flatten()
            up, down, weights, parts = up[:, rows], down[rows], weights[used], len(used)
        inner = functional.linear(x, down).unflatten(-1, (parts, self.rank))
        weights = weights[:, None] if weights.ndim == 2 else weights
        return add_product(onto, (inner * weights[..., None].to(inner.dtype)).flatten(-2), up)

    def transposed(self) -> "LowRank":
        return LowRank(self.down.T.contiguous(), self.up.T.contiguous(), self.parts)

    def macs(self, tokens: int, per_token: bool = False) -> int:
        return tokens * (self.up.numel() + self.down.numel())


class Tucker(Bank):
    """own_g = out (sum_j task[g, j] core[j]) in^T: core [r_t, r_o, r_i], task [G, r_t], out [m, r_o], in [n, r_i]."""

    def __init__(self, core: Tensor, task: Tensor, out: Tensor, into: Tensor, shape: torch.Size | None = None):
        super().__init__()
        for name, tensor in (("core", core), ("task", task), ("out", out), ("into", into)):
            self.register_buffer(name, tensor)
        self.core: Tensor
        self.task: Tensor
        self.out: Tensor
        self.into: Tensor
        self.parts, self.shape = len(task), torch.Size((len(out), len(into)) if shape is None else shape)

    def mix(self, weights: Tensor) -> Tensor:
        core = ((weights @ self.task) @ self.core.flatten(1)).unflatten(-1, self.core.shape[1:])
        return (self.out @ core @ self.into.T).view(*weights.shape[:-1], *self.shape)

    def forward(self, x: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
        inner, mixed = x @ self.into, weights @ self.task.to(weights.dtype)
        if weights.ndim == 3:
            each = functional.linear(inner, self.core.flatten(0, 1)).unflatten(-1, self.core.shape[:2])
            inner = (each * mixed[..., None].to(each.dtype)).sum(-2)
        else:
            core = (mixed @ self.core.flatten(1).to(mixed.dtype)).unflatten(-1, self.core.shape[1:])
            inner = inner @ core.transpose(-1, -2).to(inner.dtype)
        return add_product(onto, inner, self.out)

    def transposed(self) -> "Tucker":
        return Tucker(self.core.transpose(1, 2).contiguous(), self.task, self.into, self.out)

    def macs(self, tokens: int, per_token: bool = False) -> int:
        (_, r_o, r_i), core = self.core.shape, self.core.numel()
        outside = tokens * (self.into.numel() + self.out.numel())
        return outside + (tokens * core if per_token else core + tokens * r_o * r_i)


class Masked(Bank):
    """own_g = scale_g (mask_g * vector): `vector` has the parameter's shape, `bits` [G, ceil(size / 8)] are packed."""

    def __init__(self, vector: Tensor, bits: Tensor, scales: Tensor, shape: torch.Size | None = None):
        super().__init__()
        for name, tensor in (("vector", vector), ("bits", bits), ("scales", scales)):
            self.register_buffer(name, tensor)
        self.vector: Tensor
        self.bits: Tensor
        self.scales: Tensor
        self.parts, self.shape = len(bits), torch.Size(vector.shape if shape is None else shape)

    @classmethod
    def of(cls, vector: Tensor, masks: Tensor, scales: Tensor) -> "Masked":
        """From boolean masks [G, *shape] and scales [G]."""
        flat = masks.reshape(len(masks), vector.numel())
        flat = functional.pad(flat, (0, -flat.shape[1] % 8)).unflatten(1, (-1, 8))
        powers = 2 ** torch.arange(8, dtype=torch.uint8)
        return cls(vector, (flat * powers).sum(-1, dtype=torch.uint8), scales)

    def mask(self, part: int) -> Tensor:
        """Boolean [*shape]."""
        powers = 2 ** torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        return (self.bits[part][:, None] & powers).bool().flatten()[: self.shape.numel()].view(self.shape)

    def mix(self, weights: Tensor) -> Tensor:
        masks = torch.stack([self.mask(part).to(weights.dtype) for part in range(self.parts)])
        return Dense(masks).mix(weights * self.scales) * self.vector

    def forward(self, x: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
        return onto + x @ self.mix(weights).flatten(len(weights.shape)).transpose(-1, -2).to(x.dtype)

    def macs(self, tokens: int, per_token: bool = False) -> int:
        return 0  # the mask of a task is applied once


class Rows(Bank):
    """Banks of the blocks of rows of one matrix: query, key and value of a fused projection, decomposed apart."""

    def __init__(self, banks: list[Bank]):
        super().__init__()
        self.banks = nn.ModuleList(banks)
        self.parts = banks[0].parts
        self.shape = torch.Size((sum(bank.shape[0] for bank in banks), *banks[0].shape[1:]))

    def mix(self, weights: Tensor) -> Tensor:
        return torch.cat([bank.mix(weights) for bank in self.banks], weights.ndim - 1)  # type: ignore[operator]

    def forward(self, x: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
        pieces = onto.split([bank.shape[0] for bank in self.banks], -1)  # type: ignore[index]
        return torch.cat([bank(x, weights, piece) for bank, piece in zip(self.banks, pieces, strict=True)], -1)

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"banks": [bank.facts() for bank in self.banks]}  # type: ignore[operator]

    @property
    def bytes(self) -> int:
        return sum(bank.bytes for bank in self.banks)  # type: ignore[misc]

    def macs(self, tokens: int, per_token: bool = False) -> int:
        return sum(bank.macs(tokens, per_token) for bank in self.banks)  # type: ignore[operator]


class OnDemand(Bank):
    """Dense changes that stay in their files: only those with a non-zero weight are read. For the oracle router."""

    def __init__(self, part: Callable[[int], Tensor], shape: torch.Size, parts: int):
        super().__init__()
        self.part, self.shape, self.parts = part, shape, parts

    @property
    def params(self) -> int:
        return self.parts * self.shape.numel()

    @property
    def bytes(self) -> int:
        return 4 * self.params

    def mix(self, weights: Tensor) -> Tensor:
        total = torch.zeros(self.shape)
        for task in weights.nonzero().flatten().tolist():
            total.add_(self.part(task), alpha=float(weights[task]))
        return total

    def macs(self, tokens: int, per_token: bool = False) -> int:
        return 0


def add_product(onto: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """onto [..., m] + x [..., k] weight^T in one product, in place where no gradient is recorded."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(onto.device.type) or not onto.is_contiguous():
        return onto + functional.linear(x, weight)
    onto.view(-1, onto.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.T)
    return onto


def rebuild(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Bank:
    """A bank from its `facts()` and its named buffers, as a file holds them."""
    kinds = {"Dense": Dense, "LowRank": LowRank, "Tucker": Tucker, "Masked": Masked}
    if facts["kind"] == "Rows":
        inner = [
            rebuild(each, {name.removeprefix(f"banks.{i}."): tensor for name, tensor in tensors.items()
                           if name.startswith(f"banks.{i}.")})
            for i, each in enumerate(facts["banks"])
        ]  # fmt: skip
        return Rows(inner)
    extra = {"parts": facts["parts"]} if facts["kind"] == "LowRank" else {}
    return kinds[facts["kind"]](**tensors, **extra, shape=torch.Size(facts["shape"]))
