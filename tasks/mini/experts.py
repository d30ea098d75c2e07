"""The mini8 family: the shipped base and experts fine-tuned from it by this run."""

from dataclasses import dataclass

from merging.backbones.base import Backbone
from merging.backbones.open_clip import PREFIX
from merging.cache import Cache
from merging.checkpoints import Checkpoint, SafetensorsFile
from merging.checkpoints.views import below
from tasks import finetune
from tasks.mini.model import BASE
from tasks.vision.fitting import check_tower, tower_shapes


@dataclass(frozen=True)
class FineTuned(finetune.FineTuned):
    """Experts that this run tunes from the shipped base, with the zero-shot heads of its text tower."""

    family: str = "mini8"

    def base(self, backbone: Backbone, cache: Cache) -> Checkpoint:
        return base_for(backbone, cache)


def base_for(backbone: Backbone, cache: Cache) -> Checkpoint:
    """The image tower of the shipped base. Raises UserError for another backbone than it was made with."""
    base = below(SafetensorsFile(BASE, cache), PREFIX)
    check_tower(base, tower_shapes(backbone), backbone)
    return base
