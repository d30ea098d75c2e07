"""Whether checkpoints fit a backbone and one another, seen from their headers."""

from collections.abc import Mapping, Sequence

import torch

from merging.backbones.base import Backbone
from merging.backbones.open_clip import PREFIX
from merging.cache import Cache
from merging.checkpoints import Checkpoint
from merging.checkpoints.views import Part
from merging.errors import UserError
from merging.experts import Experts
from merging.preflight import some
from tasks.suite import Suite

QKV = ("separate", "fused")
TEXT = {  # what an ImageEncoder still holds of the text side
    "positional_embedding", "text_projection", "logit_scale", "token_embedding.weight", "ln_final.weight",
    "ln_final.bias",
}  # fmt: skip


def assembled(
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    suite: Suite,
    backbone: Backbone,
    cache: Cache,
    qkv: str,
    text: bool = False,
) -> Experts:
    """Experts with the parameters of the image tower, and those of the text side that are left if asked for.

    Raises UserError for an unknown `qkv`, and naming the file, for one that lacks a parameter of the tower or has one
    of another shape.
    """
    if qkv not in QKV:
        raise UserError(
            f"experts.qkv={qkv} is unknown. Choose {' or '.join(QKV)}: query, key, value as methods see them."
        )
    wanted = tower_shapes(backbone)
    towers = []
    for checkpoint in (base, *experts):
        check_tower(checkpoint, wanted, backbone)
        towers.append(checkpoint if text or not is_clip(backbone) else Part(checkpoint, PREFIX))
    return Experts.open(towers[0], towers[1:], suite.names, cache, separate_qkv=qkv == "separate")


def tower_shapes(backbone: Backbone) -> Mapping[str, torch.Size]:
    """Names and shapes of a tower's parameters, without memory for them."""
    with torch.device("meta"):
        module = backbone.build()
    return {key: tensor.shape for key, tensor in module.state_dict().items()}


def is_clip(backbone: Backbone) -> bool:
    """Whether the model is the image tower of a CLIP in open_clip's names, of which files may hold more."""
    return all(key.startswith(PREFIX) for key in tower_shapes(backbone))


def check_tower(checkpoint: Checkpoint, wanted: Mapping[str, torch.Size], backbone: Backbone) -> None:
    """Raises UserError unless the model (of a CLIP `visual.*`) has these names and shapes, in floating point."""
    start = PREFIX if is_clip(backbone) else ""
    have = {key: spec for key, spec in checkpoint.specs().items() if key.startswith(start)}
    where = f"{checkpoint.name} does not fit backbone={backbone.name}:"
    advice = "Choose the backbone that it was made with, or another checkpoint."
    if missing := sorted(wanted.keys() - have.keys()):
        raise UserError(f"{where} it lacks {some(missing)}. {advice}")
    if extra := sorted(have.keys() - wanted.keys()):
        raise UserError(f"{where} it has {some(extra)}, which that tower does not have. {advice}")
    for key, shape in wanted.items():
        if have[key].shape != shape:
            raise UserError(f"{where} {key} is {tuple(have[key].shape)}, there {tuple(shape)}. {advice}")
        if not have[key].merged:
            raise UserError(f"{where} {key} is of type {have[key].dtype}, which is not merged. {advice}")
