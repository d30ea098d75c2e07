"""Kind and depth of a parameter from the names that open_clip and Hugging Face use."""

import pytest

from merging.naming import Naming

CLIP = "vision_model.encoder.layers.3"
ROBERTA = "roberta.encoder.layer.5"


@pytest.mark.parametrize(
    ("key", "kind", "depth"),
    [
        ("visual.conv1.weight", "other", None),
        ("visual.class_embedding", "other", None),
        ("visual.positional_embedding", "other", None),
        ("visual.proj", "other", None),
        ("logit_scale", "other", None),
        ("token_embedding.weight", "other", None),
        ("visual.ln_pre.weight", "norm", None),
        ("visual.ln_post.bias", "norm", None),
        ("ln_final.weight", "norm", None),
        ("visual.transformer.resblocks.0.ln_1.weight", "norm", 0),
        ("visual.transformer.resblocks.11.ln_2.bias", "norm", 11),
        ("visual.transformer.resblocks.11.attn.in_proj_weight", "attention", 11),
        ("visual.transformer.resblocks.2.attn.in_proj_bias", "attention", 2),
        ("transformer.resblocks.2.attn.out_proj.weight", "attention", 2),
        ("visual.transformer.resblocks.11.mlp.c_fc.weight", "ffn", 11),
        ("visual.transformer.resblocks.3.mlp.c_proj.bias", "ffn", 3),
        ("vision_model.embeddings.class_embedding", "other", None),
        ("vision_model.embeddings.patch_embedding.weight", "other", None),
        ("vision_model.embeddings.position_embedding.weight", "other", None),
        ("visual_projection.weight", "other", None),
        ("vision_model.pre_layrnorm.weight", "norm", None),  # the misspelling is Hugging Face's
        ("vision_model.post_layernorm.bias", "norm", None),
        ("text_model.final_layer_norm.weight", "norm", None),
        (f"{CLIP}.layer_norm1.weight", "norm", 3),
        (f"{CLIP}.layer_norm2.bias", "norm", 3),
        (f"{CLIP}.self_attn.q_proj.weight", "attention", 3),
        (f"{CLIP}.self_attn.k_proj.bias", "attention", 3),
        (f"{CLIP}.self_attn.v_proj.weight", "attention", 3),
        (f"{CLIP}.self_attn.out_proj.weight", "attention", 3),
        (f"{CLIP}.mlp.fc1.weight", "ffn", 3),
        (f"{CLIP}.mlp.fc2.bias", "ffn", 3),
        ("roberta.embeddings.word_embeddings.weight", "other", None),
        ("roberta.embeddings.LayerNorm.weight", "norm", None),
        (f"{ROBERTA}.attention.self.query.weight", "attention", 5),
        (f"{ROBERTA}.attention.output.dense.weight", "attention", 5),
        (f"{ROBERTA}.attention.output.LayerNorm.weight", "norm", 5),
        (f"{ROBERTA}.intermediate.dense.weight", "ffn", 5),
        (f"{ROBERTA}.output.dense.bias", "ffn", 5),
        (f"{ROBERTA}.output.LayerNorm.bias", "norm", 5),
        ("classifier.dense.weight", "other", None),
        ("transformer.h.10.mlp.c_fc.weight", "ffn", 10),
        ("blocks.7.norm1.weight", "norm", 7),
    ],
)
def test_kind_and_depth(key, kind, depth):
    assert (Naming().kind(key), Naming().depth(key)) == (kind, depth)


def test_a_pattern_may_be_replaced():
    naming = Naming(ffn=r"dense_\d", block=r"stage(\d+)\.")
    assert (naming.kind("stage4.dense_1.weight"), naming.depth("stage4.dense_1.weight")) == ("ffn", 4)
