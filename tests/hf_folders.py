"""Folders of tiny random models as transformers writes them, with tokenizers of a few words."""

import json

import pytest

SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2}
LLAMA = {**SIZES, "num_hidden_layers": 2, "vocab_size": 12, "max_position_embeddings": 32}
BERT = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 12}
WORDS = ["<pad>", "<s>", "</s>", *"abcdefg"]
IDS = [[1, 3, 4, 5], [1, 6, 7, 8]]


def tokenizer(words=WORDS, template=None):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    whole = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>")
    whole.chat_template = template
    return whole


def written(folder, seed, kind="LlamaForCausalLM", words=WORDS, template=None, dtype=None, shards="5GB", **options):
    """A folder with a random model and its tokenizer; those of one configuration differ by their seed."""
    import torch

    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    made = getattr(transformers, kind)
    model = made(made.config_class(**(LLAMA if kind.startswith("Llama") else {}) | options)).eval()
    (model if dtype is None else model.to(dtype)).save_pretrained(folder, max_shard_size=shards)
    if words:
        tokenizer(words, template).save_pretrained(folder)
    return folder


def logits(model, ids=IDS):
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor(ids)).logits


def json_of(path):
    return json.loads(path.read_text())
