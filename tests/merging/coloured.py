"""Three tasks whose images differ in colour, and routers trained on them."""

from dataclasses import replace
from typing import Any

from samples import IMAGES, Noise, context, drawn, family, opened, tower

from merging.fit.gates import Learned, TaskId
from merging.methods import Wemoe
from merging.methods.method import call
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


class Coloured(Noise):
    """Data double whose unlabelled images tell their tasks; those of the test split are other images."""

    def unlabelled(self, split):
        made = [coloured(task, split == "test") for task in range(PARTS)]
        return replace(super().unlabelled(split), inputs=lambda task, some: made[task][some])


def separable():
    """Experts of three tasks, and a context with images that tell them apart."""
    found = opened(*family(PARTS, tower(), size=0.25, spread=0.0625), NAMES)
    return found, context(found, Coloured(found))


def fitted(shape=BLOCK, train: Any = QUICK, method=None, given=None, **settings):
    """A merge with trained gates; `given` are experts and context."""
    experts, context = separable() if given is None else given
    merged = call(method or Wemoe(), experts, context)
    return Learned(gate=shape, train=train).fit(merged, experts, replace(context, **settings))[0]
