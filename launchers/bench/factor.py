"""What Tucker decompositions cost: `python -m launchers.bench factor` prints a markdown table.

Every row is a fresh process that makes its own tensors; `job` runs in it, and nothing else here imports torch.
"""

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING

from launchers.bench.measure import MIB, machine, measure, report

if TYPE_CHECKING:
    from torch import Tensor

    from merging.decompose.tucker import Tucker

HELP = "Tucker decompositions"
TASKS, BLOCKS = 8, 12
TRIPLES = [(8, rank, rank) for rank in (16, 32, 48, 64, 80, 96, 112, 128, 144, 160)]
TITLES = {
    "tensorly": "tensorly, tucker",
    "hosvd": "HOSVD",
    "st_hosvd": "ST-HOSVD",
    "hooi": "HOOI",
    "many": f"HOOI at {len(TRIPLES)} rank triples",
    "model": f"HOOI, {2 * BLOCKS} FFN tensors of ViT-B/32, two single-threaded workers",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--wide", type=int, default=3072, help="outputs of the first FFN matrix; a quarter is the width"
    )
    parser.add_argument("--repeat", type=int, default=1, help="processes per row, the fastest counts")
    parser.add_argument("--tensorly", action="store_true", help="a row for tensorly: half a minute")


def sample(wide: int, *seed: object) -> "Tensor":
    """[8, wide, wide / 4]: shared and per-task low-rank parts with falling spectra, and noise."""
    import torch

    from merging.ops import generator

    narrow, g = wide // 4, generator("bench factor", *seed)
    common, own = narrow // 8, narrow // 96
    scale = lambda count: torch.arange(1, count + 1) ** -0.5 / (wide * narrow) ** 0.25  # noqa: E731
    left, right = torch.randn(wide, common, generator=g) * scale(common), torch.randn(common, narrow, generator=g)
    stack = torch.randn(TASKS, wide, narrow, generator=g) * 2e-3
    for task in stack:
        task += left @ torch.randn(common, common, generator=g) @ right / common
        task += torch.randn(wide, own, generator=g) * scale(own) @ torch.randn(own, narrow, generator=g) / own**0.5
    return stack


def ranks(wide: int) -> list[tuple[int, int, int]]:
    """The triples for a smaller model."""
    scaled = lambda rank: max(1, rank * wide // 3072)  # noqa: E731
    return [(tasks, scaled(out), scaled(in_)) for tasks, out, in_ in TRIPLES]


def job(name: str, wide: str) -> str:
    """Runs in the measured process; returns [seconds without making the tensor, relative error] as JSON."""
    from merging.decompose.tucker import tucker, tucker_many

    size = int(wide)
    if name == "model":
        return json.dumps([*model(size)])
    stack, largest = sample(size), ranks(size)[-1]
    start = time.perf_counter()
    factors = tucker_many(stack, ranks(size))[-1] if name == "many" else tucker(stack, largest, engine=name)
    return json.dumps([time.perf_counter() - start, relative_error(stack, factors)])


def relative_error(stack: "Tensor", factors: "Tucker") -> float:
    """By Pythagoras: the approximation is a projection."""
    return (1 - float(factors.core.double().norm() / stack.double().norm()) ** 2) ** 0.5


def model(wide: int) -> tuple[float, float]:
    """Seconds and mean relative error of all FFN tensors, half of them transposed; two are in memory at a time."""
    from concurrent.futures import ThreadPoolExecutor

    import torch
    from threadpoolctl import threadpool_limits

    from merging.decompose.tucker import tucker

    first, largest = sample(wide), ranks(wide)[-1]

    def one(index: int) -> float:
        stack = first.roll(index, index % 3)
        stack = stack.mT.contiguous() if index % 2 else stack
        return relative_error(stack, tucker(stack, largest))

    start = time.perf_counter()
    with threadpool_limits(1), ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        errors = list(pool.map(one, range(2 * BLOCKS)))
    return time.perf_counter() - start, sum(errors) / len(errors)


def main(options: argparse.Namespace) -> None:
    seconds, lines = {}, ["| | seconds | relative error | peak memory, MiB |", "|---|---:|---:|---:|"]
    for name, title in TITLES.items():
        if name == "tensorly" and not options.tensorly:
            continue
        processes = [measure("launchers.bench.factor:job", name, options.wide) for _ in range(options.repeat)]
        seconds[name], error = min(process.work for process in processes)  # pyright: ignore[reportGeneralTypeIssues]
        peak = min(process.peak for process in processes) / MIB
        print(f"{title}: {seconds[name]:.2f} s, {peak:.0f} MiB", file=sys.stderr)
        ratio = f", {seconds['many'] / seconds['hooi']:.2f} times one" if name == "many" else ""
        lines.append(f"| {title}{ratio} | {seconds[name]:.2f} | {error:.4f} | {peak:.0f} |")
    text = f"{caption(options)}\n\n" + "\n".join(lines)
    report(options, "factor", text)


def caption(options: argparse.Namespace) -> str:
    """What was measured, where and how."""
    wide, triples = options.wide, ranks(options.wide)
    return (
        f"Tucker decompositions of {TASKS} x {wide} x {wide // 4} numbers at ranks {triples[-1]}: synthetic, shared "
        f"and per-task low-rank parts and noise. {machine()}; {time.strftime('%Y-%m-%d', time.gmtime())}; every row is "
        f"the fastest of {options.repeat} fresh processes, imports and making the tensor left out; other jobs on the "
        "same cores lengthen it. Peak memory is the largest resident set, with Python, torch and the tensor itself. "
        f"The rank triples run from {triples[0]} to {triples[-1]}, the error is that of the last; every second FFN "
        "tensor is wide instead of tall, and the error is their mean."
    )
