"""Folders as transformers writes them are checkpoints, whatever their files."""

import json

import pytest
import torch
from hf_folders import BERT, written
from samples import equal

from merging import Experts, UserError, merge
from merging.checkpoints.opening import open_file
from merging.methods import Average, TaskArithmetic


def read(checkpoint):
    return {key: checkpoint.tensor(key) for key in checkpoint.specs()}


def state(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


@pytest.mark.parametrize("shards", ["5GB", "2KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_safetensors(shards, dtype, tmp_path):
    folder = written(tmp_path / "model", 0, dtype=dtype, shards=shards)
    assert (folder / "model.safetensors.index.json").exists() == (shards == "2KB")
    opened = open_file(folder)
    assert equal(read(opened), state(folder)) and {spec.dtype for spec in opened.specs().values()} == {dtype}
    assert opened.remarks == ()


def test_pickled_shards(tmp_path):
    """As transformers wrote them before safetensors; nothing in them is run."""
    folder = written(tmp_path / "model", 0, dtype=torch.bfloat16)
    weights = state(folder)
    (folder / "model.safetensors").unlink()
    names = {}
    for number, keys in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), 1):
        name = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({key: weights[key] for key in keys}, folder / name)
        names |= dict.fromkeys(keys, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert equal(read(open_file(folder)), weights)


def test_a_tied_output_layer_is_stored_once(tmp_path):
    folders = [written(tmp_path / str(seed), seed, tie_word_embeddings=True) for seed in range(3)]
    opened = Experts.open(folders[0], folders[1:])
    assert "lm_head.weight" not in opened.specs()
    key = "model.embed_tokens.weight"
    merged = merge(TaskArithmetic(0.5), folders[0], folders[1:])
    base, *tuned = (state(folder)[key] for folder in folders)
    torch.testing.assert_close(merged.static(key), base + 0.5 * sum(each - base for each in tuned))


def test_bf16_stays_bf16(tmp_path):
    folders = [written(tmp_path / str(seed), seed, dtype=torch.bfloat16, shards="2KB") for seed in range(3)]
    merged = merge(Average(), folders[0], folders[1:])
    assert {spec.dtype for spec in merged.specs.values()} == {torch.bfloat16}
    saved = merged.save(tmp_path / "merged.safetensors")
    assert {spec.dtype for spec in open_file(saved).specs().values()} == {torch.bfloat16}


def test_another_architecture_is_named(tmp_path):
    base, other = written(tmp_path / "base", 0), written(tmp_path / "other", 1, "BertModel", **BERT)
    with pytest.raises(UserError, match=r"task0 .* lacks .*config.json name a bert and a llama"):
        Experts.open(base, [other])
    deeper = written(tmp_path / "deeper", 1, num_hidden_layers=3)
    with pytest.raises(UserError, match=r"has model\.layers\.2.* which the base .* lacks. Use an expert tuned"):
        Experts.open(base, [deeper])


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a folder\. .*: it holds config\.json"):
        open_file(tmp_path)
