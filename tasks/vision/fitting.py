"""Whether checkpoints fit a backbone and one another, seen from their headers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from merging.backbones.base import Backbone
from merging.backbones.open_clip import PREFIX
from merging.cache import Cache
from merging.checkpoints import Checkpoint
from merging.checkpoints.views import below, completed, selected
from merging.checkpoints.vocabulary import is_table
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
    base: Checkpoint, experts: Sequence[Checkpoint], suite: Suite, backbone: Backbone, cache: Cache, qkv: str,
    text: bool = False,
) -> Experts:  # fmt: skip
    """Experts with the parameters of the image tower, and those of the text side that are left if asked for.

    Raises UserError for an unknown `qkv`, and naming the file, for one that lacks a parameter of the tower or has one
    of another shape.
    """
    if qkv not in QKV:
        raise UserError(
            f"experts.qkv={qkv} is unknown. Choose {' or '.join(QKV)}: query, key, value as methods see them."
        )
    shapes, clip = tower_shapes(backbone), is_clip(backbone)
    for checkpoint in (base, *experts):
        check_tower(checkpoint, shapes, backbone)
    towers = [checkpoint if text or not clip else below(checkpoint, PREFIX) for checkpoint in (base, *experts)]
    return Experts.open(towers[0], towers[1:], suite.names, cache, separate_qkv=qkv == "separate")


def tower_shapes(backbone: Backbone) -> Mapping[str, torch.Size]:
    """Names and shapes of a tower's parameters, without memory for them."""
    with torch.device("meta"):
        module = backbone.build()
    return {key: tensor.shape for key, tensor in module.state_dict().items()}


def is_clip(backbone: Backbone) -> bool:
    """Whether the model is the image tower of a CLIP in open_clip's names, of which files may hold more."""
    return all(key.startswith(PREFIX) for key in tower_shapes(backbone))


def check_tower(checkpoint: Checkpoint, shapes: Mapping[str, torch.Size], backbone: Backbone) -> None:
    """Raises UserError unless the model (of a CLIP `visual.*`) has these names and shapes, in floating point."""
    start = PREFIX if is_clip(backbone) else ""
    specs = {key: spec for key, spec in checkpoint.specs().items() if key.startswith(start)}
    problem = None
    if missing := sorted(shapes.keys() - specs.keys()):
        problem = f"it lacks {some(missing)}"
    elif extra := sorted(specs.keys() - shapes.keys()):
        problem = f"it has {some(extra)}, which that tower does not have"
    elif odd := [key for key, shape in shapes.items() if specs[key].shape != shape]:
        problem = f"{odd[0]} is {tuple(specs[odd[0]].shape)}, there {tuple(shapes[odd[0]])}"
    elif odd := [key for key in shapes if not specs[key].merged]:
        problem = f"{odd[0]} is of type {specs[odd[0]].dtype}, which is not merged"
    if problem is not None:
        raise UserError(
            f"{checkpoint.name} does not fit backbone={backbone.name}: {problem}. Choose the backbone that it was made "
            f"with, or another checkpoint."
        )


def with_tables(shapes: Mapping[str, torch.Size], checkpoint: Checkpoint) -> Mapping[str, torch.Size]:
    """Shapes with the tables of tokens as long as a checkpoint's, which may have another vocabulary."""
    specs = checkpoint.specs()
    tables = {key: specs[key].shape for key in shapes if is_table(key) and key in specs}
    return {**shapes, **{key: shape for key, shape in tables.items() if shape[1:] == shapes[key][1:]}}


def check_tables(checkpoint: Checkpoint, shapes: Mapping[str, torch.Size], backbone: Backbone) -> None:
    """Raises UserError for a common vocabulary that the backbone has no rows for."""
    specs = checkpoint.specs()
    if larger := [key for key in shapes if is_table(key) and specs[key].shape != shapes[key]]:
        rows, known = specs[larger[0]].shape[0], shapes[larger[0]][0]
        raise UserError(
            f"experts.vocabulary=union makes {larger[0]} a table of {rows} tokens, and backbone={backbone.name} has "
            f"{known}. Keep the base's tokens, experts.vocabulary=base, or merge into a folder by suite=none."
        )


def as_encoder(whole: Checkpoint, text: bool, remarks: tuple[str, ...] = ()) -> Checkpoint:
    """Of a whole CLIP what an ImageEncoder holds: the image tower, and with `text` the leftovers of the text side."""
    kept = (key for key in whole.specs() if key.startswith(PREFIX) or (text and key in TEXT))
    return selected(whole, kept, remarks)


def with_projection(tower: Checkpoint, base: Checkpoint) -> Checkpoint:
    """Hugging Face's vision models end before the projection, which is then that of the base."""
    return completed(tower, base, [f"{PREFIX}proj"])


def there_is(folder: Path) -> str:
    """A sentence on what a folder holds."""
    if not folder.is_dir():
        return "There is no such folder."
    names = sorted(path.name for path in folder.iterdir())
    return f"It holds {some(names, 10)}." if names else "It is empty."
