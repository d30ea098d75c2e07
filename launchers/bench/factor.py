"""What Tucker decompositions cost: `python -m launchers.bench factor`; every row is a fresh process that runs `job`."""

import argparse
from concurrent.futures import ThreadPoolExecutor

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from launchers.bench import SIZES, TASKS
from launchers.bench.measure import MIB, called, report, timed
from merging.decompose.tucker import Tucker, tucker, tucker_many
from merging.ops import generator

RANKS, FFNS = (16, 32, 48, 64, 80, 96, 112, 128, 144, 160), 24  # ranks of a width of 768
TITLES = {
    "tensorly": "tensorly, tucker",
    "hosvd": "HOSVD",
    "st_hosvd": "ST-HOSVD",
    "hooi": "HOOI",
    "many": f"HOOI at {len(RANKS)} rank triples",
    "model": f"HOOI, {FFNS} FFN tensors of ViT-B/32, two single-threaded workers",
}


def main(options: argparse.Namespace) -> None:
    seconds, lines, width = {}, [], SIZES[options.arch]["tower"]["width"]
    for name, title in TITLES.items():
        if name == "tensorly" and not options.tensorly:
            continue
        arguments = (title, "launchers.bench.factor:job", name, width)
        cost = min((called(*arguments) for _ in range(options.repeat)), key=lambda cost: cost.output[0])
        seconds[name], error = cost.output
        ratio = f", {seconds['many'] / seconds['hooi']:.2f} times one" if name == "many" else ""
        lines.append((title + ratio, f"{seconds[name]:.2f}", f"{error:.4f}", f"{cost.peak / MIB:.0f}"))
    first, *_, last = triples(width)
    report(options, "factor", lines, shape=f"{TASKS} x {4 * width} x {width}", first=first, last=last)


def triples(width: int) -> list[tuple[int, int, int]]:
    """Ranks for a model of this width."""
    scaled = [max(1, rank * width // 768) for rank in RANKS]
    return [(TASKS, rank, rank) for rank in scaled]


def job(name: str, width: str) -> tuple[float, float]:
    """Runs in the measured process; returns seconds without making the tensor, and the relative error."""
    stack, ranks = sample(int(width)), triples(int(width))
    if name == "model":
        seconds, errors = timed(lambda: model(stack, ranks[-1]))
        return seconds, sum(errors) / len(errors)
    run = (lambda: tucker_many(stack, ranks)[-1]) if name == "many" else (lambda: tucker(stack, ranks[-1], engine=name))
    seconds, factors = timed(run)
    return seconds, relative_error(stack, factors)


def sample(width: int) -> Tensor:
    """[T, 4 width, width]: shared and per-task low-rank components with falling spectra, and noise."""
    wide, g = 4 * width, generator("bench factor")
    common, specific = width // 8, max(1, width // 96)

    def factor(size: int, rank: int) -> Tensor:
        return torch.randn(size, rank, generator=g) * torch.arange(1, rank + 1) ** -0.5 / (wide * width) ** 0.25

    left, right = factor(wide, common), factor(width, common).T
    stack = torch.randn(TASKS, wide, width, generator=g) * 2e-3
    for task in stack:
        task += left @ torch.randn(common, common, generator=g) @ right / common
        task += factor(wide, specific) @ torch.randn(specific, width, generator=g) / specific**0.5
    return stack


def model(first: Tensor, ranks: tuple[int, int, int]) -> list[float]:
    """Relative errors of all FFN tensors, half of them transposed; two are in memory at a time."""

    def error(index: int) -> float:
        stack = first.roll(index, index % 3)
        stack = stack.mT.contiguous() if index % 2 else stack
        return relative_error(stack, tucker(stack, ranks))

    with threadpool_limits(1), ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(error, range(FFNS)))


def relative_error(stack: Tensor, factors: Tucker) -> float:
    """By Pythagoras: the approximation is a projection."""
    return (1 - float(factors.core.double().norm() / stack.double().norm()) ** 2) ** 0.5
