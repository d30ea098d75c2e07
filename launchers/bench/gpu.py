"""Forwards and merges on a GPU, each held against the CPU in double precision: `python -m launchers.bench gpu`."""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from launchers.bench.measure import machine, report
from launchers.bench.models import SIZES, TASKS, Models

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from merging.experts import Experts

HELP = "forwards and merges on one GPU, checked against the CPU"
CHECKED, FFNS = 2, 24  # images whose features are checked; FFN matrices that are decomposed
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2, "merge": 1e-3}  # of the relative error, by Frobenius norms
METHODS = ("TaskArithmetic", "Ties", "TsvM", "IsoC", "Wudi")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", choices=SIZES, default=["b32", "l14"], help="shapes of the towers")
    parser.add_argument("--batch", type=int, default=64, help="images")
    parser.add_argument("--repeat", type=int, default=10, help="forwards, the fastest counts")
    parser.add_argument("--device", default="cuda", help="cuda; cpu tries the code where there is no GPU")
    parser.add_argument("--minutes", type=float, default=4.5, help="after which no further row is begun")


def main(options: argparse.Namespace) -> None:
    """Exits 1 where a check fails, after the table."""
    import torch

    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: torch sees no GPU. --device cpu --arch tiny tries the code without one.")
    torch.backends.cudnn.allow_tf32 = False  # of the patch embedding: fp32 is fp32
    end, wrong = time.perf_counter() + 60 * options.minutes, []
    lines = ["| | | seconds | relative error |", "|---|---|---:|---:|"]
    for arch in options.arch:
        models = Models(arch)
        for title, kind, measure in (*forwards(models, options, device), *merges(models, device)):
            if time.perf_counter() > end:
                lines.append(f"| {arch} | {title} | not begun: out of time | |")
                continue
            seconds, error = measure()
            wrong += [f"{arch}, {title}: {error:.1e}"] * (not error <= TOLERANCES[kind])
            lines.append(f"| {arch} | {title} | {seconds:.4f} | {error:.1e} |")
    report(options, "gpu", f"{caption(options)}\n\n" + "\n".join(lines))
    if wrong:
        raise SystemExit(f"error: not what the CPU computes in double precision: {'; '.join(wrong)}")


Measure = Callable[[], "tuple[float, float]"]  # seconds, relative error


def forwards(models: Models, options: argparse.Namespace, device: "torch.device") -> Iterator[tuple[str, str, Measure]]:
    """Static, Duet and Twin, every image with gating weights of its own."""
    import torch

    def measure(deltas: Any, dtype: "torch.dtype") -> tuple[float, float]:
        images, w = models.inputs(options.batch)
        exact = models.installed(deltas, dtype=torch.double)(images[:CHECKED].double(), w=w[:CHECKED].double())
        model = models.installed(deltas, device=device, dtype=dtype)
        images, w = images.to(device, dtype), w.to(device, dtype)
        seconds = min(timed(lambda: model(images, w=w), device)[0] for _ in range(1 + options.repeat))
        return seconds, relative(model(images, w=w)[:CHECKED], exact)

    ranks = [rank for rank in (64, 160) if rank <= models.width]
    made: dict[str, Callable[[], Any]] = {"static": dict, "Twin, r = 16": lambda: models.twin(16)}
    made |= {f"Duet, R = {rank}": (lambda rank=rank: models.duet(rank)) for rank in ranks}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for title, deltas in made.items():
            run = inferring(lambda deltas=deltas, dtype=dtype: measure(deltas(), dtype))
            yield f"forward, {title}, {name}", name, run


def merges(models: Models, device: "torch.device") -> Iterator[tuple[str, str, Measure]]:
    """Methods of merging.methods on all parameters, and Tucker decompositions of FFN matrices."""
    from merging import methods
    from merging.context import Context
    from merging.methods.method import call

    opened = cache(lambda: synthetic(models, device))

    def merge(method: Any) -> tuple[float, float]:
        experts = opened()
        seconds, merged = timed(lambda: call(method, experts, Context(device=device)), device)
        block = [key for key in experts.specs() if ".resblocks.0." in key]
        whole = isinstance(method, methods.Ties)  # its threshold is that of all parameters
        exact = call(method, on_cpu(experts if whole else experts.part(block)))
        errors = [relative(merged.shared[key], exact.shared[key]) for key in block]
        return seconds, max(errors)

    for name in METHODS:
        yield f"merge, {name}", "merge", lambda name=name: merge(getattr(methods, name)())
    yield f"merge, Tucker of {FFNS} FFN matrices", "merge", lambda: decompose(opened(), device)


def decompose(experts: "Experts", device: "torch.device") -> tuple[float, float]:
    """Seconds for all, and how the energy kept of the first differs from that on the CPU."""
    matrices = [key for key in experts.keys("ffn") if len(experts.specs()[key].shape) == 2][:FFNS]
    sides = [min(experts.specs()[key].shape) for key in matrices]
    ranks = [(TASKS, *[max(1, side * 160 // 768)] * 2) for side in sides]
    run = lambda: [experts.tucker(experts.tau(key), triple) for key, triple in zip(matrices, ranks, strict=True)]  # noqa: E731
    seconds, decomposed = timed(run, device)
    exact = on_cpu(experts).tucker(experts.tau(matrices[0]), ranks[0])
    return seconds, abs(1 - float(decomposed[0].core.double().norm() / exact.core.double().norm()))


def synthetic(models: Models, device: "torch.device") -> "Experts":
    """The base and experts near it, in memory: each entry moved by N(0, 0.002)."""
    import torch

    from merging.experts import Experts

    def moved(weight: "Tensor") -> "Tensor":
        return weight + 0.002 * torch.randn(weight.shape, device=device).cpu()

    states = [{key: moved(weight) for key, weight in models.weights.items()} for _ in range(TASKS)]
    return Experts.open(models.weights, states, device=device)


def on_cpu(experts: "Experts") -> "Experts":
    from dataclasses import replace

    import torch

    return replace(experts, device=torch.device("cpu"))


def timed(run: Callable[[], Any], device: "torch.device") -> tuple[float, Any]:
    """Seconds until the device has done it, and the result."""
    import torch

    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def inferring(measure: Measure) -> Measure:
    """The same without a record for gradients."""
    import torch

    return torch.inference_mode()(measure)


def relative(result: "Tensor", exact: "Tensor") -> float:
    """||result - exact|| / ||exact||, in double precision."""
    result, exact = result.detach().cpu().double(), exact.detach().cpu().double()
    return float((result - exact).norm() / exact.norm().clamp_min(1e-300))


def caption(options: argparse.Namespace) -> str:
    """What was measured, where and how."""
    import torch

    card = torch.cuda.get_device_name() if options.device.startswith("cuda") else "no GPU"
    return (
        f"{card}; {machine()}; {time.strftime('%Y-%m-%d', time.gmtime())}. Random weights, {TASKS} tasks. Forwards: "
        f"{options.batch} images, each with gating weights of its own, the fastest of {options.repeat}; the error is "
        f"that of the features of {CHECKED} images against the CPU in fp64. Merges: from memory to memory, once; "
        "matrices are decomposed on the GPU, entries are merged on the CPU; the error is the largest of a parameter of "
        "the first block against the CPU, where decompositions are in fp64 (Tucker: of the norm of the first core)."
    )
