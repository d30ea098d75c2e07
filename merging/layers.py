"""Layers whose weights are static or mixed per input, and how samples of equal weights are run together."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from merging.banks import Bank, Dense, Rows
from merging.routers import Subspace


class RoutedLinear(nn.Module):
    """x [B, N, n] -> [B, N, m] by a static weight and the banks of weight and bias, mixed by w (see merging.banks).

    A w shared by all samples is folded into one dense weight where that is cheaper: from m n / (m + n) tokens on.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, own: Bank | None = None, own_bias: Bank | None = None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.weight: Tensor
        self.bias: Tensor | None
        self.own, self.own_bias = own, own_bias
        self.subspace: Subspace | None = None  # a gate of its own, for routing token by token
        self.kernel = "auto"

    @property
    def routed(self) -> bool:
        return self.own is not None or self.own_bias is not None

    def forward(self, x: Tensor, w: Tensor | None = None) -> Tensor:
        w = w if self.subspace is None else self.subspace(x)
        if w is None or not self.routed:
            return functional.linear(x, self.weight, self.bias)
        if w.ndim == 1:
            return self._shared(x, w)
        if self.kernel == "materialised" and self.own is not None and w.ndim == 2:
            weight = self.weight + self.own.mix(w).flatten(2)
            y = torch.baddbmm(self._biases(w), x, weight.transpose(1, 2)) if self.bias is not None else x @ weight.mT
            return y
        y = functional.linear(x, self.weight, self.bias)
        if self.own_bias is not None:
            change = self.own_bias.mix(w).to(y.dtype)
            y = y + (change if w.ndim == 3 else change[:, None])
        return y if self.own is None else self.own(x, w, y)

    def _biases(self, w: Tensor) -> Tensor:
        assert self.bias is not None
        return self.bias if self.own_bias is None else (self.bias + self.own_bias.mix(w))[:, None]

    def _shared(self, x: Tensor, w: Tensor) -> Tensor:
        m, n = self.weight.shape
        bias = self.bias if self.own_bias is None or self.bias is None else self.bias + self.own_bias.mix(w)
        if self.own is None:
            return functional.linear(x, self.weight, bias)
        if self.kernel == "factored" or (self.kernel != "folded" and x.shape[:-1].numel() * (m + n) <= m * n):
            return self.own(x, w, functional.linear(x, self.weight, bias))
        return functional.linear(x, self.weight + self.own.mix(w).reshape(m, n), bias)


class RoutedNorm(nn.Module):
    """Layer normalisation over the last axis, gain and bias mixed like any other parameter."""

    def __init__(self, norm: nn.LayerNorm, weight: Tensor, bias: Tensor, gain: Bank | None, shift: Bank | None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.weight: Tensor
        self.bias: Tensor
        self.gain, self.shift, self.eps = gain, shift, norm.eps

    @property
    def routed(self) -> bool:
        return self.gain is not None or self.shift is not None

    def forward(self, x: Tensor, w: Tensor | None = None) -> Tensor:
        if w is None or not self.routed:
            return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        gain, shift = mixed(self.weight, self.gain, w, x.ndim), mixed(self.bias, self.shift, w, x.ndim)
        return functional.layer_norm(x, self.weight.shape, eps=self.eps) * gain + shift


class RoutedParameter(nn.Module):
    """A parameter that is added: class token or positions."""

    def __init__(self, value: Tensor, own: Bank | None):
        super().__init__()
        self.register_buffer("value", value)
        self.value: Tensor
        self.own = own
        self.routed = own is not None

    def forward(self, w: Tensor | None = None) -> Tensor:
        return self.value if w is None or self.own is None else self.value + self.own.mix(w)


def mixed(value: Tensor, bank: Bank | None, w: Tensor, ndim: int) -> Tensor:
    """A vector [d], or with a bank one per row of w, shaped to broadcast over x of `ndim` axes."""
    if bank is None:
        return value
    found = value + bank.mix(w)
    return found.view(*found.shape[:-1], *[1] * (ndim - found.ndim), -1) if 1 < found.ndim < ndim else found


class Split(nn.Module):
    """Linear layers of one input, outputs side by side: query, key and value with gates of their own."""

    def __init__(self, layers: list[RoutedLinear]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.routed = True

    def forward(self, x: Tensor, w: Tensor | None = None) -> Tensor:
        return torch.cat([layer(x, w) for layer in self.layers], -1)


def apart(layer: RoutedLinear) -> list[RoutedLinear]:
    """A layer whose bank is of blocks of rows, as one layer per block."""
    assert isinstance(layer.own, Rows)
    sizes = [bank.shape[0] for bank in layer.own.banks]  # type: ignore[index]
    biases = layer.bias.split(sizes) if layer.bias is not None else [None] * len(sizes)
    changes = [None] * len(sizes)
    if isinstance(layer.own_bias, Dense):
        changes = [Dense(part) for part in layer.own_bias.changes.split(sizes, 1)]
    pieces = zip(layer.weight.split(sizes), biases, layer.own.banks, changes, strict=True)
    return [RoutedLinear(weight, bias, own, change) for weight, bias, own, change in pieces]  # type: ignore[arg-type]


def clustered(run: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor, kernel: str) -> Tensor:
    """run(x, w), with the samples sorted into groups of equal weights, each run with its one w [G], where that pays."""
    together = kernel in ("grouped", "folded")
    busy = torch.is_grad_enabled() or torch.compiler.is_compiling()
    if w.ndim != 2 or not (together or (kernel == "auto" and not busy)):
        return run(x, w)
    groups, index = w.unique(dim=0, return_inverse=True)
    if not together and 2 * len(groups) > len(w):
        return run(x, w)
    order = index.argsort(stable=True)
    sizes = torch.bincount(index, minlength=len(groups)).tolist()
    results = [run(part, group) for part, group in zip(x[order].split(sizes), groups, strict=True)]
    return torch.cat(results)[order.argsort()]
