"""Miniature copies of GLUE and of its published experts: real names, layouts and columns, a few made-up samples."""

import io
import json

import torch
from safetensors.torch import save

TEXTS = {"cola": ["sentence"], "sst2": ["sentence"], "mrpc": ["sentence1", "sentence2"],
         "stsb": ["sentence1", "sentence2"], "qqp": ["question1", "question2"], "mnli": ["premise", "hypothesis"],
         "qnli": ["question", "sentence"], "rte": ["sentence1", "sentence2"]}  # fmt: skip
LABELS = {"cola": ["unacceptable", "acceptable"], "sst2": ["negative", "positive"],
          "mrpc": ["not_equivalent", "equivalent"], "stsb": None, "qqp": ["not_duplicate", "duplicate"],
          "mnli": ["entailment", "neutral", "contradiction"], "qnli": ["entailment", "not_entailment"],
          "rte": ["entailment", "not_entailment"]}  # fmt: skip
PARTS = {"train": 40, "validation": 12, "test": 3}
PLAIN = ("the", "a", "cat", "dog", "sat", "ran", "on", "mat", "is", "not", "big", "small", "red")
WORDS = ["<s>", "<pad>", "</s>", "<unk>", *PLAIN]
SIZES = {"vocab_size": len(WORDS), "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 16, "max_position_embeddings": 34, "type_vocab_size": 1}  # fmt: skip
GPT2 = {"vocab_size": len(WORDS), "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 32, "pad_token_id": 2}


def parquet(columns, labels=None, types=None):
    """Bytes of a file as `datasets` writes it: the names of labels are in the schema's metadata."""
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table(columns)
    label = {"_type": "Value", "dtype": "float32"} if labels is None else {"_type": "ClassLabel", "names": labels}
    features = {name: {"_type": "Value", "dtype": "string"} for name in columns} | {"label": label}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file = io.BytesIO()
    parquet.write_table(table, file)
    return file.getvalue()


def samples(task, part):
    """Columns of one part, drawn by its name."""
    rng = torch.Generator().manual_seed(sum(map(ord, task + part)))
    draw = lambda high, size: torch.randint(high, (size,), generator=rng).tolist()  # noqa: E731
    count, names = PARTS[part], LABELS[task]
    words = lambda: " ".join(WORDS[4 + index] for index in draw(13, 3 + draw(5, 1)[0]))  # noqa: E731
    columns = {column: [words() for _ in range(count)] for column in TEXTS[task]}
    labels = [float(label) / 2 for label in draw(11, count)] if names is None else draw(len(names), count)
    hidden = [-1.0 if names is None else -1] * count
    return columns | {"label": hidden if part == "test" else labels, "idx": list(range(count))}


def data():
    """Files of nyu-mll/glue."""
    files = {}
    for task in TEXTS:
        for part in PARTS:
            names = [f"{part}_matched", f"{part}_mismatched"] if task == "mnli" and part != "train" else [part]
            for name in names:
                made = parquet(samples(task, part), LABELS[task])
                files[f"{task}/{name}-00000-of-00001.parquet"] = made
    return files


def tokenizer():
    """Files of a tokenizer of RoBERTa's kind: <s> one </s> </s> other </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "cls_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "sep_token": "</s>",
             "unk_token": "<unk>"}  # fmt: skip
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32, **names}
    return {"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def roberta(seed, task=None, labels=None):
    """A tiny classifier, a little off the one of seed 0; without a task the base, as a masked language model."""
    import transformers

    torch.manual_seed(0)
    config = transformers.RobertaConfig(**SIZES)
    base = transformers.RobertaForMaskedLM(config).eval()
    if task is None:
        return base
    names = labels or [f"LABEL_{index}" for index in range(len(LABELS[task] or ["one"]))]
    config = transformers.RobertaConfig(**SIZES, id2label=dict(enumerate(names)))
    torch.manual_seed(seed)
    made = transformers.RobertaForSequenceClassification(config).eval()
    state = {key: value + 0.1 * torch.randn(value.shape) for key, value in base.state_dict().items()}
    made.load_state_dict({key: state[key] for key in made.state_dict() if key in state}, strict=False)
    return made


def repository(model, below="", pickled=False):
    """config.json and weights of a model below a folder, as the published ones are; old pickles hold positions too."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    start = f"{below}/" if below else ""
    if pickled:
        file = io.BytesIO()
        torch.save({**state, "roberta.embeddings.position_ids": torch.arange(34)[None]}, file)
        weights = {f"{start}pytorch_model.bin": file.getvalue()}
    else:
        state.pop("lm_head.decoder.weight", None)
        weights = {f"{start}model.safetensors": save(state, {"format": "pt"})}
    return {f"{start}config.json": model.config.to_json_string().encode(), **weights}


def serve(hub):
    """Puts GLUE, RoBERTa and its published experts on a loopback hub."""
    hub.add("nyu-mll/glue", data(), "datasets")
    hub.add("FacebookAI/roberta-base", repository(roberta(0)))
    for seed, task in enumerate(LABELS, 1):
        hub.add("lu-vae/roberta-glue", repository(roberta(seed, task), f"{task}/roberta-base_lr1e-05"))
