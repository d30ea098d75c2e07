"""What a parameter is, from the names that open_clip and Hugging Face give to CLIP; all other names are refused."""

import pytest
from samples import equal, family, models, opened

from merging import UserError
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
    Twin,
    Wemoe,
)
from merging.naming import Naming

CLIP = "vision_model.encoder.layers.3"
ASK = (Duet, FfnOracle, NeuronMask, RankOneMoe, Smile, Twin, Wemoe)  # with their defaults
WORK = (Average, Base, Dare, Emr, Expert, IsoC, IsoCts, Single, TallMask, TaskArithmetic, Ties, TsvM)
GPT2 = {"transformer.h.0.attn.c_proj.weight": (6, 6), "transformer.h.0.mlp.c_fc.weight": (6, 12), "h.1.ln_1.bias": (6,)}
LLAMA = {"model.layers.0.mlp.down_proj.weight": (6, 12), "model.layers.0.mlp.gate_proj.weight": (12, 6)}
T5 = {"encoder.block.0.layer.1.DenseReluDense.wi.weight": (12, 6), "encoder.block.0.layer.0.layer_norm.weight": (6,)}
TIMM = {"blocks.0.mlp.fc1.weight": (12, 6), "visual.trunk.blocks.0.attn.qkv.weight": (18, 6)}
ROBERTA = {"roberta.encoder.layer.0.output.dense.weight": (6, 12)}
UNKNOWN = (GPT2, LLAMA, T5, TIMM, ROBERTA)


@pytest.mark.parametrize(
    ("key", "kind", "depth", "hidden", "after"),
    [
        ("visual.conv1.weight", "other", None, None, False),
        ("visual.class_embedding", "other", None, None, False),
        ("visual.positional_embedding", "other", None, None, False),
        ("visual.proj", "other", None, None, True),
        ("logit_scale", "other", None, None, False),
        ("token_embedding.weight", "other", None, None, False),
        ("text_projection", "other", None, None, True),
        ("visual.ln_pre.weight", "norm", None, None, False),
        ("visual.ln_post.bias", "norm", None, None, True),
        ("ln_final.weight", "norm", None, None, True),
        ("visual.transformer.resblocks.0.ln_1.weight", "norm", 0, None, False),
        ("visual.transformer.resblocks.11.ln_2.bias", "norm", 11, None, False),
        ("visual.transformer.resblocks.11.attn.in_proj_weight", "attention", 11, None, False),
        ("visual.transformer.resblocks.2.attn.in_proj_bias", "attention", 2, None, False),
        ("visual.transformer.resblocks.2.attn.q_proj_weight", "attention", 2, None, False),  # seen apart
        ("transformer.resblocks.2.attn.out_proj.weight", "attention", 2, None, False),
        ("visual.transformer.resblocks.11.mlp.c_fc.weight", "ffn", 11, 0, False),
        ("visual.transformer.resblocks.11.mlp.c_fc.bias", "ffn", 11, 0, False),
        ("visual.transformer.resblocks.3.mlp.c_proj.weight", "ffn", 3, 1, False),
        ("visual.transformer.resblocks.3.mlp.c_proj.bias", "ffn", 3, None, False),
        ("vision_model.embeddings.class_embedding", "other", None, None, False),
        ("vision_model.embeddings.patch_embedding.weight", "other", None, None, False),
        ("vision_model.embeddings.position_embedding.weight", "other", None, None, False),
        ("visual_projection.weight", "other", None, None, True),
        ("vision_model.pre_layrnorm.weight", "norm", None, None, False),  # the misspelling is Hugging Face's
        ("vision_model.post_layernorm.bias", "norm", None, None, True),
        ("text_model.final_layer_norm.weight", "norm", None, None, True),
        (f"{CLIP}.layer_norm1.weight", "norm", 3, None, False),
        (f"{CLIP}.layer_norm2.bias", "norm", 3, None, False),
        (f"{CLIP}.self_attn.q_proj.weight", "attention", 3, None, False),
        (f"{CLIP}.self_attn.out_proj.bias", "attention", 3, None, False),
        (f"{CLIP}.mlp.fc1.weight", "ffn", 3, 0, False),
        (f"{CLIP}.mlp.fc2.weight", "ffn", 3, 1, False),
        (f"{CLIP}.mlp.fc2.bias", "ffn", 3, None, False),
        ("encoder.layers.0.mlp.fc1.bias", "ffn", 0, 0, False),
    ],
)
def test_what_the_table_says(key, kind, depth, hidden, after):
    naming = Naming()
    assert (naming.kind(key), naming.depth(key), naming.hidden(key), naming.after(key)) == (kind, depth, hidden, after)


@pytest.mark.parametrize("key", [key for shapes in UNKNOWN for key in shapes] + ["mlp.c_fc.weight", "resblocks.0.x"])
@pytest.mark.parametrize("ask", ["kind", "depth", "hidden", "after"])
def test_a_name_that_it_does_not_have_is_not_guessed(key, ask):
    with pytest.raises(UserError, match=rf"{key} is not in the table CLIP .*choose a method that does not ask"):
        getattr(Naming(), ask)(key)


@pytest.mark.parametrize("shapes", UNKNOWN)
@pytest.mark.parametrize("method", [pytest.param(each(), id=each.__name__) for each in (*ASK, *WORK)])
def test_only_what_asks_for_a_name_fails_on_others(method, shapes):
    base, experts = family(2, shapes)
    if isinstance(method, ASK):
        with pytest.raises(UserError, match="is not in the table CLIP"):
            method(opened(base, experts))
    else:
        renamed = [{f"p{index}": state[key] for index, key in enumerate(sorted(state))} for state in (base, *experts)]
        found, same = models(method(opened(base, experts))), models(method(opened(renamed[0], renamed[1:])))
        if not isinstance(method, Dare):  # its masks are drawn by name
            plain = [[list(model.values()) for model in either] for either in (found, same)]
            assert all(equal(*(dict(enumerate(model)) for model in pair)) for pair in zip(*plain, strict=True))


def test_what_asks_only_with_some_options():
    base, experts = family(2, LLAMA)
    assert Twin(start=None)(opened(base, experts)).deltas.keys() == LLAMA.keys()
    with pytest.raises(UserError, match="is not in the table CLIP"):
        TaskArithmetic(kinds={"ffn": 0.1})(opened(base, experts))
