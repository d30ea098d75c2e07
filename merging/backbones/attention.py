"""Attention in models of transformers: in bf16 on a CPU torch's fused kernel is slow, its backward pass above all.

Of 32 texts of 17 to 64 tokens its forward and backward pass take five to twelve times as long as plain products.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 128  # up to which all scores of a batch are kept


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, causal: bool) -> Tensor:
    """Attention of queries [B, H, N, d] to keys and values [B, K, M, d], softmax in fp32: [B, N, H, d].

    Keys and values may have fewer heads. mask [B, 1, N, M]: True, or added, where a key is seen; causal: none behind
    the query.
    """
    if key.shape[1] != query.shape[1]:
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    scores = (query * scaling) @ key.mT
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value).transpose(1, 2).contiguous()


@cache
def install() -> None:
    """Has transformers' "sdpa" take plain products for short texts in bf16 on a CPU; all else is its own."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as fused

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **options: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = bool(causal) and attention_mask is None and query.shape[2] > 1
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
        slow = dtype == torch.bfloat16 and query.device.type == "cpu" and key.shape[2] <= TOKENS
        odd = dropout or options.get("position_bias") is not None or (causal and query.shape[2] != key.shape[2])
        if odd or not slow:
            options |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
            return fused(module, query, key, value, attention_mask, **options)
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        return plain(query, key, value, attention_mask, factor, causal), None

    AttentionInterface.register("sdpa", attention)
