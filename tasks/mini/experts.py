"""The mini8 family: the shipped base and experts fine-tuned from it by this run, or from another base as well."""

import logging
from dataclasses import asdict, dataclass

from merging.backbones.base import Backbone
from merging.backbones.open_clip import PREFIX
from merging.cache import Cache, code, key_of
from merging.checkpoints import Checkpoint, SafetensorsFile, StateDict
from merging.checkpoints.views import below
from tasks import finetune
from tasks.mini import pretrain
from tasks.mini.generate import MODULES
from tasks.mini.model import BASE
from tasks.suite import Suite
from tasks.vision.fitting import check_tower, tower_shapes

PRETRAINING = tuple(f"tasks.mini.{name}" for name in ("pretrain", "model", "generate", "canvas", "glyphs", *MODULES))
OTHER = pretrain.Recipe(seed=1, steps=1000, text="shipped")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FineTuned(finetune.FineTuned):
    """Experts that this run tunes from the shipped base, with the zero-shot heads of its text tower."""

    family: str = "mini8"

    def base(self, backbone: Backbone, cache: Cache) -> Checkpoint:
        return base_for(backbone, cache)


@dataclass(frozen=True)
class FromTwo(FineTuned):
    """As FineTuned, but every second expert is tuned from an image tower of another initialisation.

    This run pretrains it by the recipe `other`, under the text tower of the shipped base, so that all heads fit.
    """

    other: pretrain.Recipe = OTHER

    def _made(self, base: Checkpoint, suite: Suite, backbone: Backbone, cache: Cache) -> list[Checkpoint]:
        made = list[Checkpoint]()
        for place, task in enumerate(suite.tasks):
            start = self.other_base(cache) if place % 2 else base
            made += super()._made(start, Suite(suite.name, (task,)), backbone, cache)
        return made

    def other_base(self, cache: Cache) -> Checkpoint:
        """From the cache, or pretrained now; in fp16, as the shipped one is stored."""

        def trained():
            log.info("pretraining a second base in %d steps, once", self.other.steps)
            weights = pretrain.train(self.other)[0].state_dict()
            return {key: weight.half() for key, weight in weights.items() if key.startswith(PREFIX)}

        key = key_of("pretrained base", code(PRETRAINING, ("open_clip_torch",)), asdict(self.other))
        return StateDict(cache.tensors(key, trained), "the second base")


def base_for(backbone: Backbone, cache: Cache) -> Checkpoint:
    """The image tower of the shipped base. Raises UserError for another backbone than it was made with."""
    base = below(SafetensorsFile(BASE, cache), PREFIX)
    check_tower(base, tower_shapes(backbone), backbone)
    return base
