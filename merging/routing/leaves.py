"""Modules that own parameters, with weights that are static or mixed per input by the w of their holder."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from merging.deltas import Delta, Dense, Rows
from merging.deltas.products import add_product
from merging.errors import UserError
from merging.routing.gates import Subspace
from merging.routing.mixing import Holder, per_row

CHUNK = {"cpu": 1 << 22}  # numbers of the private matrices that exist at once: on a CPU, what its caches hold
SHOWN = {getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "requires_grad", "is_cuda")}
SHOWN |= {Tensor.size, Tensor.dim, Tensor.is_floating_point}


class Shown(Tensor):
    """What code outside a routed module sees of its weight: dtype, device and shape. To compute with it is an error."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func not in SHOWN:
            raise UserError(
                "A module reads the weight of a routed module and computes with it, past the module that mixes it "
                "per input: this architecture, or the option that asks for it, cannot be routed. Leave that parameter "
                "static."
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def shown(value: Tensor, w: Tensor | None) -> Tensor:
    """A parameter as others may see it while it is mixed by w."""
    if w is None:
        return value
    return value.new_empty(0) if torch.compiler.is_compiling() else value.as_subclass(Shown)


class Linear(nn.Module):
    """x [B, ..., n] -> [B, ..., m] by a static weight and the deltas of weight and bias, mixed by w (merging.deltas).

    A w shared by all samples is folded into one dense weight where that is cheaper: from m n / (m + n) tokens on. A
    delta without factors gets a private matrix per sample, a few samples at a time.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, delta: Delta | None = None, delta_bias: Delta | None = None,
        holder: Holder | None = None, name: str = "this layer",
    ):  # fmt: skip
        super().__init__()
        self.matrix = nn.Parameter(weight.detach(), requires_grad=False)
        self.offset = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.delta, self.delta_bias = delta, delta_bias
        self.holder, self.name = holder or Holder(), name
        self.subspace: Subspace | None = None  # a gate of its own, for routing token by token
        self.kernel = "auto"
        self.out_features, self.in_features = weight.shape

    @property
    def weight(self) -> Tensor:
        return shown(self.matrix, self.holder.w)

    @property
    def bias(self) -> Tensor | None:
        return None if self.offset is None else shown(self.offset, self.holder.w)

    def forward(self, x: Tensor) -> Tensor:
        w = self.holder.w if self.subspace is None else self.subspace(x)
        if w is None or (self.delta is None and self.delta_bias is None):
            return functional.linear(x, self.matrix, self.offset)
        w = w.to(self.matrix.dtype)
        if x.ndim == 3:
            return self.mixed(x, per_row(w, len(x), x.shape[1], self.name))
        if x.ndim == 2:
            return self.mixed(x[:, None], per_row(w, len(x), None, self.name))[:, 0]
        tokens = x.flatten(1, -2)
        y = self.mixed(tokens, per_row(w, len(x), tokens.shape[1], self.name))
        return y.unflatten(1, x.shape[1:-1])

    def mixed(self, x: Tensor, w: Tensor) -> Tensor:
        """x [B, N, n] by the weights that w gives."""
        if self.delta is not None and self._private(w, x.shape[1]):
            return torch.cat(list(self._by_sample(x, w, self.delta)))
        if self.delta is not None and w.ndim == 1 and self._folds(x):
            return functional.linear(x, self.matrix + self.delta.mix(w).reshape(self.matrix.shape), self._bias(w))
        y = self._started(x, w)
        return y if self.delta is None else self.delta.add_(x, w, y)

    def _private(self, w: Tensor, tokens: int) -> bool:
        """Whether every sample gets a matrix of its own."""
        dense = self.delta is not None and not self.delta.factored and self.kernel != "factored" and tokens > 1
        return w.ndim == 2 and len(w) > 0 and (dense or self.kernel == "materialised")

    def _folds(self, x: Tensor) -> bool:
        """Whether one shared w becomes one matrix."""
        m, n = self.matrix.shape
        pays = x.shape[:-1].numel() * (m + n) > m * n
        return self.kernel == "folded" or (self.kernel != "factored" and pays)

    def _bias(self, w: Tensor) -> Tensor | None:
        """[m], [B, m] or [B, N, m]; one per sample shaped to be added to tokens."""
        if self.offset is None or self.delta_bias is None:
            return self.offset
        bias = self.offset + self.delta_bias.mix(w)
        return bias[:, None] if bias.ndim == 2 else bias

    def _by_sample(self, x: Tensor, w: Tensor, delta: Delta) -> Iterator[Tensor]:
        """The samples' outputs, a chunk at a time."""
        step, bias = max(1, CHUNK.get(x.device.type, 1 << 26) // self.matrix.numel()), self._bias(w)
        several = bias is not None and bias.ndim == 3
        for number, change in enumerate(delta.mixes(w, step)):
            some = slice(number * step, (number + 1) * step)
            weight = change.flatten(2).add_(self.matrix).mT
            if bias is None:
                yield x[some] @ weight
            else:
                yield torch.baddbmm(bias[some] if several else bias, x[some], weight)

    def _started(self, x: Tensor, w: Tensor) -> Tensor:
        """What is static, a new tensor, with the mixed bias: the product is added to that, which saves a pass."""
        bias = self._bias(w)
        if bias is None or self.delta_bias is None:
            return functional.linear(x, self.matrix, bias)
        if torch.is_autocast_enabled(x.device.type):
            y = functional.linear(x, self.matrix)
            return y.add_(bias.to(y.dtype))
        start = bias.expand(*x.shape[:-1], -1).clone(memory_format=torch.contiguous_format)
        return add_product(start, x, self.matrix)


class Split(nn.Module):
    """Linear layers of one input, outputs side by side: query, key and value with gates of their own."""

    def __init__(self, whole: Linear):
        super().__init__()
        assert isinstance(whole.delta, Rows)
        sizes = [block.shape[0] for block in whole.delta.members()]
        biases = whole.offset.split(sizes) if whole.offset is not None else [None] * len(sizes)
        changes: list[Delta | None] = [None] * len(sizes)
        if isinstance(whole.delta_bias, Dense):
            changes = [Dense(part) for part in whole.delta_bias.changes.split(sizes, 1)]
        pieces = zip(whole.matrix.split(sizes), biases, whole.delta.members(), changes, strict=True)
        self.layers = nn.ModuleList(Linear(*piece, whole.holder, whole.name) for piece in pieces)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


class Conv(nn.Module):
    """Conv2d as a linear layer of patches: those side by side by a view, others by unfolding."""

    def __init__(self, conv: nn.Conv2d, deltas: Mapping[str, Delta], holder: Holder, name: str):
        super().__init__()
        if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise UserError(f"{name} is a convolution in groups, or padded by a name: it cannot be routed.")
        self.geometry = {name: getattr(conv, name) for name in ("kernel_size", "dilation", "padding", "stride")}
        self.linear = Linear(conv.weight.flatten(1), conv.bias, deltas.get("weight"), deltas.get("bias"), holder, name)
        self.shape = conv.weight.shape

    @property
    def weight(self) -> Tensor:
        return shown(self.linear.matrix.view(self.shape), self.linear.holder.w)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> [B, m, rows, columns]."""
        kernel, dilation, padding, stride = self.geometry.values()
        sides = zip(x.shape[-2:], kernel, dilation, padding, stride, strict=True)
        rows, columns = ((side + 2 * p - d * (k - 1) - 1) // s + 1 for side, k, d, p, s in sides)
        if kernel == stride and not any(padding) and dilation == (1, 1):
            high, wide = kernel
            x = x[..., : rows * high, : columns * wide]  # as a convolution leaves an incomplete patch out
            x = x.unflatten(-1, (columns, wide)).unflatten(-3, (rows, high)).permute(0, 2, 4, 1, 3, 5)
            patches = x.flatten(3).flatten(1, 2)
        else:
            patches = functional.unfold(x, **self.geometry).mT
        return self.linear(patches).mT.unflatten(-1, (rows, columns))
