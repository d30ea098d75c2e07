"""CLIP in the names of Hugging Face and of the task_vectors code, and in open_clip's, which are this library's."""

from itertools import product
from pathlib import Path

import yaml

from merging.backbones.open_clip import PREFIX
from merging.checkpoints.base import Checkpoint
from merging.checkpoints.views import below, renamed
from merging.errors import UserError
from merging.qkv import fused, separate_names, separated, translated

TRANSPOSED = {"visual_projection.weight", "text_projection.weight", "visual.proj", "text_projection"}
BARE = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")  # a vision model saved without its prefix


def _names() -> list[tuple[str, str]]:
    """Pairs of templates of names: of Hugging Face, of open_clip."""
    table = yaml.safe_load(Path(__file__).with_name("clip_names.yaml").read_text())
    pairs = product(table["stacks"].items(), table["block"].items())
    inside = [(theirs + end, ours + other) for (theirs, ours), (end, other) in pairs]
    return [*table["model"].items(), *inside]


NAMES = _names()


def open_clip_name(key: str) -> str | None:
    """open_clip's name of a parameter of Hugging Face's CLIP, of which a vision model may be saved without prefix."""
    key = f"vision_model.{key}" if key.startswith(BARE) else key
    return next((name for theirs, ours in NAMES if (name := translated(key, theirs, ours))), None)


def hugging_face_name(key: str) -> str | None:
    """Hugging Face's name of a parameter of open_clip's CLIP, q, k and v apart."""
    return next((name for theirs, ours in NAMES if (name := translated(key, ours, theirs))), None)


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
