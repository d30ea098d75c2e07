"""Tiny random models of every architecture that routing is tested on, with a batch of inputs for each."""

from functools import cache

import pytest
import torch
from routes import SHAPE, backbone, images

from merging.backbones.open_clip import OpenClip

BATCH, TOKENS, VOCABULARY, WIDTH = 4, 5, 19, 24
CONFIGS = {
    "BertForMaskedLM": "BertConfig", "RobertaForMaskedLM": "RobertaConfig",
    "RobertaForSequenceClassification": "RobertaConfig", "GPT2LMHeadModel": "GPT2Config",
    "LlamaForCausalLM": "LlamaConfig", "Qwen2ForCausalLM": "Qwen2Config", "Qwen3ForCausalLM": "Qwen3Config",
    "MistralForCausalLM": "MistralConfig", "GemmaForCausalLM": "GemmaConfig",
    "T5ForConditionalGeneration": "T5Config", "CLIPVisionModel": "CLIPVisionConfig",
    "CLIPVisionModelWithProjection": "CLIPVisionConfig", "ViTModel": "ViTConfig",
}  # fmt: skip
TEXT = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 3, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "pad_token_id": 1}
TEXT |= {"attention_probs_dropout_prob": 0.0, "type_vocab_size": 2, "bos_token_id": 0, "eos_token_id": 2}
DECODER = TEXT | {"num_key_value_heads": 1, "head_dim": 8, "num_attention_heads": 3}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 3, "n_positions": 32, "resid_pdrop": 0.0}
GPT2 |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
T5 = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
T5 |= {"relative_attention_num_buckets": 4, "relative_attention_max_distance": 6, "dropout_rate": 0.0}
T5 |= {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
VISION = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3}
VISION |= {"patch_size": 8, "image_size": 16, "projection_dim": 12, "hidden_dropout_prob": 0.0}
VARIANTS = {
    "open_clip": ("open_clip", {}),
    "open_clip with LayerScale": ("open_clip", {"ls_init_value": 0.5}),
    "CLIPVision": ("CLIPVisionModel", VISION), "CLIPVision with projection": ("CLIPVisionModelWithProjection", VISION),
    "ViT": ("ViTModel", VISION), "BERT": ("BertForMaskedLM", TEXT), "RoBERTa": ("RobertaForMaskedLM", TEXT),
    "RoBERTa classifier": ("RobertaForSequenceClassification", TEXT | {"num_labels": 3}),
    "GPT-2": ("GPT2LMHeadModel", GPT2), "T5": ("T5ForConditionalGeneration", T5),
    "T5 gated": ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "Llama": ("LlamaForCausalLM", DECODER), "Llama tied": ("LlamaForCausalLM", DECODER | {"tie_word_embeddings": True}),
    "Qwen2": ("Qwen2ForCausalLM", DECODER), "Qwen3": ("Qwen3ForCausalLM", DECODER),
    "Mistral": ("MistralForCausalLM", DECODER), "Gemma": ("GemmaForCausalLM", DECODER),
}  # fmt: skip
LANGUAGE = [name for name in VARIANTS if name not in ("open_clip", "open_clip with LayerScale", "CLIPVision",
                                                     "CLIPVision with projection", "ViT")]  # fmt: skip
DECODERS = ["GPT-2", "Llama", "Qwen2", "Mistral", "Gemma", "T5"]


@cache
def model(name):
    """Shared by all tests: do not write into it. No parameter is zero or one, so that none is left out unseen."""
    kind, facts = VARIANTS[name]
    torch.manual_seed(0)
    if kind == "open_clip":
        made = OpenClip(name, 12, SHAPE | facts).build() if facts else backbone().build()
    else:
        transformers = pytest.importorskip("transformers")
        config = getattr(transformers, CONFIGS[kind])(**facts)
        config._attn_implementation = "eager"
        made = getattr(transformers, kind)(config).eval()
    rng = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=rng)
    return made


def inputs(name, batch=BATCH, seed=2):
    """Keyword arguments of the model; texts of different lengths, padded on the left for decoders."""
    if name not in LANGUAGE:
        x = images(batch, seed=seed)
        return {"images" if name.startswith("open_clip") else "pixel_values": x}
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, TOKENS), generator=rng)
    mask = torch.ones_like(ids)
    for row in range(1, batch, 2):
        mask[row, : 1 + row % 3] = 0
    if name not in DECODERS or name.startswith("T5"):
        mask = mask.flip(1)
    ids[mask == 0] = 1
    given = {"input_ids": ids, "attention_mask": mask}
    return given | ({"decoder_input_ids": ids[:, :3].flip(1)} if name.startswith("T5") else {})


def output(answer):
    """The tensor that a model answers with."""
    if isinstance(answer, torch.Tensor):
        return answer
    names = ("logits", "image_embeds", "last_hidden_state")
    return next(answer[name] for name in names if name in answer)
