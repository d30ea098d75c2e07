"""Tiny models of transformers with random weights, as backbones."""

from merging.backbones.hugging_face import HuggingFace

BODY = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
IMAGES = {**BODY, "image_size": 8, "patch_size": 4}
TEXTS = {**BODY, "vocab_size": 30, "pad_token_id": 0, "max_position_embeddings": 40}
GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "n_inner": 20, "vocab_size": 30,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip
T5 = {"model_type": "t5", "d_model": 8, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 2,
      "vocab_size": 30, "decoder_start_token_id": 0}  # fmt: skip
GATED = {**T5, "feed_forward_proj": "gated-gelu"}
DECODER = {**TEXTS, "num_key_value_heads": 1, "head_dim": 4}
MODELS = {
    "ViTModel": {"model_type": "vit", **IMAGES},
    "ViTForImageClassification": {"model_type": "vit", **IMAGES},
    "CLIPVisionModel": {"model_type": "clip_vision_model", **IMAGES},
    "CLIPVisionModelWithProjection": {"model_type": "clip_vision_model", "projection_dim": 6, **IMAGES},
    "CLIPTextModelWithProjection": {"model_type": "clip_text_model", "projection_dim": 6, **TEXTS, "eos_token_id": 2},
    "BertForPreTraining": {"model_type": "bert", **TEXTS},
    "BertForSequenceClassification": {"model_type": "bert", **TEXTS},
    "BertForQuestionAnswering": {"model_type": "bert", **TEXTS},
    "RobertaModel": {"model_type": "roberta", **TEXTS},
    "RobertaForMaskedLM": {"model_type": "roberta", **TEXTS},
    "RobertaForSequenceClassification": {"model_type": "roberta", **TEXTS},
    "GPT2LMHeadModel": GPT2,
    "GPT2ForSequenceClassification": GPT2,
    "T5ForConditionalGeneration": T5,
    "T5ForSequenceClassification": T5,
    "T5EncoderModel": GATED,
    "LlamaForCausalLM": {"model_type": "llama", **DECODER, "mlp_bias": True, "attention_bias": True},
    "LlamaForSequenceClassification": {"model_type": "llama", **DECODER},
    "Qwen2ForCausalLM": {"model_type": "qwen2", **DECODER},
    "Qwen3ForCausalLM": {"model_type": "qwen3", **DECODER},
    "MistralForCausalLM": {"model_type": "mistral", **DECODER},
    "GemmaForCausalLM": {"model_type": "gemma", **DECODER},
    "Gemma2ForCausalLM": {"model_type": "gemma2", **DECODER},
}
HIDDEN = 20


def backbone(model, readout="pooled", **options):
    return HuggingFace("tiny", model, MODELS[model], readout, **{"length": 6, **options})
