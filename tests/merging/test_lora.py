"""LoRA adapters folded into their base, against the peft library's own merge."""

import copy
import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import drawn, equal
from towers import SIZES, hugging_face, scrambled, state, whole

from merging import UserError, merge
from merging.checkpoints import SafetensorsFile, StateDict
from merging.checkpoints.key_maps import from_hugging_face
from merging.checkpoints.lora import CONFIG, WEIGHTS, Lora, LoraConfig, open_lora
from merging.methods import Average

ATTENTION = ["q_proj", "v_proj"]
EVERY = "vision_model.encoder.layers.{}.self_attn.{}_proj"


def written(model, folder, **knobs):
    """An adapter of `model` as peft saves it, all factors random; returns the merged state dict of peft."""
    peft = pytest.importorskip("peft")
    knobs = {"r": 3, "lora_alpha": 5, "target_modules": ATTENTION, **knobs}
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**knobs))
    for index, (name, parameter) in enumerate(adapted.named_parameters()):
        if "lora_" in name:
            parameter.data = 0.3 * drawn(*parameter.shape, seed=index)
    adapted.save_pretrained(folder)
    return {key: each.detach().clone() for key, each in adapted.merge_and_unload().state_dict().items()}


def tiny():
    """Without peft: a base of two layers, one of them adapted at rank 2."""
    base = StateDict({"a.q.weight": drawn(4, 6), "a.k.weight": drawn(4, 6, seed=1), "a.q.bias": drawn(4, seed=2)})
    return base, factors("base_model.model.a.q")


def factors(module, down=(2, 6), up=(4, 2)):
    return {f"{module}.lora_A.weight": drawn(*down, seed=3), f"{module}.lora_B.weight": drawn(*up, seed=4)}


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"use_rslora": True},
        {"target_modules": r".*layers\.1\..*(fc1|out_proj)"},
        {"target_modules": ["q_proj", "fc2", "visual_projection"], "r": 8, "lora_alpha": 1},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 4}, "alpha_pattern": {"v_proj": 16}},
        {"rank_pattern": {"v_proj": 7}, "use_rslora": True, "alpha_pattern": {r"layers\.0\.self_attn\.v_proj": 2}},
        {"target_modules": "all-linear", "init_lora_weights": "gaussian"},
        {"layers_to_transform": [1]},
    ],
    ids=str,
)
def test_equals_the_merge_of_peft(knobs, tmp_path):
    expected = written(whole("small"), tmp_path, **knobs)
    base = StateDict(whole("small").state_dict())
    found = open_lora(base, tmp_path)
    assert found.specs() == base.specs() and found.specs().keys() == expected.keys()
    changed = set()
    for key, weight in expected.items():
        torch.testing.assert_close(found.tensor(key), weight, atol=1e-6, rtol=1e-6)
        if not torch.equal(weight, base.tensor(key)):
            changed.add(key)
        elif found.tensor(key) is not base.tensor(key):
            raise AssertionError(f"{key} was copied for nothing")
    assert changed and all(key.endswith("weight") for key in changed)


@pytest.mark.parametrize("inner", [True, False])
def test_names_with_and_without_the_prefix(inner, tmp_path):
    """The Hub's adapters were made on the inner transformer of a CLIPVisionModel: their names start at `encoder.`"""
    theirs = whole("small").vision_model if inner else whole("small")
    expected = written(theirs, tmp_path, target_modules=r"(vision_model\.)?encoder.*(q_proj|fc1)")
    names = load_file(tmp_path / WEIGHTS)
    assert any(name.startswith("base_model.model.encoder.layers.0.") for name in names) == inner
    expected = {
        key if key.startswith("vision_model") else f"vision_model.{key}": each for key, each in expected.items()
    }
    found = open_lora(StateDict(whole("small").state_dict()), tmp_path)
    for key in (f"{EVERY.format(i, letter)}.weight" for i in range(2) for letter in "qkv"):
        torch.testing.assert_close(found.tensor(key), expected[key], atol=1e-6, rtol=1e-6)
    bare = {key.removeprefix("vision_model."): each for key, each in whole("small").vision_model.state_dict().items()}
    without, key = open_lora(StateDict(bare), tmp_path), "encoder.layers.1.mlp.fc1.weight"
    assert torch.equal(without.tensor(key), found.tensor(f"vision_model.{key}"))


def test_as_an_expert_in_open_clip_names(tmp_path):
    """Only thirds of the fused matrix change, and the text and all else stay the base's bits."""
    expected = written(whole("small").vision_model, tmp_path)
    base = StateDict(whole("small").state_dict())
    expert, origin = from_hugging_face(open_lora(base, tmp_path)), from_hugging_face(base)
    width = SIZES["small"].width
    for key in origin.specs():
        tau = expert.tensor(key) - origin.tensor(key)
        if not key.startswith("visual.") or not key.endswith("in_proj_weight"):
            assert not tau.any(), key
            continue
        q, k, v = tau.split(width)
        assert not k.any() and q.any() and v.any()
        layer = key.split(".")[3]
        theirs = expected[f"encoder.layers.{layer}.self_attn.v_proj.weight"]
        theirs = theirs - base.tensor(f"{EVERY.format(layer, 'v')}.weight")
        torch.testing.assert_close(v, theirs, atol=1e-6, rtol=0)
        assert torch.linalg.matrix_rank(v.double(), tol=1e-4) == 3


def test_weights_stored_the_other_way_round(tmp_path):
    """fan_in_fan_out, of GPT-2's Conv1D: base weights [in, out]."""
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.c_attn = Conv1D(6, 4)

    model = scrambled(Model())
    expected = written(model, tmp_path, target_modules=["c_attn"], fan_in_fan_out=True)
    assert json.loads((tmp_path / CONFIG).read_text())["fan_in_fan_out"] is True
    found = open_lora(StateDict(model.state_dict()), tmp_path)
    assert found.tensor("c_attn.weight").shape == (4, 6)
    torch.testing.assert_close(found.tensor("c_attn.weight"), expected["c_attn.weight"], atol=1e-6, rtol=1e-6)


class TestAlgebra:
    def test_scale_times_b_a(self):
        base, adapter = tiny()
        product = adapter["base_model.model.a.q.lora_B.weight"] @ adapter["base_model.model.a.q.lora_A.weight"]
        for config, scale in (
            (LoraConfig(2, 3), 1.5),
            (LoraConfig(2, 3, use_rslora=True), 3 / math.sqrt(2)),
            (LoraConfig(9, 3, rank_pattern={"q": 2}), 1.5),
            (LoraConfig(2, 3, alpha_pattern={"a.q": 8, "q": 1}), 4.0),
        ):
            found = Lora(base, StateDict(adapter), config)
            torch.testing.assert_close(found.tensor("a.q.weight"), base.tensor("a.q.weight") + scale * product)
            assert found.tensor("a.k.weight") is base.tensor("a.k.weight")

    def test_half_precision_factors_are_multiplied_in_fp32(self):
        base, adapter = tiny()
        half = {key: each.bfloat16() for key, each in adapter.items()}
        found = Lora(base, StateDict(half), LoraConfig(2, 2))
        product = (
            half["base_model.model.a.q.lora_B.weight"].float() @ half["base_model.model.a.q.lora_A.weight"].float()
        )
        assert torch.equal(found.tensor("a.q.weight"), base.tensor("a.q.weight") + product)
        low = StateDict({key: base.tensor(key).half() for key in base.specs()})
        wide = Lora(low, StateDict(adapter), LoraConfig(2, 2))
        assert wide.specs()["a.q.weight"].dtype == wide.tensor("a.q.weight").dtype == torch.float32
        assert wide.specs()["a.k.weight"].dtype == wide.tensor("a.k.weight").dtype == torch.float16

    def test_id_names_base_adapter_and_scale(self):
        base, adapter = tiny()
        other = StateDict({**state(base), "a.q.bias": drawn(4, seed=9)})
        moved = {key: each + 1 for key, each in adapter.items()}
        ids = [
            Lora(base, StateDict(adapter), LoraConfig(2, 2)).id,
            Lora(other, StateDict(adapter), LoraConfig(2, 2)).id,
            Lora(base, StateDict(moved), LoraConfig(2, 2)).id,
            Lora(base, StateDict(adapter), LoraConfig(2, 3)).id,
        ]
        assert len(set(ids)) == 4 and ids[0] == Lora(base, StateDict(adapter), LoraConfig(2, 2)).id

    def test_only_the_factors_that_are_needed_are_read(self, tmp_path):
        base, adapter = tiny()
        save_file(adapter, tmp_path / WEIGHTS)
        file = SafetensorsFile(tmp_path / WEIGHTS)
        found = Lora(base, file, LoraConfig(2, 2))
        assert found.specs() == base.specs() and torch.equal(found.tensor("a.k.weight"), base.tensor("a.k.weight"))
        assert "_map" not in vars(file)
        found.tensor("a.q.weight")
        found.release()
        assert equal({"": found.tensor("a.q.weight")}, {"": found.tensor("a.q.weight")})


class TestRefusals:
    @pytest.mark.parametrize(
        "knobs",
        [
            {"use_dora": True},
            {"bias": "all"},
            {"peft_type": "LOHA"},
            {"init_lora_weights": "pissa"},
            {"lora_bias": True},
            {"target_parameters": ["fc1.weight"]},
        ],
        ids=str,
    )
    def test_other_kinds(self, knobs, tmp_path):
        base, adapter = tiny()
        save_file(adapter, tmp_path / WEIGHTS)
        (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, **knobs}))
        name, value = next(iter(knobs.items()))
        with pytest.raises(
            UserError, match=rf"{CONFIG}: {name}={re.escape(str(value))}.*not supported.*merge_and_unload"
        ):
            open_lora(base, tmp_path)

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("{", "no configuration"),
            ("[]", "no configuration"),
            ('{"lora_alpha": 2}', "no configuration.*r: Field required"),
            ('{"r": 0, "lora_alpha": 2}', "r: Input should be greater than 0"),
            ('{"r": 2, "lora_alpha": 2, "rank_pattern": {"(": 3}}', "no configuration"),
            (None, "Cannot read"),
        ],
    )
    def test_a_configuration_that_is_none(self, text, reason, tmp_path):
        base, adapter = tiny()
        save_file(adapter, tmp_path / WEIGHTS)
        if text is not None:
            (tmp_path / CONFIG).write_text(text)
        with pytest.raises(UserError, match=reason):
            open_lora(base, tmp_path)

    @pytest.mark.parametrize(
        ("change", "config", "reason"),
        [
            (factors("a.x"), {}, r"changes a\.x, and the base .* has no a\.x\.weight"),
            (factors("a.k", up=(4, 3)), {}, r"factors of a\.k are \(2, 6\) and \(4, 3\)"),
            (factors("a.k", up=(5, 2)), {}, r"a\.k\.weight of shape \(4, 6\)"),
            ({}, {"r": 3}, "for rank 3"),
            ({}, {"fan_in_fan_out": True}, r"factors of a\.q"),
            ({"a.k.lora_A.weight": drawn(2, 6)}, {}, r"of a\.k there is only a\.k\.lora_A\.weight"),
            ({"a.q.lora_magnitude_vector": drawn(4)}, {}, r"a\.q\.lora_magnitude_vector, which is no factor"),
            ({"a.q.lora_B.bias": drawn(4)}, {}, r"a\.q\.lora_B\.bias, which is no factor"),
            ({"a.k.lora_embedding_A": drawn(4)}, {}, "there is only a.k.lora_embedding_A"),
            (factors("a.q"), {}, "the same factor twice"),
            (factors("vision_model.a.q"), {}, r"changes a\.q\.weight twice"),
            ({}, {"target_modules": ("k",)}, r"changes a\.q, which its target_modules \('k',\) leave out"),
        ],
    )
    def test_an_adapter_that_does_not_fit(self, change, config, reason):
        base, adapter = tiny()
        with pytest.raises(UserError, match=reason):
            Lora(
                base, StateDict({**adapter, **change}, "the adapter"), LoraConfig(**{"r": 2, "lora_alpha": 2, **config})
            )

    def test_an_adapter_without_factors(self):
        with pytest.raises(UserError, match="holds no LoRA factors"):
            Lora(tiny()[0], StateDict({}), LoraConfig(2, 2))

    def test_no_file(self, tmp_path):
        with pytest.raises(UserError, match=f"no checkpoint at .*{WEIGHTS}"):
            open_lora(tiny()[0], tmp_path)


def test_the_vision_model_alone_may_be_the_base(tmp_path):
    model = scrambled(hugging_face(SIZES["small"], whole=False))
    expected = written(model, tmp_path)
    found = open_lora(StateDict(model.state_dict()), tmp_path)
    for key, weight in expected.items():
        torch.testing.assert_close(found.tensor(key), weight, atol=1e-6, rtol=1e-6)


def test_an_adapter_is_not_saved_over(tmp_path, stored):
    base, adapter = tiny()
    path = stored({key: base.tensor(key) for key in base.specs()})
    save_file(adapter, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    merged = merge(Average(), path, [open_lora(SafetensorsFile(path), tmp_path)])
    for target in (path, tmp_path / WEIGHTS, tmp_path / CONFIG):
        with pytest.raises(UserError, match="is one of the inputs"):
            merged.save(target)
