"""What the tests of merging/ share: small experts with every kind of parameter, and all methods there are."""

import importlib
import pkgutil
from dataclasses import is_dataclass

import torch

from merging import methods

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


def drawn(*shape, seed=0):
    """Gaussian entries rounded to multiples of 2^-18: sums and differences of a few of them are exact in fp32."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * GRID).round() / GRID


def family(tasks, shapes=SHAPES, dtype=torch.float32, spread=1.0):
    """State dicts of a base and of `tasks` experts, with an integer buffer beside the parameters in `shapes`."""

    def state(seed, around=None, spread=1.0):
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


def models(merged):
    """Every dense model a merge stands for: one, or one per task if it keeps task-specific parts."""
    gates = torch.eye(len(merged.tasks)) if merged.own else [None]
    return [dict(merged.state(gate)) for gate in gates]


def equal(first, second):
    """Whether two dicts of tensors hold the same keys and bits."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def every_method():
    """All method classes in the files of merging/methods, so that a new file is tested without being named here."""
    found = []
    for module in pkgutil.iter_modules(methods.__path__, "merging.methods."):
        classes = vars(importlib.import_module(module.name)).values()
        found += [
            each for each in classes if is_dataclass(each) and each.__module__ == module.name and hasattr(each, "needs")
        ]
    return found
