"""What the tests of merging/ share: small experts with every kind of parameter, and all methods there are."""

import math
from dataclasses import fields, replace
from functools import cache
from itertools import cycle
from zlib import crc32

import pytest
import torch
from torch import nn

from merging import Experts, UserError, methods
from merging.backbones.open_clip import OpenClip
from merging.calibration import Calibration
from merging.context import Context
from merging.fit.black_box import Trials
from merging.methods.method import call
from tasks.heads.head import ZeroShot
from tasks.score import Score

SHAPES = {
    "tall.weight": (24, 9),
    "wide.weight": (8, 20),
    "square.weight": (16, 16),
    "conv.weight": (6, 3, 2, 2),
    "cube": (3, 4, 5),
    "norm.bias": (7,),
    "one.bias": (1,),
    "logit_scale": (),
}
GRID = 1 << 18
BACKBONE = OpenClip("tiny", 8, {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 2})
IMAGES = 24  # unlabelled ones per task


def drawn(*shape, seed=0):
    """Gaussian entries rounded to multiples of 2^-18: sums and differences of a few of them are exact in fp32."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * GRID).round() / GRID


@cache
def tower():
    """The shapes of a tiny open_clip image tower's parameters; on demand, as importing open_clip takes seconds."""
    return {key: tuple(tensor.shape) for key, tensor in BACKBONE.build().state_dict().items()}


def plain():
    """Shapes of every kind under names that say nothing: no FFN is found among them."""
    return SHAPES


def mixed():
    """A tower and parameters of every other kind beside it."""
    return {**SHAPES, **tower()}


def family(tasks, shapes=SHAPES, dtype=torch.float32, spread=1.0, size=1.0):
    """State dicts of a base and of `tasks` experts, with an integer buffer beside the parameters in `shapes`.

    Entries of the base have deviation `size`, those of the task vectors `spread`.
    """

    def state(seed, around=None, spread=size):
        tensors = {}
        for index, (key, shape) in enumerate(shapes.items()):
            noise = spread * drawn(*shape, seed=1000 * seed + index)
            tensors[key] = (noise if around is None else around[key].float() + noise).to(dtype)
        return tensors | {"position_ids": torch.arange(4) + seed}

    base = state(0)
    return base, [state(1 + task, base, spread) for task in range(tasks)]


def task_vectors(base, experts):
    """tau [T, *shape] of every floating parameter in fp64."""
    floating = (key for key, tensor in base.items() if tensor.is_floating_point())
    return {key: torch.stack([expert[key].double() - base[key].double() for expert in experts]) for key in floating}


@cache
def noise(task):
    """The images of a task."""
    return drawn(IMAGES, 3, 16, 16, seed=crc32(task.encode()))


def opened(base, experts, tasks=None):
    """Experts in memory."""
    return Experts.open(base, experts, tasks)


def assert_slopes(free, gradient, loss):
    """`gradient` [T] is how fast `loss()` changes with every entry of `free` [T, ...]."""
    for task in range(len(free)):
        ends = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                free[task] += step
                ends.append(float(loss()))
                free[task] -= step
        assert float(gradient[task]) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=1e-2)


class Noise:
    """Data double: images of noise, those of a task and their labels drawn by its name, that a tower measures.

    The model trained on all tasks is the base, which learned nothing.
    """

    def __init__(self, experts):
        self.experts, self.images = experts, [noise(name) for name in experts.tasks]

    def unlabelled(self, split):
        tasks, sizes = self.experts.tasks, (IMAGES,) * len(self.images)
        heads = tuple(ZeroShot(drawn(5, 8, seed=crc32(name.encode()) + 1)) for name in tasks)
        build = BACKBONE.build if "visual.proj" in self.experts.origin.specs() else nn.Identity
        images = lambda task, some: self.images[task][some]  # noqa: E731
        return Calibration(split, tasks, sizes, images, heads, build, BACKBONE.identity())

    def labels(self, split):
        return [drawn(IMAGES, seed=crc32(name.encode()) + 2).mul(100).long() % 5 for name in self.experts.tasks]

    def validate(self, merged):
        """Of every task a smooth function of all weights and its name."""
        means = [sum(float(weight.double().sum()) / max(weight.numel(), 1) for weight in model.values())
                 for model in models(merged)]  # fmt: skip
        tasks = zip(self.experts.tasks, cycle(means))
        values = {name: 0.5 + math.atan(mean + crc32(name.encode()) % 100 / 100) / math.pi for name, mean in tasks}
        return {name: Score("noise", value, 9, 0.1) for name, value in values.items()}

    def multitask(self):
        return self.experts.origin


class Made:
    """Data double whose unlabelled inputs of a split a function makes."""

    def __init__(self, unlabelled):
        self.unlabelled = unlabelled


def context(experts, data=None, **settings):
    """A context whose data are noise, or `data`."""
    return Context(Noise(experts) if data is None else data, **settings)


def applied(method, experts):
    """What a method makes of experts, with images of noise to look at."""
    return call(method, experts, context(experts))


def asks(method, known={}):  # noqa: B006
    """Whether a method asks what a parameter is: it refuses names that no table has. Tried once for every method."""
    if (told := repr(method)) not in known:
        try:
            applied(method, opened(*family(2, plain())))
            known[told] = False
        except UserError as error:
            known[told] = "is not in the table" in str(error) or "base and experts lack" in str(error)
    return known[told]


def suited(method, shapes=mixed):
    """Shapes that a method merges: those of the tower alone where it asks what a parameter is."""
    return tower() if asks(method) else shapes()


def merged_of(method, base, experts, tasks=None):
    """What `merge` gives, for a method that may ask for unlabelled images."""
    return applied(method, opened(base, experts, tasks))


def models(merged):
    """Every dense model a merge stands for: one, or one per task if it keeps task-specific parts."""
    gates = [merged.one_hot(task) for task in range(len(merged.tasks))] if merged.deltas else [None]
    return [dict(merged.state(gate)) for gate in gates]


def equal(first, second):
    """Whether two dicts of tensors hold the same keys and bits."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def quick(method):
    """A method of that class with its defaults, but for the length of a descent, of a group and of a front, and for
    what it may store."""
    made = lasting(method(), 2)
    sizes = {"group": 8, "front": 2, "storage": 1.0}
    return replace(made, **{name: size for name, size in sizes.items() if hasattr(made, name)})


def lasting(made, steps):
    """A method whose descents and searches take that many steps."""
    if hasattr(made, "train"):
        once = {"rounds": 1} if hasattr(made, "rounds") else {}  # the last bits of long descents depend on threads
        return replace(made, train=replace(made.train, steps=steps), **once)
    searches = {option.name: getattr(made, option.name) for option in fields(made)}
    short = {name: replace(inner, trials=steps) for name, inner in searches.items() if isinstance(inner, Trials)}
    return replace(made, **short, **({"steps": steps} if hasattr(made, "steps") else {}))


def every_method():
    """All method classes in the files of merging/methods, so that a new file is tested without being named here.

    But for those that do not merge any number of experts, as they say themselves: SLERP, Model Stock; and for
    `quantising` ones.
    """
    return [method for method in methods.discovered().values() if not {"takes", "packs"} & vars(method).keys()]


def quantising():
    """The classes of methods that round weights to a few bits, so that nothing is the base's to the last one."""
    return [method for method in methods.discovered().values() if "packs" in vars(method)]
