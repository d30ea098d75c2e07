"""Decoders of Llama's, Qwen2's, Mistral's and Gemma's shapes: published sizes, FFNs, experts that come back whole."""

from pathlib import Path

import pytest
import torch
from tiny_models import HIDDEN, backbone

from merging import Experts
from merging.backbones.hugging_face import HuggingFace
from merging.decompose.ranks import Ranks
from merging.methods import Duet, Twin
from merging.routing.install import install

pytest.importorskip("transformers")
CONF = Path(__file__).parents[2] / "conf/backbone"
SIZES = {"llama_3_2_3b": 3_212_749_824, "qwen_1_5_14b": 14_167_290_880, "qwen_1_5_72b": 72_287_920_128,
         "mistral_7b": 7_241_732_096, "gemma_2b": 2_506_172_416}  # fmt: skip
FAMILIES = ["LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM", "GemmaForCausalLM"]
EXACT = Ranks("energy", 0.0)
IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]])
families = pytest.mark.parametrize("name", FAMILIES)


def model(name, seed):
    torch.manual_seed(seed)
    made = backbone(name).build()
    for parameter in made.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape)
    return made


def logits(module, **w):
    with torch.inference_mode():
        return module(input_ids=IDS, **w).logits


@pytest.mark.parametrize("name", SIZES)
def test_backbones_are_the_published_models(name):
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate

    with initialize_config_module("conf", version_base="1.3"):
        made = instantiate(compose("config", [f"backbone={name}"]).backbone, _convert_="all")
    with torch.device("meta"):
        module = made.build()
    assert sum(tensor.numel() for tensor in module.parameters()) == SIZES[name]
    assert made.table == "llama" and len(made.blocks(module)) == made.config["num_hidden_layers"]
    assert {tensor.dtype for tensor in module.parameters()} == {torch.bfloat16}


def test_no_other_thread_sees_the_dtype_of_a_model_that_is_built(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "set_default_dtype", lambda dtype: seen.append(dtype))
    config = {"model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32,
              "num_hidden_layers": 1, "num_attention_heads": 2, "dtype": "bfloat16"}  # fmt: skip
    module = HuggingFace("tiny", "AutoModelForCausalLM", config, readout="last").build()
    assert {tensor.dtype for tensor in module.parameters()} == {module.config.dtype} == {torch.bfloat16}
    assert {tensor.dtype for tensor in module.buffers()} == {torch.float32} and {*seen} <= {torch.float32}


@families
def test_neurons_of_an_ffn_may_stand_in_any_order(name):
    """The table says along which axis of which parameter they lie; in another order a model says the same."""
    module, param = model(name, 0), backbone(name).param
    before, turned = logits(module), 0
    for key, tensor in module.named_parameters():
        if (axis := param(key).stored_axis) is not None:
            order = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(param(key).depth))
            tensor.data, turned = tensor.data.index_select(axis, order), turned + 1
    torch.testing.assert_close(logits(module), before, atol=1e-5, rtol=1e-5)
    assert turned >= 2 * 3


@families
@pytest.mark.parametrize("method", [Twin(keep=1, start=0), Duet("all", EXACT, static=False)], ids=["twin", "duet"])
def test_what_an_expert_says_comes_back_whole(name, method):
    states = [model(name, seed).state_dict() for seed in range(3)]
    for state in states[1:]:  # one by one only what is routed differs
        state |= {key: states[0][key] for key in state if "_proj" not in key}
    experts = Experts.open(states[0], states[1:], ("a", "b"), table=backbone(name).table)
    merged = method(experts)
    routed = install(model(name, 0), merged)
    for index, state in enumerate(states[1:]):
        whole = model(name, 0)
        whole.load_state_dict(state)
        torch.testing.assert_close(logits(routed, w=torch.eye(2)[index]), logits(whole), atol=2e-4, rtol=2e-4)
