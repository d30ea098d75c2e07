"""Adapters in, one adapter out: peft loads it and answers as the merged model does; whole matrices are refused."""

import json

import pytest
import torch
from hf_folders import BERT, IDS, json_of, logits, written
from samples import drawn

from merging import Experts, UserError, merge, open_merged
from merging.methods import AsAdapter, Average, Cat, DoMerging, Emr, Knots, TaskArithmetic, Ties

transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
GPT2 = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 12, "n_positions": 16, "bos_token_id": 1}
FAMILIES = {
    "llama": ("LlamaForCausalLM", {}, [
        {"r": 2, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 3}, "task_type": "CAUSAL_LM"},
        {"r": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True, "layers_to_transform": [1]}]),
    "tables": ("LlamaForCausalLM", {}, [
        {"r": 2, "target_modules": ["embed_tokens", "o_proj"]}, {"r": 2, "target_modules": ["up_proj"]}]),
    "trained in full": ("LlamaForCausalLM", {}, [
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
        {"r": 2, "target_modules": ["q_proj", "lm_head"]}]),
    "columns": ("GPT2LMHeadModel", GPT2, [
        {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        {"r": 2, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}]),
}  # fmt: skip


@pytest.fixture
def made(tmp_path):
    """The folders of a base and of adapters with random factors."""

    def make(family):
        kind, sizes, configs = FAMILIES[family]
        base = written(tmp_path / "base", 0, kind, **sizes)
        for index, options in enumerate(configs):
            model = transformers.AutoModelForCausalLM.from_pretrained(base)
            adapted = peft.get_peft_model(model, peft.LoraConfig(lora_alpha=3, **options))
            randomised(adapted, index).save_pretrained(tmp_path / f"adapter{index}")
        return base, [tmp_path / f"adapter{index}" for index in range(len(configs))]

    return make


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "method",
    [
        Average(),
        TaskArithmetic(0.7, kinds={"attention_q": 0.2, "attention_qkv": 0.4}),
        Knots(),
        DoMerging(steps=3),
        Cat(weights=[0.9, 0.4]),
    ],
)
def test_peft_answers_as_the_merged_model(made, tmp_path, family, method):
    base, adapters = made(family)
    merged = merge(method, base, adapters)
    whole = transformers.AutoModelForCausalLM.from_pretrained(merged.save(f"{tmp_path}/whole/")).eval()
    folder = merged.save(f"{tmp_path}/out/", adapter=True)
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.inference_mode():
        found = model(input_ids=torch.tensor(IDS)).logits
    torch.testing.assert_close(found, logits(whole), atol=1e-5, rtol=0)
    assert (found - logits(transformers.AutoModelForCausalLM.from_pretrained(base).eval())).abs().max() > 1e-3
    config = json_of(folder / "adapter_config.json")
    ranks = {**dict.fromkeys(config["target_modules"], config["r"]), **config["rank_pattern"]}
    assert not config["use_rslora"] and config["alpha_pattern"] == config["rank_pattern"]
    if family == "llama":
        assert ranks["model.layers.1.self_attn.q_proj"] == 7 and ranks["model.layers.0.mlp.down_proj"] == 2
        assert "from peft import AutoPeftModelForCausalLM" in (folder / "README.md").read_text()
    assert not (folder / "config.json").exists() and not list(folder.glob("model*.safetensors"))


def test_a_single_head_is_part_of_the_adapter(tmp_path):
    base, options = written(tmp_path / "base", 0, HEADED, **BERT), {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    experts = [headed(base, tmp_path / f"expert{seed}", seed, options) for seed in (1, 2)]
    folder = merge(Average(), base, experts[:1], ["a"]).save(f"{tmp_path}/out/", adapter=True)
    models = [peft.AutoPeftModelForSequenceClassification.from_pretrained(path).eval() for path in (folder, experts[0])]
    torch.testing.assert_close(*map(logits, models), atol=1e-6, rtol=0)
    assert json_of(folder / "adapter_config.json")["modules_to_save"] == ["classifier"]
    several = merge(Average(), base, experts, ["a", "b"]).save(f"{tmp_path}/several/", adapter=True)
    assert json_of(several / "adapter_config.json")["modules_to_save"] is None  # heads of tasks are not merged
    assert sorted(path.stem for path in (several / "heads").iterdir()) == ["a", "b"]


HEADED = "BertForSequenceClassification"


def headed(base, folder, seed, options):
    """The folder of an adapter with random factors and a head of its own."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, **options))
    randomised(adapted, seed).save_pretrained(folder)
    return folder


def randomised(adapted, seed):
    for index, (name, parameter) in enumerate(adapted.named_parameters()):
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = 0.3 * drawn(*parameter.shape, seed=100 * seed + index)
    return adapted


@pytest.mark.parametrize("then", [Ties(), TaskArithmetic(1.0)], ids=str)
def test_any_method_as_an_adapter_of_that_rank(made, tmp_path, then):
    base, adapters = made("tables")
    merged = merge(AsAdapter(then, rank=2), base, adapters)
    config = json_of(merged.save(f"{tmp_path}/out/", adapter=True) / "adapter_config.json")
    assert config["r"] == 2 and not config["rank_pattern"]
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    whole = transformers.AutoModelForCausalLM.from_pretrained(merged.save(f"{tmp_path}/whole/")).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(input_ids=torch.tensor(IDS)).logits, logits(whole), atol=1e-5, rtol=0)


class TestRefused:
    def test_methods_that_make_whole_matrices(self, made, tmp_path):
        base, adapters = made("llama")
        with pytest.raises(
            UserError, match=r"is changed by a whole matrix, .* average,.* and task_arithmetic make an ad"
        ):
            merge(Ties(), base, adapters).save(f"{tmp_path}/out/", adapter=True)
        with pytest.raises(UserError, match="depends on the input"):
            merge(Emr(), base, adapters).save(f"{tmp_path}/out/", adapter=True)
        assert not (tmp_path / "out").exists()

    def test_experts_that_are_whole_models(self, made, tmp_path):
        base, adapters = made("llama")
        other = written(tmp_path / "other", 1)
        with pytest.raises(UserError, match="the expert for b is a whole model"):
            merge(Average(), base, [adapters[0], other], ["a", "b"]).save(f"{tmp_path}/out/", adapter=True)

    def test_a_file_and_a_model_of_this_library(self, made, tmp_path):
        merged = merge(Average(), *made("llama"))
        with pytest.raises(UserError, match=r"An adapter is a folder, and .* is a file"):
            merged.save(tmp_path / "out.safetensors", adapter=True)
        folder = merged.save(f"{tmp_path}/out/", adapter=True)
        with pytest.raises(UserError, match=r"is an adapter\. Load it by peft"):
            open_merged(folder)
        again = merge(TaskArithmetic(1.0), tmp_path / "base", [folder])  # an adapter in again
        assert torch.allclose(again.weight(Q), merged.weight(Q), atol=1e-6)

    def test_a_base_that_it_was_not_trained_on(self, made, tmp_path, caplog):
        base, adapters = made("llama")
        named(adapters[0], str(written(tmp_path / "other", 1)))
        with pytest.raises(UserError, match=r"adapter0 was trained on .*other, .* put on base .* experts\.other_base"):
            Experts.open(base, adapters)
        assert Experts.open(base, adapters, other_base=True).remarks == ()
        named(adapters[0], "/cluster/llama")
        (remark,) = Experts.open(base, adapters, ["a", "b"]).remarks
        assert (
            remark.startswith("a: trained on /cluster/llama, by its configuration; whether") and "not known" in remark
        )


def named(adapter, base):
    """Let an adapter say that it was trained on a base."""
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json_of(config) | {"base_model_name_or_path": base}))


Q = "model.layers.1.self_attn.q_proj.weight"
