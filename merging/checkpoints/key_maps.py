"""Foreign layouts of CLIP under open_clip's names, which are those of this library, and back.

open_clip has `visual.*` for the image tower, and q, k and v fused into `attn.in_proj_*`.
"""

import re

from merging.backbones.tower import PREFIX
from merging.checkpoints import Checkpoint
from merging.checkpoints.views import FUSED, QKV, Made, Overlay, Separate, View
from merging.errors import UserError
from merging.preflight import some

__all__ = ["Overlay", "Separate", "from_hugging_face", "from_image_encoder", "to_hugging_face"]


def _layer(hugging_face: str, open_clip: str) -> dict[str, str]:
    return {f"{hugging_face}.{kind}": f"{open_clip}.{kind}" for kind in ("weight", "bias")}


TOP = {  # Hugging Face -> open_clip
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    **_layer("vision_model.pre_layrnorm", "visual.ln_pre"),  # the misspelling is Hugging Face's
    **_layer("vision_model.post_layernorm", "visual.ln_post"),
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    **_layer("text_model.final_layer_norm", "ln_final"),
    "logit_scale": "logit_scale",
}
TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
BLOCK = {
    **_layer("layer_norm1", "ln_1"),
    **_layer("layer_norm2", "ln_2"),
    **_layer("self_attn.out_proj", "attn.out_proj"),
    **_layer("mlp.fc1", "mlp.c_fc"),
    **_layer("mlp.fc2", "mlp.c_proj"),
}
STACKS = {
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "text_model.encoder.layers": "transformer.resblocks",
}
BARE = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")  # a vision model saved without its prefix


def from_hugging_face(checkpoint: Checkpoint) -> Checkpoint:
    """A CLIPModel, CLIPVisionModel or CLIPVisionModelWithProjection file under open_clip's names of a whole CLIP.

    Raises UserError for a name that is none of theirs, and for a projection whose query, key or value is missing.
    """
    made: dict[str, Made] = {}
    for key in checkpoint.specs():
        if key.endswith(".position_ids"):  # an integer buffer of older files
            continue
        name = open_clip_name(f"vision_model.{key}" if key.startswith(BARE) else key)
        if name is None:
            raise _unknown(checkpoint, key, "Hugging Face's CLIP")
        keys = _projections(key) if FUSED.fullmatch(name) else (key,)
        if missing := [each for each in keys if each not in checkpoint.specs()]:
            raise UserError(f"{checkpoint.name} has {key}, but lacks {some(missing)}. The file is incomplete.")
        if name in made and made[name].keys != keys:
            raise UserError(f"{checkpoint.name} holds {name} twice: as {', '.join((*made[name].keys, *keys))}.")
        made[name] = Made(keys, "joined" if len(keys) > 1 else "transposed" if key in TRANSPOSED else "same")
    return View(checkpoint, made)


def open_clip_name(key: str) -> str | None:
    """open_clip's name of a parameter of Hugging Face's CLIPModel, None for what it does not have."""
    if key in TOP or key in TRANSPOSED:
        return TOP.get(key) or TRANSPOSED[key]
    match = re.fullmatch(rf"({'|'.join(map(re.escape, STACKS))})\.(\d+)\.(.+)", key)
    if match is None:
        return None
    attention = re.fullmatch(r"self_attn\.[qkv]_proj\.(weight|bias)", match[3])
    name = f"attn.in_proj_{attention[1]}" if attention else BLOCK.get(match[3])
    return name and f"{STACKS[match[1]]}.{match[2]}.{name}"


def _projections(key: str) -> tuple[str, ...]:
    """A name with q, k and v in turn."""
    return tuple(re.sub(r"\.[qkv](_proj\.\w+)$", rf".{part}\1", key) for part in QKV)


def to_hugging_face(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint with open_clip's names under those of Hugging Face's CLIPModel, the inverse bit by bit.

    Raises UserError for a name that a CLIP of open_clip does not have.
    """
    made: dict[str, Made] = {}
    for key in checkpoint.specs():
        names = hugging_face_names(key)
        if not names:
            raise _unknown(checkpoint, key, "open_clip's CLIP")
        for index, name in enumerate(names):
            how = "third" if len(names) > 1 else "transposed" if name in TRANSPOSED else "same"
            made[name] = Made((key,), how, index)
    return View(checkpoint, made)


def hugging_face_names(key: str) -> tuple[str, ...]:
    """Hugging Face's names of a parameter of open_clip's CLIP: one, three for q, k and v, none for what it has not."""
    if key in _TOP_BACK:
        return (_TOP_BACK[key],)
    match = re.fullmatch(rf"({'|'.join(map(re.escape, STACKS.values()))})\.(\d+)\.(.+)", key)
    if match is None:
        return ()
    start = f"{_STACKS_BACK[match[1]]}.{match[2]}."
    if attention := re.fullmatch(r"attn\.in_proj_(weight|bias)", match[3]):
        return tuple(f"{start}self_attn.{part}_proj.{attention[1]}" for part in QKV)
    return (start + _BLOCK_BACK[match[3]],) if match[3] in _BLOCK_BACK else ()


_TOP_BACK = {name: key for key, name in (TOP | TRANSPOSED).items()}
_BLOCK_BACK = {name: key for key, name in BLOCK.items()}
_STACKS_BACK = {name: key for key, name in STACKS.items()}


def from_image_encoder(checkpoint: Checkpoint, text: bool = False) -> Checkpoint:
    """The `ImageEncoder` of the task_vectors code and its successors: open_clip's names behind `model.`.

    text: keep the text parameters that it still has (embeddings, final norm, projection, logit scale: constant in all
    experts) instead of the image tower alone. Raises UserError for a name that open_clip's CLIP does not have.
    """
    made: dict[str, Made] = {}
    for key in checkpoint.specs():
        name = key.removeprefix("model.")
        if not hugging_face_names(name):
            raise _unknown(checkpoint, key, "open_clip's CLIP")
        if text or name.startswith(PREFIX):
            made[name] = Made((key,))
    return View(checkpoint, made)


def _unknown(checkpoint: Checkpoint, key: str, layout: str) -> UserError:
    return UserError(
        f"{checkpoint.name} has {key}, which is no parameter of {layout}. Give a checkpoint of a CLIP with a vision "
        f"transformer, without optimizer states, heads or adapters beside its weights."
    )
