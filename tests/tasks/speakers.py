"""Tiny language models with random weights and a tokenizer of words, and what they are asked."""

import copy
from functools import cache

import torch

from merging.backbones.hugging_face import HuggingFace

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "\n",
    "a",
    "b",
    "c",
    "d",
    "e",
    "f",
    "g",
    "h",
    "yes",
    "no",
    "may",
    "be",
    "1",
    "2",
]
BODY = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 8, "max_position_embeddings": 24, "tie_word_embeddings": True}  # fmt: skip
GPT2 = {"vocab_size": len(WORDS), "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
T5 = {"vocab_size": len(WORDS), "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
      "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}  # fmt: skip
SPEAKERS = {
    "gpt2": ("GPT2LMHeadModel", {"model_type": "gpt2", **GPT2}),
    "llama": ("LlamaForCausalLM", {"model_type": "llama", **BODY}),
    "qwen2": ("AutoModelForCausalLM", {"model_type": "qwen2", **BODY}),
    "gemma": ("AutoModelForCausalLM", {"model_type": "gemma", **BODY}),
    "t5": ("AutoModelForSeq2SeqLM", {"model_type": "t5", **T5}),
}


def tokenizer(folder, ends=False):
    """Folder of a tokenizer of words; `ends`: it puts an end behind every text, as T5's does."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" +"), "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    if ends:
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return str(folder)


def speaker(name, folder, length=24):
    """A backbone whose tokenizer is written into the folder."""
    model, config = SPEAKERS[name]
    return HuggingFace(name, model, config, "last", tokenizer(folder / name, ends=name == "t5"), length)


@cache
def weights(name, seed):
    """State of a model that answers differently to different prompts; shared: do not write into it."""
    model, config = SPEAKERS[name]
    module, rng = HuggingFace(name, model, config).build(), torch.Generator().manual_seed(seed)
    return {key: 0.5 * torch.randn(value.shape, generator=rng) for key, value in module.named_parameters()}


def module(backbone, seed=0):
    made = backbone.build()
    made.load_state_dict(copy.deepcopy(weights(backbone.name, seed)), strict=False)
    return made
