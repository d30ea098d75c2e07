"""Layers whose weights are static or mixed per input, and how samples of equal weights are run together."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from merging.deltas import Delta, Dense, Rows
from merging.deltas.products import add_product
from merging.routing.gates import Subspace

CHUNK = {"cpu": 1 << 22}  # numbers of the private matrices that exist at once: on a CPU, what its caches hold


class RoutedLinear(nn.Module):
    """x [B, N, n] -> [B, N, m] by a static weight and the deltas of weight and bias, mixed by w (see merging.deltas).

    A w shared by all samples is folded into one dense weight where that is cheaper: from m n / (m + n) tokens on. A
    delta without factors gets a private matrix per sample, a few samples at a time.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, own: Delta | None = None, own_bias: Delta | None = None):
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
        w = w.to(self.weight.dtype)
        if self.own is not None and self._private(w, x.shape[1]):
            return torch.cat(list(self._by_sample(x, w, self.own)))
        if self.own is not None and w.ndim == 1 and self._folds(x):
            return functional.linear(x, self.weight + self.own.mix(w).reshape(self.weight.shape), self._bias(w))
        y = self._started(x, w)
        return y if self.own is None else self.own.add_(x, w, y)

    def _private(self, w: Tensor, tokens: int) -> bool:
        """Whether every sample gets a matrix of its own."""
        dense = self.own is not None and not self.own.factored and self.kernel != "factored" and tokens > 1
        return w.ndim == 2 and len(w) > 0 and (dense or self.kernel == "materialised")

    def _folds(self, x: Tensor) -> bool:
        """Whether one shared w becomes one matrix."""
        m, n = self.weight.shape
        pays = x.shape[:-1].numel() * (m + n) > m * n
        return self.kernel == "folded" or (self.kernel != "factored" and pays)

    def _bias(self, w: Tensor) -> Tensor | None:
        """[m], [B, m] or [B, N, m]; one per sample shaped to be added to tokens."""
        if self.bias is None or self.own_bias is None:
            return self.bias
        found = self.bias + self.own_bias.mix(w)
        return found[:, None] if found.ndim == 2 else found

    def _by_sample(self, x: Tensor, w: Tensor, own: Delta) -> Iterator[Tensor]:
        """The samples' outputs, a chunk at a time."""
        step, bias = max(1, CHUNK.get(x.device.type, 1 << 26) // self.weight.numel()), self._bias(w)
        several = bias is not None and bias.ndim == 3
        for start in range(0, len(w), step):
            some = slice(start, start + step)
            weight = (own.mix(w[some]).flatten(2) + self.weight).mT
            if bias is None:
                yield x[some] @ weight
            else:
                yield torch.baddbmm(bias[some] if several else bias, x[some], weight)

    def _started(self, x: Tensor, w: Tensor) -> Tensor:
        """What is static, a new tensor, with the mixed bias: the product is added to that, which saves a pass."""
        bias = self._bias(w)
        if bias is None or self.own_bias is None:
            return functional.linear(x, self.weight, bias)
        if torch.is_autocast_enabled(x.device.type):
            y = functional.linear(x, self.weight)
            return y.add_(bias.to(y.dtype))
        start = bias.expand(*x.shape[:-1], -1).clone(memory_format=torch.contiguous_format)
        return add_product(start, x, self.weight)


class RoutedNorm(nn.Module):
    """Layer normalisation over the last axis, gain and bias mixed like any other parameter."""

    def __init__(self, norm: nn.LayerNorm, weight: Tensor, bias: Tensor, gain: Delta | None, shift: Delta | None):
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
        gain, shift = mixed(self.weight, self.gain, w), mixed(self.bias, self.shift, w)
        if w.ndim == 1:
            return functional.layer_norm(x, self.weight.shape, gain, shift, self.eps)
        return torch.addcmul(shift, functional.layer_norm(x, self.weight.shape, eps=self.eps), gain)


class RoutedParameter(nn.Module):
    """A parameter that is added: class token or positions."""

    def __init__(self, value: Tensor, own: Delta | None):
        super().__init__()
        self.register_buffer("value", value)
        self.value: Tensor
        self.own = own

    @property
    def routed(self) -> bool:
        return self.own is not None

    def forward(self, w: Tensor | None = None) -> Tensor:
        return self.value if w is None or self.own is None else self.value + self.own.mix(w.to(self.value.dtype))


def mixed(value: Tensor, delta: Delta | None, w: Tensor) -> Tensor:
    """A vector [d] as it multiplies tokens [B, N, d]: with a delta [B, 1, d] or [B, N, d]."""
    if delta is None:
        return value
    found = value + delta.mix(w.to(value.dtype))
    return found[:, None] if found.ndim == 2 else found


class Split(nn.Module):
    """Linear layers of one input, outputs side by side: query, key and value with gates of their own."""

    def __init__(self, layers: list[RoutedLinear]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.routed = True

    def forward(self, x: Tensor, w: Tensor | None = None) -> Tensor:
        return torch.cat([layer(x, w) for layer in self.layers], -1)


def apart(layer: RoutedLinear) -> list[RoutedLinear]:
    """A layer whose delta is of blocks of rows, as one layer per block."""
    assert isinstance(layer.own, Rows)
    sizes = [delta.shape[0] for delta in layer.own.blocks]  # type: ignore[index]
    biases = layer.bias.split(sizes) if layer.bias is not None else [None] * len(sizes)
    changes = [None] * len(sizes)
    if isinstance(layer.own_bias, Dense):
        changes = [Dense(part) for part in layer.own_bias.changes.split(sizes, 1)]
    pieces = zip(layer.weight.split(sizes), biases, layer.own.blocks, changes, strict=True)
    return [RoutedLinear(weight, bias, own, change) for weight, bias, own, change in pieces]  # type: ignore[arg-type]


def clustered(run: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor, kernel: str) -> Tensor:
    """run(x, w), with the samples sorted into groups where that pays; the order of x is kept.

    Samples with equal weights run with their one w [G]. Where most weights differ, but not all parts are in use (top-k
    gates), those with the same parts run together. "auto" sorts into groups of eight or more on average, as smaller
    products run slower, and on a CPU alone, as looking at the weights stalls an accelerator. Where gradients flow to w
    nothing is sorted: each row has its own.
    """
    most = {"auto": len(w) // 8, "grouped": len(w) - 1, "folded": len(w)}.get(kernel, 0)  # groups that still pay
    blind = torch.compiler.is_compiling() or w.device.type != "cpu"
    if w.ndim != 2 or most < 1 or (torch.is_grad_enabled() and w.requires_grad) or (kernel == "auto" and blind):
        return run(x, w)
    groups, index = w.unique(dim=0, return_inverse=True)
    equal = len(groups) <= most
    if not equal:
        groups, index = (w != 0).unique(dim=0, return_inverse=True)
        if not 1 < len(groups) <= most:
            return run(x, w)
    order = index.argsort(stable=True)
    sizes = torch.bincount(index, minlength=len(groups)).tolist()
    weights = groups if equal else w[order].split(sizes)
    results = [run(part, group) for part, group in zip(x[order].split(sizes), weights, strict=True)]
    return torch.cat(results)[order.argsort()]
