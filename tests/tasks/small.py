"""What the tests of tasks/ share: a tower of a few thousand parameters and tasks of coloured noise.

As a script it trains experts in two processes, to be interrupted: `python small.py <cache folder>`.
"""

import sys
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from merging import Cache
from merging.backbones.open_clip import OpenClip
from merging.checkpoints import StateDict
from merging.ops import generator
from tasks.finetune import Recipe, make_experts
from tasks.heads.head import Given, ZeroShot
from tasks.split import Split
from tasks.suite import Suite
from tasks.task import LabelledTask

TOWER = OpenClip("small", 8, {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16})
RECIPE = Recipe(steps=3, batch=8, warmup=1)
LONG = Recipe(steps=120, batch=8)


@dataclass(frozen=True)
class Coloured:
    """24 noisy 16x16 images, one bright channel per class. Notes every split it is asked for."""

    name: str
    classes: tuple[str, ...] = ("red", "green", "blue")
    asked: list[str] = field(default_factory=list, compare=False)

    def split(self, name):
        self.asked.append(name)
        labels = torch.arange(24) % 3
        images = torch.randint(0, 128, (24, 3, 16, 16), generator=generator(self.name, name), dtype=torch.uint8)
        images[torch.arange(24), labels] += 64
        return Split(name, images, labels)


def matrix(name, count=3):
    return 10 * functional.normalize(torch.randn(count, 8, generator=generator("head", name)), dim=-1)


class Colours(LabelledTask):
    """A task of coloured noise with a random zero-shot head."""

    def __init__(self, name, data=None, head=None):
        super().__init__(name, data or Coloured(name), Given(ZeroShot(matrix(name) if head is None else head)))

    @property
    def asked(self):
        return self.data.asked


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
