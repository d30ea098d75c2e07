"""Miniature copies of what Twin-Merging's generative experiments take: four tasks, a decoder, its adapters."""

import json

import harness_tasks as tiny
import torch
from safetensors.torch import save_file

CHOOSE = "output_type: multiple_choice\nmetric_list: [{metric: acc}]\n"
SUBJECTS = ("mmlu_anatomy", "mmlu_virology")
TASKS = {  # columns as the published data sets name them
    **{subject: CHOOSE + "doc_to_text: '{{question}}'\ndoc_to_choice: choices\ndoc_to_target: answer\n"
       "fewshot_split: dev\nvalidation_split: validation" for subject in SUBJECTS},
    "truthfulqa_mc1": CHOOSE + "doc_to_text: '{{question}}'\ndoc_to_choice: '{{mc1_targets.choices}}'\n"
    "doc_to_target: 0\nnum_fewshot: 0",
    "bbq": CHOOSE + "doc_to_text: '{{context}}'\ndoc_to_choice: '{{[ans0, ans1, ans2]}}'\ndoc_to_target: label",
    "cnn_dailymail_abisee": "output_type: generate_until\nmetric_list: [{metric: exact_match}]\nnum_fewshot: 0\n"
    "doc_to_text: '{{article}}'\ndoc_to_target: '{{highlights}}'\ngeneration_kwargs: {max_gen_toks: 3, until: ['?']}",
}  # fmt: skip
OPTIONS = [
    "suite.reserve.bbq=0.5",
    "suite.reserve.truthfulqa_mc1=0.5",
    "suite.sizes.calibration=4",
    "suite.sizes.val=4",
    "suite.num_fewshot=1",
]
CONFIG = tiny.CONFIG | {"hidden_size": 32, "num_key_value_heads": 2}  # every matrix has a rank of 16 at least
OPTIONS += [f"++backbone.config.{name}={value}" for name, value in CONFIG.items()]


def document(index):
    made, (right, *wrong) = tiny.document(index), tiny.CHOICES
    return made | {"answer": index % 4, "mc1_targets": {"choices": tiny.CHOICES, "labels": [1, 0, 0, 0]},
                   "context": made["question"], "ans0": right, "ans1": wrong[0], "ans2": wrong[1], "label": index % 3,
                   "article": made["question"], "highlights": tiny.CHOICES[index % 4]}  # fmt: skip


def write_tasks(folder):
    """YAML and documents; returns the folder's name."""
    for split, count in (("dev", 3), ("validation", 4), ("test", 8)):
        lines = [json.dumps(document(index)) for index in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    for name, lines in TASKS.items():
        splits = ("dev", "validation", "test") if name in SUBJECTS else ("test",)
        files = {split: str(folder / f"{split}.jsonl") for split in splits}
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {json.dumps(files)}}}\n"
            f"test_split: test\n{lines}\n"
        )
    (folder / "mmlu.yaml").write_text(
        f"group: mmlu\ntask: [{', '.join(SUBJECTS)}]\naggregate_metric_list: [{{metric: acc}}]\n"
    )
    return str(folder)


def write_models(folder):
    """A base in shards, with its tokenizer, and adapters of rank 4 of its attention and FFNs, one a task."""
    base = tiny.decoder(0, CONFIG)
    base.save_pretrained(folder / "base", max_shard_size="20KB")
    tiny.write_tokenizer(folder / "base")
    parts = {"self_attn": ("q_proj", "v_proj"), "mlp": ("down_proj", "up_proj")}
    owners = {f"model.layers.{i}.{part}.{name}" for i in range(2) for part, names in parts.items() for name in names}
    for seed, task in enumerate(("mmlu", "truthfulqa_mc1", "bbq", "cnn_dailymail_abisee")):
        random, state = torch.Generator().manual_seed(seed), {}
        for owner in sorted(owners):
            out, inner = base.get_submodule(owner).weight.shape
            for side, shape in (("A", (4, inner)), ("B", (out, 4))):
                state[f"base_model.model.{owner}.lora_{side}.weight"] = 0.3 * torch.randn(shape, generator=random)
        (folder / task).mkdir()
        save_file(state, folder / task / "adapter_model.safetensors")
        facts = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "bias": "none", "task_type": "CAUSAL_LM",
                 "target_modules": sorted({owner.rpartition(".")[2] for owner in owners}),
                 "base_model_name_or_path": "base"}  # fmt: skip
        (folder / task / "adapter_config.json").write_text(json.dumps(facts))
    return folder
