"""The pretrained model that an experts source starts from, without its experts."""

from dataclasses import replace

from merging.backbones.base import Backbone
from merging.backbones.open_clip import PREFIX
from merging.cache import Cache
from merging.checkpoints import Checkpoint
from merging.checkpoints.views import Part
from merging.errors import UserError
from tasks.suite import Suite
from tasks.vision.families import EncoderFamily, HubFamily, open_base
from tasks.vision.fitting import check_tower, tower_shapes
from tasks.vision.folder import OPENAI, Folder


def pretrained(source: object, suite: Suite, backbone: Backbone, cache: Cache) -> Checkpoint:
    """The image tower `visual.*` that `experts=...` names as its base; for every published family that is OpenAI's.

    Raises UserError for what is missing or does not fit the backbone, and for sources that make their own experts.
    """
    if isinstance(source, Folder) and source.base != OPENAI:
        alone = replace(source, experts=None, paths=dict.fromkeys(suite.names, source.base))
        return Part(alone.open(suite, backbone, cache).origin, PREFIX)
    if not isinstance(source, Folder | HubFamily | EncoderFamily):
        raise UserError(
            f"experts={getattr(source, 'family', type(source).__name__)} makes its own experts. Say what to start "
            f"from: experts=folder experts.base=<path of a CLIP>, or experts.base=openai."
        )
    base = open_base(backbone, cache, getattr(source, "base_revision", None))
    check_tower(base, tower_shapes(backbone), backbone)
    return Part(base, PREFIX)
