"""Modules whose own forward is kept, or written again because it never calls the modules that own its parameters."""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from merging.deltas import Delta
from merging.errors import UserError
from merging.routing.leaves import Conv, Linear, shown
from merging.routing.mixing import Holder, PerThread, per_row, vector


class Values(PerThread):
    """Tensors that stand for parameters while a forward runs."""

    now: Mapping[str, Tensor | None] | None = None


class Substituted:
    """Mixed into the class of a module: its own forward reads mixed tensors in place of its parameters.

    By properties of the class and values per thread: the module itself is never written to while it runs.
    """

    deltas: nn.ModuleDict
    holder: Holder
    name: str
    values: Values
    _parameters: dict[str, Tensor]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        w = self.holder.w
        if w is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return self.with_values(self.mixed(w, x), x, *args, **kwargs)

    def with_values(self, values: Mapping[str, Tensor | None], *args: Any, **kwargs: Any) -> Any:
        """The module's own forward with these tensors for its parameters."""
        self.values.now = values
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.values.now = None

    def static(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, nothing mixed."""
        return self.with_values({}, *args, **kwargs)

    def mixed(self, w: Tensor, x: Tensor) -> Mapping[str, Tensor | None]:
        """What stands for the parameters [d] of a module that multiplies x [B, ..., d] by them: norms, LayerScale."""
        w = per_row(w, len(x), x.shape[1] if x.ndim > 2 else None, self.name)
        return {name: vector(self._parameters[name], delta, w, x) for name, delta in self.deltas.items()}  # type: ignore[arg-type]

    def read(self, name: str) -> Tensor | None:
        values = self.values.now
        if values is None:
            return shown(self._parameters[name], self.holder.w)
        return values[name] if name in values else self._parameters[name]


class SubstitutedNorm(Substituted):
    """Layer normalisation: torch's kernel takes one gain alone, so that gains and shifts per sample come after it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        w = self.holder.w
        if w is None or w.ndim == 1:
            return super().forward(x)
        y = self.with_values({"weight": None, "bias": None}, x)
        gain, shift = ({**self._parameters, **self.mixed(w, x)}[name] for name in ("weight", "bias"))
        return (y * gain if shift is None else torch.addcmul(shift, y, gain)).to(y.dtype)


class SubstitutedTable(Substituted):
    """nn.Embedding, and those that scale what they look up: linear in the table, so that mixed rows are one too."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        w = self.holder.w
        if w is None:
            return super().forward(x, *args, **kwargs)
        static, delta = self.static(x), self.deltas["weight"]
        if w.ndim > 1 and len(x) not in (1, len(w)):
            per_row(w, len(x), None, self.name)
        ids = x.expand(len(w), *x.shape[1:]) if w.ndim > 1 else x
        rows = delta.looked_up(ids, w.to(static.dtype))  # type: ignore[operator]
        positions = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        return static + self.with_values({"weight": rows.flatten(0, -2).to(static.dtype)}, positions)

    def read(self, name: str) -> Any:
        if name == "padding_idx":  # no row of a mixed table is padding, through which no gradient flows
            return None if self.values.now else self.__dict__[name]
        return super().read(name)


class SubstitutedTokens(Substituted):
    """Tokens that are added to or put in front of embedded patches: [d] or [1, N, d], per sample [B, N, d]."""

    def mixed(self, w: Tensor, x: Tensor) -> Mapping[str, Tensor | None]:
        return {name: self.one(name, per_sample(w, len(x), self.name)) for name in self.deltas}

    def one(self, name: str, w: Tensor) -> Tensor:
        value = self._parameters[name]
        change = self.deltas[name].mix(w.to(value.dtype))  # type: ignore[operator]
        if w.ndim == 1:
            return value + change
        return value + (change[:, None] if value.ndim == 1 else change.flatten(0, 1) if len(value) == 1 else change)


class SubstitutedVision(SubstitutedTokens):
    """open_clip's vision transformer: its class token takes part in position 0, its projection comes after it."""

    projection: Linear | None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        w = self.holder.w
        values = {} if w is None else self.mixed(w, x)
        if self.projection is None:
            return self.with_values(values, x, *args, **kwargs)
        y = self.with_values({**values, "proj": None}, x, *args, **kwargs)
        return self.projection(y) if isinstance(y, Tensor) else (self.projection(y[0]), *y[1:])

    def mixed(self, w: Tensor, x: Tensor) -> Mapping[str, Tensor | None]:
        if not self.deltas:
            return {}
        w = per_sample(w, len(x), self.name)
        values = {name: self.one(name, w) for name in self.deltas}
        if w.ndim > 1 and "class_embedding" in values:
            first = values.pop("class_embedding") - self._parameters["class_embedding"]  # [B, 1, d]
            positions = values.get("positional_embedding", self._parameters["positional_embedding"])
            positions = positions.expand(len(x), -1, -1)
            values["positional_embedding"] = torch.cat([positions[:, :1] + first, positions[:, 1:]], 1)
        return values

    def read(self, name: str) -> Tensor | None:
        if name == "proj" and self.values.now is None and self.projection is not None:
            return shown(self.projection.matrix.T, self.holder.w)
        return super().read(name)


def per_sample(w: Tensor, rows: int, name: str) -> Tensor:
    """w [T] or [B, T] for what has no features of its own per token. Raises UserError for one per token."""
    if w.ndim == 3:
        raise UserError(f"{name} adds tokens of its own, which no w per token [B, N, T] is for: give w per sample.")
    return per_row(w, rows, None, name)


TOKENS = {  # class -> parameters that are added or put in front, in the modules that own them
    "CLIPVisionEmbeddings": {"class_embedding"},
    "ViTEmbeddings": {"cls_token", "position_embeddings"},
    "VisionTransformer": {"class_embedding", "positional_embedding", "proj"},
}
LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
GAINS = ("RMSNorm", "T5LayerNorm", "LayerScale")  # how the names of classes end that multiply by their parameters


def leaf(old: Any, deltas: Mapping[str, Delta], holder: Holder, name: str) -> nn.Module:
    """What takes the place of a module. Raises UserError for a class that nothing is written for."""
    kind, weight, bias = type(old).__name__, deltas.get("weight"), deltas.get("bias")
    if type(old) in LINEAR:
        return Linear(old.weight, old.bias, weight, bias, holder, name)
    if kind == "Conv1D":  # of transformers: a linear layer that is stored as [in, out]
        return Linear(old.weight.T, old.bias, None if weight is None else weight.transposed(), bias, holder, name)
    if type(old) is nn.Conv2d:
        return Conv(old, deltas, holder, name)
    if isinstance(old, nn.LayerNorm) and kind in ("LayerNorm", "LayerNormFp32"):
        return substituted(old, SubstitutedNorm, deltas, holder, name, {"weight", "bias"})
    if isinstance(old, nn.Embedding) and old.max_norm is None:
        return substituted(old, SubstitutedTable, deltas, holder, name, {"weight", "padding_idx"})
    if kind == "VisionTransformer" and deltas.keys() <= TOKENS[kind]:
        return vision(old, deltas, holder, name)
    if deltas.keys() <= TOKENS.get(kind, set()):
        return substituted(old, SubstitutedTokens, deltas, holder, name, set(deltas))
    if kind.endswith(GAINS):
        return substituted(old, Substituted, deltas, holder, name, set(deltas))
    raise UserError(
        f"{name or 'The model'} is a {kind}, whose {' and '.join(deltas)} cannot be mixed per input: nothing is "
        f"written for this class. Keep them static, or choose a method that does not route them."
    )


def substituted(
    module: Any, mixin: type, deltas: Mapping[str, Delta], holder: Holder, name: str, read: set[str]
) -> nn.Module:
    """The module itself, of a class that reads what stands for its parameters `read`."""
    module.deltas, module.holder, module.name, module.values = nn.ModuleDict(deltas), holder, name, Values()
    module.__class__ = routed_class(mixin, type(module), tuple(sorted(read)))
    return module


def vision(visual: Any, deltas: Mapping[str, Delta | None], holder: Holder, name: str) -> nn.Module:
    """open_clip's vision transformer; its projection, a bare parameter, becomes a linear layer that is called."""
    visual.projection = None
    if "proj" in deltas:
        delta = deltas["proj"]
        delta = None if delta is None else delta.transposed()
        visual.projection = Linear(visual.proj.T, None, delta, None, holder, f"{name}.proj")
        visual._parameters["proj"] = None
    tokens = {key: delta for key, delta in deltas.items() if key != "proj" and delta is not None}
    return substituted(visual, SubstitutedVision, tokens, holder, name, {*deltas, "positional_embedding"})


@cache
def routed_class(mixin: type, kind: type, names: tuple[str, ...]) -> type:
    """The class with properties in place of parameters: one for each class and set of names, whatever the model."""
    properties = {name: property(partial(_read, name)) for name in names}
    return type(f"Routed{kind.__name__}", (mixin, kind), properties)


def _read(name: str, module: Any) -> Tensor | None:
    return module.read(name)


class Attention(nn.Module):
    """nn.MultiheadAttention over one input by two linear layers, which it holds as bare parameters or never calls.

    owners: the deltas of every module by its path. Raises UserError for keys or values of a width of their own.
    """

    def __init__(
        self, old: nn.MultiheadAttention, path: str, owners: Mapping[str, Mapping[str, Delta]], holder: Holder
    ):
        super().__init__()
        if not old._qkv_same_embed_dim or old.bias_k is not None or old.add_zero_attn:
            raise UserError(f"{path} has keys or values of a width or a bias of their own: it cannot be routed.")
        self.heads, self.batch_first, self.dropout = old.num_heads, old.batch_first, old.dropout
        inner, outer, out = owners.get(path, {}), owners.get(f"{path}.out_proj", {}), old.out_proj
        self.in_proj: nn.Module = Linear(
            old.in_proj_weight, old.in_proj_bias, inner.get("in_proj_weight"), inner.get("in_proj_bias"), holder,
            f"{path}.in_proj",
        )  # fmt: skip
        weight, bias = outer.get("weight"), outer.get("bias")
        self.out_proj = Linear(out.weight, out.bias, weight, bias, holder, f"{path}.out_proj")

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, **options: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Tokens [B, N, d] ([N, B, d] unless batch_first) and None. Raises UserError for what is not self-attention."""
        if need_weights or key_padding_mask is not None or key is not query or value is not query:
            raise UserError(
                "Routed attention is for self-attention without padding and attention maps: call it with "
                "need_weights=False, or leave attention static."
            )
        x = query if self.batch_first else query.transpose(0, 1)
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if attn_mask is not None:
            attn_mask = attn_mask.unflatten(0, (-1, self.heads)) if attn_mask.ndim == 3 else attn_mask
            attn_mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask  # True is masked here, used there
        dropped = self.dropout if self.training else 0.0
        heads = functional.scaled_dot_product_attention(q, k, v, attn_mask, dropped)
        y = self.out_proj(heads.transpose(1, 2).flatten(2))
        return (y if self.batch_first else y.transpose(0, 1)), None


def route_relative_bias(attention: Any) -> None:
    """T5 looks its bias up without a batch axis and turns it around, an affine map: mixed part by part per sample."""
    attention.compute_bias = partial(_relative_bias, attention.compute_bias, attention.relative_attention_bias)


def _relative_bias(compute: Any, table: Any, *args: Any, **kwargs: Any) -> Tensor:
    """[B, heads, queries, keys]."""
    holder, parts = table.holder, table.deltas["weight"].parts
    w = holder.w
    if w is None or w.ndim == 1:
        return compute(*args, **kwargs)
    if w.ndim == 3:
        raise UserError(f"{table.name} belongs to pairs of tokens: give w per sample, [B, T].")
    try:
        holder.w = None
        static = total = compute(*args, **kwargs)
        for part, one_hot in enumerate(torch.eye(parts, dtype=w.dtype, device=w.device)):
            holder.w = one_hot
            total = total + w[:, part, None, None, None] * (compute(*args, **kwargs) - static)
    finally:
        holder.w = w
    return total
