"""Text towers in the files of experts: whether they were tuned too, which a merge of image towers leaves out."""

import torch

from merging.backbones.open_clip import PREFIX
from merging.cache import Cache, code, key_of
from merging.checkpoints import Checkpoint

SCALE = "logit_scale"  # often trained though the text tower is frozen; it decides no class
UNUSED = "is not used: suite.text reads the class names (experts.heads=expert takes each expert's own)"


def text_keys(checkpoint: Checkpoint) -> list[str]:
    """Of a CLIP in open_clip's names, the parameters outside its image tower."""
    return [key for key in checkpoint.specs() if not key.startswith(PREFIX)]


def has_text_tower(checkpoint: Checkpoint) -> bool:
    return any(key.startswith("transformer.") for key in checkpoint.specs())


def left_out(expert: Checkpoint, base: Checkpoint, cache: Cache) -> tuple[str, ...]:
    """What is to be said of an expert whose text side is not the base's; nothing where both are the same.

    Only files with text parameters are read for it, once per content.
    """
    keys = text_keys(expert)
    if not keys or expert.id == base.id:
        return ()
    if not has_text_tower(base):
        known = [key for key in keys if key in base.specs()]
        if has_text_tower(expert):
            return (f"the text tower in the file, which the base has none to compare with, {UNUSED}",)
        keys = known
    key = key_of("tuned text", code((__name__,)), base.id, expert.id)
    first = cache.text(key, lambda: first_difference(expert, base, keys))
    what = "logit scale" if first == SCALE else "text tower"
    return (f"the {what} in the file differs from the base's and {UNUSED}",) if first else ()


def first_difference(expert: Checkpoint, base: Checkpoint, keys: list[str]) -> str:
    """The smallest parameter that differs, the logit scale after all others; empty where none does.

    Where one file is in a narrower dtype, both are compared in it: saving in half precision is no training.
    """
    specs = expert.specs()
    for key in sorted(keys, key=lambda key: (key == SCALE, specs[key].shape.numel(), key)):
        if key not in base.specs() or not _same(expert.tensor(key), base.tensor(key)):
            return key
        expert.release()
        base.release()
    return ""


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    narrow = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
    return first.shape == second.shape and torch.equal(first.to(narrow), second.to(narrow))
