"""Attention by plain products against torch's own."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from merging.backbones import attention
from merging.backbones.hugging_face import HuggingFace

SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IDS = torch.tensor([[1, 5, 7, 2, 9], [1, 3, 2, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_plain_products_are_attention(heads, causal, masked):
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, many, 5, 8, generator=random) for many in (4, heads, heads))
    mask = None if causal or not masked else MASK[:, None, None].bool().expand(2, 1, 5, 5)
    expected = scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=True)
    given = attention.plain(query, key, value, mask, 8**-0.5, causal)
    assert torch.allclose(given, expected.transpose(1, 2), atol=1e-6)
    if mask is not None:
        added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        assert torch.allclose(attention.plain(query, key, value, added, 8**-0.5, False), given, atol=1e-6)


@pytest.mark.parametrize("model", ["BertModel", "LlamaModel"])
def test_a_model_in_bf16_takes_it_and_nothing_else_does(model, monkeypatch):
    kind = {"model_type": "bert"} if model == "BertModel" else {"model_type": "llama", "num_key_value_heads": 1}
    backbone = HuggingFace("tiny", model, {**SIZES, **kind}, "mean")
    torch.manual_seed(0)
    module, calls, plain = backbone.build(), [], attention.plain
    monkeypatch.setattr(attention, "plain", lambda *tensors: calls.append(1) or plain(*tensors))
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    exact = backbone.features(module, inputs)
    assert not calls
    with torch.autocast("cpu", torch.bfloat16):
        rounded = backbone.features(module, inputs)
        alone = backbone.features(module, {"input_ids": IDS[1:, :3], "attention_mask": MASK[1:, :3]})
    assert len(calls) == 4
    assert torch.allclose(rounded, exact, atol=0.05)
    assert torch.allclose(alone[0], rounded[1], atol=0.03)
