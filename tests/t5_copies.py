"""Miniature copies of fusion_bench's Flan-T5 experts on GLUE: real names and layouts, tiny random models."""

import json

import torch
from glue_copies import PLAIN, repository
from safetensors.torch import save

TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
ANSWERS = ["yes", "no", "acceptable", "unacceptable", "entailment", "neutral", "contradiction", "positive", "negative"]
WORDS = ["<pad>", "</s>", "<unk>", *ANSWERS, *PLAIN, "3.8", "1.0", "2.5"]
SIZES = {"vocab_size": len(WORDS), "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2,
         "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0,
         "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip
PARTS_OF = (("encoder", 0, "Self"), ("decoder", 0, "Self"), ("decoder", 1, "EncDec"))
ADAPTED = [f"{stack}.block.{i}.layer.{j}.{kind}Attention.{x}" for i in range(2) for x in "qv"
           for stack, j, kind in PARTS_OF]  # fmt: skip


def model(seed):
    import transformers

    torch.manual_seed(seed)
    made = transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES)).eval()
    made.lm_head.weight = torch.nn.Parameter(
        made.lm_head.weight.detach().clone()
    )  # as published, and not transformers'
    for parameter in made.parameters():
        parameter.data = 0.6 * torch.randn(parameter.shape)
    return made


def adapter(seed):
    """Files of an adapter of rank 2 and alpha 4, and the product of its first factors."""
    random = torch.Generator().manual_seed(seed)
    state = {}
    for name in ADAPTED:
        for part, shape in (("A", (2, 8)), ("B", (8, 2))):
            factor = torch.randn(shape, generator=random)
            state[f"base_model.model.{name}.lora_{part}.weight"] = factor
    facts = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM",
             "base_model_name_or_path": "google/flan-t5-base", "bias": "none"}  # fmt: skip
    return {"adapter_config.json": json.dumps(facts).encode(), "adapter_model.safetensors": save(state)}, state


def tokenizer(folder):
    """Writes a tokenizer of T5's kind, one </s> behind a text. Returns the folder's name."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return str(folder)


def serve(hub):
    """Puts base, whole experts and adapters on a loopback hub."""
    hub.add("google/flan-t5-base", repository(model(0)))
    for seed, task in enumerate(TASKS, 1):
        hub.add(f"tanganke/flan-t5-base_glue-{task}", repository(model(seed)))
        hub.add(f"tanganke/flan-t5-base_glue-{task}_lora-16", adapter(seed)[0])
