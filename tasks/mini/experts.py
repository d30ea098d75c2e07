"""The mini8 family: the shipped base and experts fine-tuned from it by this run."""

from dataclasses import dataclass, field

from merging.backbones.base import Backbone
from merging.backbones.open_clip import PREFIX
from merging.cache import Cache
from merging.checkpoints import Checkpoint, SafetensorsFile
from merging.checkpoints.views import below
from merging.experts import Experts
from merging.identity import WHERE
from tasks.finetune import Recipe, make_experts, make_multitask
from tasks.mini.model import BASE
from tasks.suite import Suite
from tasks.vision.fitting import check_tower, tower_shapes


@dataclass(frozen=True)
class FineTuned:
    """Where base and experts come from. `seed` orders the training images; `workers` null is one process per core."""

    family: str = "mini8"
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0
    workers: int | None = field(default=None, metadata=WHERE)

    def open(self, suite: Suite, backbone: Backbone, cache: Cache) -> Experts:
        """Experts for the tasks of `suite`, from the cache or trained now."""
        base = base_for(backbone, cache)
        made = make_experts(base, backbone, suite, self.recipe, self.seed, cache, self.workers)
        return Experts.open(base, made, suite.names, cache)

    def open_multitask(self, suite: Suite, backbone: Backbone, cache: Cache) -> Checkpoint:
        """One model trained on all tasks of `suite`, from the cache or trained now."""
        return make_multitask(base_for(backbone, cache), backbone, suite, self.recipe, self.seed, cache)


def base_for(backbone: Backbone, cache: Cache) -> Checkpoint:
    """The image tower of the shipped base. Raises UserError for another backbone than it was made with."""
    base = below(SafetensorsFile(BASE, cache), PREFIX)
    check_tower(base, tower_shapes(backbone), backbone)
    return base
