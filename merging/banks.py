"""How the input-dependent part of a merge is stored: changes of one parameter, mixed by the weights of a gate.

Every bank is own_t in W(x) = W_0 + shared + sum_t w_t(x) own_t. Weights w are any reals: [G] shared by all samples,
[B, G] one row per sample, [B, N, G] one per token. A matrix W is [m, n] and acts as x W^T on x [B, N, n].
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from merging.bank import Bank, Dense, Sparse, Whole, packed, unpacked
from merging.products import add_product, alike, in_use, over_tokens, scaled

__all__ = ["Bank", "Dense", "LowRank", "Masked", "OnDemand", "Rows", "Tucker", "Whole", "rebuild"]


class LowRank(Bank):
    """own_g = up_g down_g of rank r: `up` [m, G r] and `down` [G r, n] hold the factors side by side."""

    factored = True

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
        weights, up, down = alike(weights, self.up, self.down)
        scale = weights.repeat_interleave(self.rank, -1)
        return ((up * scale[..., None, :]) @ down).view((*weights.shape[:-1], *self.shape))

    def add_(self, x: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
        up, down, used = self.up, self.down, in_use(weights)
        if not used:
            return onto
        if len(used) < self.parts:  # run only those in use: of the samples of one expert, one
            rows = torch.arange(len(down), device=down.device).view(self.parts, -1)[used].flatten()
            up, down, weights = up[:, rows], down[rows], weights[..., used]
        inner = functional.linear(x, down)
        return add_product(onto, scaled(inner, over_tokens(weights.repeat_interleave(self.rank, -1))), up)

    def transposed(self) -> "LowRank":
        return LowRank(self.down.T.contiguous(), self.up.T.contiguous(), self.parts)

    def macs(self, tokens: int, per_token: bool = False, used: int | None = None) -> int:
        return tokens * (used or self.parts) * self.rank * sum(self.sides())

    def mix_macs(self) -> int:
        return self.up.shape[1] * self.shape.numel()


class Tucker(Bank):
    """own_g = out (sum_j task[g, j] core[j]) in^T: core [r_t, r_o, r_i], task [G, r_t], out [m, r_o], in [n, r_i]."""

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

    def mix(self, weights: Tensor) -> Tensor:
        weights, task, core, out, into = alike(weights, self.task, self.core, self.out, self.into)
        mixed = ((weights @ task) @ core.flatten(1)).unflatten(-1, core.shape[1:])
        return (out @ mixed @ into.T).view((*weights.shape[:-1], *self.shape))

    def add_(self, x: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
        inner, mixed = x @ self.into, weights.to(self.task.dtype) @ self.task
        if weights.ndim < 3:  # a small core per sample
            core = (mixed @ self.core.flatten(1)).unflatten(-1, self.core.shape[1:])
            return add_product(onto, inner @ core.mT.to(inner.dtype), self.out)
        total = torch.zeros(*inner.shape[:-1], self.core.shape[1], dtype=inner.dtype, device=inner.device)
        for index, core in enumerate(self.core):
            total = add_product(total, inner * mixed[..., index : index + 1].to(inner.dtype), core)
        return add_product(onto, total, self.out)

    def transposed(self) -> "Tucker":
        return Tucker(self.core.transpose(1, 2).contiguous(), self.task, self.into, self.out)

    def macs(self, tokens: int, per_token: bool = False, used: int | None = None) -> int:
        (_, r_o, r_i), core = self.core.shape, self.core.numel()
        outside = tokens * (self.into.numel() + self.out.numel())
        return outside + (tokens * core if per_token else core + tokens * r_o * r_i)

    def mix_macs(self) -> int:
        return self.core.numel() + self.core.shape[1] * self.into.numel() + self.core.shape[1] * self.shape.numel()


class Masked(Whole):
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
        return cls(vector, packed(masks.reshape(len(masks), vector.numel())), scales)

    def mask(self, part: int) -> Tensor:
        """Boolean [*shape]."""
        return unpacked(self.bits[part], self.shape.numel()).view(self.shape)

    def part(self, index: int) -> Tensor:
        return self.scales[index] * self.vector.view(self.shape) * self.mask(index)

    @property
    def params(self) -> int:
        """Stored numbers, 32 bits counted as one."""
        return self.vector.numel() + self.scales.numel() + -(-self.bits.numel() // 4)


class Rows(Bank):
    """Banks of the blocks of rows of one matrix: query, key and value of a fused projection, decomposed apart."""

    def __init__(self, banks: list[Bank]):
        super().__init__()
        self.banks = nn.ModuleList(banks)
        self.parts = banks[0].parts
        self.shape = torch.Size((sum(bank.shape[0] for bank in banks), *banks[0].shape[1:]))

    @property
    def factored(self) -> bool:  # type: ignore[override]
        return any(bank.factored for bank in self.banks)  # type: ignore[misc]

    def mix(self, weights: Tensor) -> Tensor:
        return torch.cat([bank.mix(weights) for bank in self.banks], weights.ndim - 1)  # type: ignore[operator]

    def add_(self, x: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
        start = 0
        for bank in self.banks:
            rows = int(bank.shape[0])  # type: ignore[index]
            bank.add_(x, weights, onto.narrow(-1, start, rows))  # type: ignore[operator]
            start += rows
        return onto

    def stored(self) -> "Rows":
        return Rows([bank.stored() for bank in self.banks])  # type: ignore[operator]

    def opened(self) -> "Rows":
        return Rows([bank.opened() for bank in self.banks])  # type: ignore[operator]

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"banks": [bank.facts() for bank in self.banks]}  # type: ignore[operator]

    @property
    def params(self) -> int:
        return sum(bank.params for bank in self.banks)  # type: ignore[misc]

    @property
    def bytes(self) -> int:
        return sum(bank.bytes for bank in self.banks)  # type: ignore[misc]

    def macs(self, tokens: int, per_token: bool = False, used: int | None = None) -> int:
        return sum(bank.macs(tokens, per_token, used) for bank in self.banks)  # type: ignore[operator]

    def mix_macs(self) -> int:
        return sum(bank.mix_macs() for bank in self.banks)  # type: ignore[operator]


class OnDemand(Whole):
    """Dense changes that stay in their files: only those with a non-zero weight are read. For the oracle router."""

    def __init__(self, part: Callable[[int], Tensor], shape: torch.Size, parts: int):
        super().__init__()
        self._part, self.shape, self.parts = part, shape, parts

    def part(self, index: int) -> Tensor:
        return self._part(index)

    def stored(self) -> Dense:
        return Dense(torch.stack([self.part(index) for index in range(self.parts)]))

    @property
    def params(self) -> int:
        return self.parts * self.shape.numel()

    @property
    def bytes(self) -> int:
        return 4 * self.params


def rebuild(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Bank:
    """A bank from its `facts()` and its named buffers, as a file holds them."""
    kinds = {"Dense": Dense, "LowRank": LowRank, "Tucker": Tucker, "Masked": Masked, "Sparse": Sparse}
    if facts["kind"] == "Rows":
        inner = [
            rebuild(each, {name.removeprefix(f"banks.{i}."): tensor for name, tensor in tensors.items()
                           if name.startswith(f"banks.{i}.")})
            for i, each in enumerate(facts["banks"])
        ]  # fmt: skip
        return Rows(inner)
    extra = {"parts": facts["parts"]} if facts["kind"] in ("LowRank", "Sparse") else {}
    return kinds[facts["kind"]](**tensors, **extra, shape=torch.Size(facts["shape"]))
