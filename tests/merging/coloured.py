"""Three tasks whose images differ in colour, and routers trained on them."""

from dataclasses import replace

from samples import IMAGES, drawn, family, opened, tower

from merging.adapt import Learned, TaskId
from merging.methods import Wemoe
from merging.routing.gates import GateShape

NAMES, PARTS = ("red", "green", "blue"), 3
QUICK = TaskId(steps=30)
BLOCK, EARLY, PASS = (GateShape(sees=sees) for sees in ("block", "early", "pass"))
SHARED = GateShape(shared=True)
WEMOE = replace(BLOCK, depth=2, features="mean", pool="after", activation="none")
TWIN = replace(PASS, depth=3, features="mean")


def coloured(task, seed=0):
    """Noise with one brighter channel."""
    images = drawn(IMAGES, 3, 16, 16, seed=10 * seed + task)
    images[:, task] += 3
    return images


def separable(asked=None):
    """Experts whose unlabelled images tell their tasks; those of another split are other images."""
    found = opened(*family(PARTS, tower(), size=0.25, spread=0.0625), NAMES)

    def calibration(split):
        (asked if asked is not None else []).append(split)
        made = [coloured(task, split == "test") for task in range(PARTS)]
        return replace(found.calibration(split), images=lambda task, some: made[task][some])

    return replace(found, calibration=calibration)


def silent(values, step):
    """No tracker."""


def fitted(shape=BLOCK, train=QUICK, method=None, seed=0, log=silent, experts=None):
    experts = separable() if experts is None else experts
    return Learned(gate=shape, train=train).fit((method or Wemoe())(experts), experts, seed, log)[0]
