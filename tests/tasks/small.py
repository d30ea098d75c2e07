"""What the tests of tasks/ share: a tower of a few thousand parameters and tasks of coloured noise.

As a script it trains experts in two processes, to be interrupted: `python small.py <cache folder>`.
"""

import sys
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from merging import Cache
from merging.backbones.tower import Backbone
from merging.checkpoints import StateDict
from merging.ops import generator
from tasks.finetune import Recipe, make_experts
from tasks.suite import Split, Suite

TOWER = Backbone("small", 8, {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16})
RECIPE = Recipe(steps=3, batch=8, warmup=1)
LONG = Recipe(steps=120, batch=8)


@dataclass(frozen=True)
class Colours:
    """Task double: 24 noisy 16x16 images, one bright channel per class. Notes every split it is asked for."""

    name: str
    classes: tuple[str, ...] = ("red", "green", "blue")
    asked: list[str] = field(default_factory=list, compare=False)

    def split(self, name):
        self.asked.append(name)
        labels = torch.arange(24) % 3
        images = torch.randint(0, 128, (24, 3, 16, 16), generator=generator(self.name, name), dtype=torch.uint8)
        images[torch.arange(24), labels] += 64
        return Split(name, images, labels)

    def head(self):
        return 10 * functional.normalize(torch.randn(3, 8, generator=generator("head", self.name)), dim=-1)


def suite(*names):
    return Suite("small", tuple(Colours(name) for name in names))


def tower_state(seed=0):
    """Random weights of the small tower; torch's global generator stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TOWER.build().state_dict()


def experts(cache, names=("hues", "tints"), recipe=RECIPE, workers=1):
    return make_experts(StateDict(tower_state()), TOWER, suite(*names), recipe, 0, cache, workers)


FOUR = ("first", "second", "third", "fourth")

if __name__ == "__main__":
    experts(Cache(sys.argv[1]), FOUR, LONG, workers=2)
