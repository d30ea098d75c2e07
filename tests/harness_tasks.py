"""YAML tasks of lm-eval over a few lines of JSON, and a tiny decoder with a tokenizer of words, for tests."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from merging.backbones.hugging_face import HuggingFace
from merging.experts import Experts

WORDS = ["<pad>", "<s>", "what", "is", "the", "colour", "of", "a", "very", "?", "red", "green", "dark", "blue", "sky",
         "grass", "rose", "sea", "leaf", "stone", ":", "then"]  # fmt: skip
THINGS = ["sky", "grass", "rose", "sea", "leaf", "stone"]
CHOICES = ["red", "green", "dark blue", "very dark green"]
CONFIG = {"model_type": "llama", "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2,
          "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 64,
          "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip
CHOOSE = "output_type: multiple_choice\ndoc_to_choice: choices"
WRITE = "output_type: generate_until\nmetric_list: [{metric: exact_match}]\n"
TASKS = {
    "colours": f"{CHOOSE}\nmetric_list: [{{metric: acc}}, {{metric: acc_norm}}]",
    "shades": f"{CHOOSE}\nmetric_list: [{{metric: acc}}]\nnum_fewshot: 2",
    "writes": WRITE + "generation_kwargs: {max_gen_toks: 4, until: ['?']}",
    "weighs": "output_type: loglikelihood_rolling\nmetric_list: [{metric: word_perplexity}]",
    "samples": WRITE + "generation_kwargs: {do_sample: true}",
    "runs": WRITE + "unsafe_code: true",
}  # fmt: skip
GROUP = "group: both\ntask: [colours, shades]\naggregate_metric_list: [{metric: acc}]\n"


def write_tasks(folder):
    """YAML and documents of TASKS: 24 to train on and 14 to score; `alone` has nothing but those."""
    for split, count in (("train", 24), ("test", 14)):
        lines = [json.dumps(document(index)) for index in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    for name, lines in {**TASKS, "alone": TASKS["colours"]}.items():
        splits = "" if name == "alone" else "training_split: train\n"
        target = "doc_to_target: '{{choices[label]}}'" if "multiple" not in lines else "doc_to_target: label"
        files = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ntag: [every]\ndataset_path: json\ndataset_kwargs: {{data_files: {json.dumps(files)}}}\n"
            f"{splits}test_split: test\ndoc_to_text: '{{{{question}}}}'\n{target}\n{lines}\n"
        )
    (folder / "both.yaml").write_text(GROUP)
    return str(folder)


def document(index):
    very = " very" * (index % 3)
    return {"question": f"what is the colour of{very} a {THINGS[index % 6]} ?", "choices": CHOICES, "label": index % 4}


CHAT = "{% for turn in messages %}<s> {{ turn.content }} {% endfor %}{% if add_generation_prompt %}then{% endif %}"


def write_tokenizer(folder, chat=None):
    """chat: its template; texts then begin with <s> already, which the template writes too."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<pad>", "bos_token": "<s>", "eos_token": "<s>"}
    if chat is not None:
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    made.chat_template = chat
    made.save_pretrained(folder)
    return str(folder)


def decoder(seed, config=CONFIG):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{key: value for key, value in config.items() if key != "model_type"})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)  # so that answers differ
    return model


def backbone(tokenizer):
    return HuggingFace("tiny", "AutoModelForCausalLM", CONFIG, "last", tokenizer, length=48)


def experts(tasks):
    states = [dict(decoder(seed).state_dict()) for seed in range(1 + len(tasks))]
    return Experts.open(states[0], states[1:], tasks, table="llama")
