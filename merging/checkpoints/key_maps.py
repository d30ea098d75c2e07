"""CLIP in the names of Hugging Face and of the task_vectors code, and in open_clip's, which are this library's."""

from collections.abc import Iterator

from merging.backbones.open_clip import PREFIX
from merging.checkpoints.base import Checkpoint
from merging.checkpoints.views import below, renamed
from merging.errors import UserError
from merging.qkv import fused, separate_names, separated, translated

TABLE = """
vision_model.embeddings.class_embedding             visual.class_embedding
vision_model.embeddings.patch_embedding.weight      visual.conv1.weight
vision_model.embeddings.position_embedding.weight   visual.positional_embedding
vision_model.pre_layrnorm.{w}                       visual.ln_pre.{w}
vision_model.post_layernorm.{w}                     visual.ln_post.{w}
vision_model.encoder.layers.{i}                     visual.transformer.resblocks.{i}
text_model.embeddings.token_embedding.weight        token_embedding.weight
text_model.embeddings.position_embedding.weight     positional_embedding
text_model.final_layer_norm.{w}                     ln_final.{w}
text_model.encoder.layers.{i}                       transformer.resblocks.{i}
visual_projection.weight                            visual.proj
text_projection.weight                              text_projection
logit_scale                                         logit_scale
"""  # Hugging Face (pre_layrnorm is their misspelling), open_clip
BLOCK = """
.layer_norm1.{w}           .ln_1.{w}
.layer_norm2.{w}           .ln_2.{w}
.self_attn.{p}_proj.{w}    .attn.{p}_proj_{w}
.self_attn.out_proj.{w}    .attn.out_proj.{w}
.mlp.fc1.{w}               .mlp.c_fc.{w}
.mlp.fc2.{w}               .mlp.c_proj.{w}
"""
TRANSPOSED = {"visual_projection.weight", "text_projection.weight", "visual.proj", "text_projection"}
BARE = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")  # a vision model saved without its prefix


def _rows() -> Iterator[list[str]]:
    """Pairs of names; a line of a stack stands for all parameters of its blocks."""
    for theirs, ours in map(str.split, TABLE.strip().splitlines()):
        ends = map(str.split, BLOCK.strip().splitlines()) if "{i}" in theirs else [["", ""]]
        yield from ([theirs + end, ours + other] for end, other in ends)


ROWS = list(_rows())


def open_clip_name(key: str) -> str | None:
    """open_clip's name of a parameter of Hugging Face's CLIP, of which a vision model may be saved without prefix."""
    key = f"vision_model.{key}" if key.startswith(BARE) else key
    return next((name for theirs, ours in ROWS if (name := translated(key, theirs, ours))), None)


def hugging_face_name(key: str) -> str | None:
    """Hugging Face's name of a parameter of open_clip's CLIP, q, k and v apart."""
    return next((name for theirs, ours in ROWS if (name := translated(key, ours, theirs))), None)


def from_hugging_face(checkpoint: Checkpoint) -> Checkpoint:
    """A CLIPModel, CLIPVisionModel or CLIPVisionModelWithProjection file under open_clip's names of a whole CLIP.

    Raises UserError for a name that is none of theirs, and for a projection whose query, key or value is missing.
    """
    kept = (key for key in checkpoint.specs() if not key.endswith(".position_ids"))  # an integer buffer of older files
    names = {key: _known(checkpoint, key, open_clip_name(key), "Hugging Face's CLIP") for key in kept}
    return fused(renamed(checkpoint, names, turned=TRANSPOSED), hugging_face_name)


def to_hugging_face(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint with open_clip's names under those of Hugging Face's CLIPModel, the inverse bit by bit.

    Raises UserError for a name that a CLIP of open_clip does not have.
    """
    apart = separated(checkpoint)
    names = {key: _known(checkpoint, key, hugging_face_name(key), "open_clip's CLIP") for key in apart.specs()}
    return renamed(apart, names, turned=TRANSPOSED)


def from_image_encoder(checkpoint: Checkpoint, text: bool = False) -> Checkpoint:
    """The `ImageEncoder` of the task_vectors code and its successors: open_clip's names behind `model.`.

    text: keep the text parameters that it still has (embeddings, final norm, projection, logit scale: constant in all
    experts) instead of the image tower alone. Raises UserError for a name that open_clip's CLIP does not have.
    """
    names = {key: key.removeprefix("model.") for key in checkpoint.specs()}
    for key, name in names.items():
        _known(checkpoint, key, hugging_face_name((separate_names(name) or (name,))[0]), "open_clip's CLIP")
    whole = renamed(checkpoint, names)
    return whole if text else below(whole, PREFIX)


def _known(checkpoint: Checkpoint, key: str, name: str | None, layout: str) -> str:
    """The name. Raises UserError for none."""
    if name is None:
        raise UserError(
            f"{checkpoint.name} has {key}, which is no parameter of {layout}. Give a checkpoint of a CLIP with a "
            f"vision transformer, without optimizer states, heads or adapters beside its weights."
        )
    return name
