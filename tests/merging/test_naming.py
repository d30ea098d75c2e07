"""What a parameter is: tables against the modules of real models, and what becomes of names that no table has."""

import pytest
from samples import equal, family, models, opened

from merging import Experts, UserError
from merging.backbones.base import FAMILIES, KINDS, ParamInfo, table, table_for, tables
from merging.methods import (
    Average,
    Base,
    Dare,
    Duet,
    Emr,
    Expert,
    FfnOracle,
    IsoC,
    IsoCts,
    NeuronMask,
    RankOneMoe,
    Single,
    Smile,
    TallMask,
    TaskArithmetic,
    Ties,
    TsvM,
    TSwitch,
    Twin,
    Wemoe,
)

ASK = (Duet, FfnOracle, NeuronMask, RankOneMoe, Smile, Twin, Wemoe)  # with their defaults
WORK = (Average, Base, Dare, Emr, Expert, IsoC, IsoCts, Single, TallMask, TaskArithmetic, Ties, TSwitch, TsvM)
TIMM = {"blocks.0.mlp.fc1.weight": (12, 6), "visual.trunk.blocks.0.attn.qkv.weight": (18, 6)}
MIXED = {"transformer.h.0.attn.c_proj.weight": (6, 6), "roberta.encoder.layer.0.output.dense.weight": (6, 12)}
BLOCK = "visual.transformer.resblocks.3"
GPT2, T5, CLIP = "transformer.h.2", "decoder.block.1", "vision_model.encoder.layers.3"


@pytest.mark.parametrize(
    ("key", "info"),
    [
        ("visual.conv1.weight", ParamInfo("embedding", None, None, None, "visual.conv1")),
        ("visual.proj", ParamInfo("projection", None, None, None, "visual", transposed=True, after=True, pooled=True)),
        ("text_projection", ParamInfo("projection", None, None, None, "", transposed=True, after=True, pooled=True)),
        ("text_projection.weight",
         ParamInfo("projection", None, None, None, "text_projection", after=True, pooled=True)),
        ("logit_scale", ParamInfo("other", None, None, None, "")),
        ("ln_final.weight", ParamInfo("norm", None, None, None, "ln_final", after=True)),
        (f"{BLOCK}.attn.in_proj_bias", ParamInfo("attention_qkv", 3, BLOCK, None, f"{BLOCK}.attn")),
        (f"{BLOCK}.attn.k_proj_weight", ParamInfo("attention_k", 3, BLOCK, None, f"{BLOCK}.attn")),  # seen apart
        (f"{BLOCK}.mlp.c_fc.bias", ParamInfo("ffn_in", 3, BLOCK, 0, f"{BLOCK}.mlp.c_fc")),
        (f"{BLOCK}.mlp.c_proj.weight", ParamInfo("ffn_out", 3, BLOCK, 1, f"{BLOCK}.mlp.c_proj")),
        (f"{BLOCK}.mlp.c_proj.bias", ParamInfo("ffn_out", 3, BLOCK, None, f"{BLOCK}.mlp.c_proj")),
        (f"{CLIP}.mlp.fc2.weight", ParamInfo("ffn_out", 3, CLIP, 1, f"{CLIP}.mlp.fc2")),
        (f"{GPT2}.mlp.c_fc.weight", ParamInfo("ffn_in", 2, GPT2, 0, f"{GPT2}.mlp.c_fc", transposed=True)),
        (f"{GPT2}.mlp.c_fc.bias", ParamInfo("ffn_in", 2, GPT2, 0, f"{GPT2}.mlp.c_fc")),
        (f"{T5}.layer.2.DenseReluDense.wi_0.weight",
         ParamInfo("ffn_gate", 1, T5, 0, f"{T5}.layer.2.DenseReluDense.wi_0")),
        ("transformer.encoder.embed_tokens.weight", ParamInfo(
            "embedding", None, None, None, "transformer.encoder.embed_tokens", tied="transformer.shared.weight")),
        ("classifier.out_proj.weight", ParamInfo("head", None, None, None, "classifier.out_proj", after=True)),
    ],
)  # fmt: skip
def test_what_the_tables_say(key, info):
    assert table_for(None, [key]).param(key) == info
    stored = {0: 1, 1: 0, None: None} if info.transposed else {0: 0, 1: 1, None: None}
    assert info.stored_axis == stored[info.hidden_axis]


def test_every_row_is_of_a_kind():
    assert {row.info.kind for each in tables().values() for row in each.rows} == set(KINDS)
    assert not set(KINDS) & set(FAMILIES)


@pytest.mark.parametrize("key", [*TIMM, "mlp.c_fc.weight", "resblocks.0.x", "visual.transformer.resblocks.x.ln_1.bias"])
@pytest.mark.parametrize("name", tables())
def test_a_table_does_not_guess(key, name):
    with pytest.raises(UserError, match=rf"{key} is not in the table {name} \({name}\.yaml\), .*choose a method that"):
        table(name).param(key)


def test_a_table_that_is_named_is_the_one_that_is_asked():
    experts = Experts.open(*family(1, MIXED), table="gpt2")
    assert experts.param("transformer.h.0.attn.c_proj.weight").transposed
    with pytest.raises(UserError, match=r"roberta.encoder.layer.0.output.dense.weight is not in the table gpt2"):
        experts.keys("ffn")
    with pytest.raises(UserError, match=r"There is no table gpt3 .* There are bert, clip, gpt2, llama"):
        Experts.open(*family(1, MIXED), table="gpt3").param("wte.weight")


def test_names_that_several_tables_have():
    """Harmless where all say the same."""
    shared = "encoder.layer.0.intermediate.dense.weight"
    assert table_for(None, [shared]).param(shared).kind == "ffn_in"
    with pytest.raises(UserError, match=r"are in the tables bert and vit, which differ about x.1. .*table='bert'"):
        renamed = {name: each for name, each in tables().items() if name in ("bert", "vit")}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(table("vit")), "find", lambda self, key: key and ParamInfo(self.name, 1, key, None, ""))
            patch.setattr("merging.backbones.base.tables", lambda: renamed)
            table_for(None, ["x.1"])


@pytest.mark.parametrize("shapes", [TIMM, MIXED])
@pytest.mark.parametrize("method", [pytest.param(each(), id=each.__name__) for each in (*ASK, *WORK)])
def test_only_what_asks_for_a_name_fails_on_unknown_ones(method, shapes):
    base, experts = family(2, shapes)
    if isinstance(method, ASK):
        with pytest.raises(UserError, match=r"is not in the table \w+, nor does another"):
            method(opened(base, experts))
    else:
        renamed = [{f"p{index}": state[key] for index, key in enumerate(sorted(state))} for state in (base, *experts)]
        found, same = models(method(opened(base, experts))), models(method(opened(renamed[0], renamed[1:])))
        if not isinstance(method, Dare):  # its masks are drawn by name
            plain = [[list(model.values()) for model in either] for either in (found, same)]
            assert all(equal(*(dict(enumerate(model)) for model in pair)) for pair in zip(*plain, strict=True))


def test_what_asks_only_with_some_options():
    base, experts = family(2, TIMM)
    assert Twin(start=None)(opened(base, experts)).deltas.keys() == TIMM.keys()
    with pytest.raises(UserError, match="is not in the table"):
        TaskArithmetic(kinds={"ffn": 0.1})(opened(base, experts))
