"""Exchanges modules for ones that say what goes into their matrices, and mix their weights."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from merging.deltas import Delta
from merging.errors import UserError
from merging.routing.foreign import Attention, substituted
from merging.routing.leaves import Conv, LayerNorm, Linear
from merging.routing.mixing import Holder

LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


def duplicate(module: nn.Module) -> nn.Module:
    """The same modules over the same tensors: what is exchanged or moved in the one stays in the other."""
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def replace(module: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, new)


def attention_leaf(
    module: nn.Module, path: str, owners: Mapping[str, Mapping[str, Delta]], holder: Holder
) -> Attention:
    """In place of nn.MultiheadAttention."""
    old, inner, outer = module.get_submodule(path), owners.get(path, {}), owners.get(f"{path}.out_proj", {})
    assert isinstance(old, nn.MultiheadAttention)
    if not old._qkv_same_embed_dim or old.bias_k is not None or old.add_zero_attn:
        raise UserError(f"{path} has keys or values of a width or a bias of their own: it cannot be routed.")
    into = Linear(
        old.in_proj_weight, old.in_proj_bias, inner.get("in_proj_weight"), inner.get("in_proj_bias"), holder,
        f"{path}.in_proj",
    )  # fmt: skip
    weight, bias = old.out_proj.weight, old.out_proj.bias
    return Attention(
        old, into, Linear(weight, bias, outer.get("weight"), outer.get("bias"), holder, f"{path}.out_proj")
    )


def leaf(old: Any, deltas: Mapping[str, Delta], holder: Holder, name: str) -> nn.Module:
    """What takes the place of a module. Raises UserError for a class that nothing is written for."""
    kind, weight, bias = type(old), deltas.get("weight"), deltas.get("bias")
    if kind in LINEAR:
        return Linear(old.weight, old.bias, weight, bias, holder, name)
    if kind.__name__ == "Conv1D":  # of transformers: a linear layer that is stored as [in, out]
        return Linear(old.weight.T, old.bias, None if weight is None else weight.transposed(), bias, holder, name)
    if kind is nn.Conv2d:
        return Conv(old, deltas, holder, name)
    if isinstance(old, nn.LayerNorm) and kind.__name__ in ("LayerNorm", "LayerNormFp32"):
        return LayerNorm(old, deltas, holder, name)
    new = substituted(old, deltas, holder, name)
    if new is None:
        raise UserError(
            f"{name or 'The model'} is a {kind.__name__}, whose {' and '.join(deltas)} cannot be mixed per input: "
            f"nothing is written for this class. Keep them static, or choose a method that does not route them."
        )
    return new


def linear_in(module: nn.Module, key: str) -> nn.Module:
    """The module that a matrix is applied by, called with features [B, ..., n]: exchanged where it was not called.

    Raises UserError for a parameter that is not applied to features.
    """
    path, _, name = key.rpartition(".")
    attention = path.removesuffix(".out_proj")
    if isinstance(module.get_submodule(attention), nn.MultiheadAttention):
        replace(module, attention, attention_leaf(module, attention, {}, Holder()))
    if name == "in_proj_weight":
        return module.get_submodule(f"{path}.in_proj")
    owner = module.get_submodule(path)
    if isinstance(owner, nn.Conv2d):
        replace(module, path, Conv(owner, {}, Holder(), path))
        owner = module.get_submodule(path)
    if isinstance(owner, Conv):
        return owner.linear
    if name == "proj" and type(owner).__name__ == "VisionTransformer":
        substituted(owner, {"proj": None}, Holder(), path)
        return owner.get_submodule("projection")
    if name == "weight" and (type(owner) in (*LINEAR, Linear) or type(owner).__name__ == "Conv1D"):
        return owner
    raise UserError(
        f"{key} of {type(owner).__name__} is not a matrix that is applied to features, so that nothing is seen to go "
        f"into it. Ask for weights of linear layers, attention, patch embeddings and projections."
    )
