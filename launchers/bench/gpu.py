"""Forwards and merges on a GPU, each held against the CPU in double precision: `python -m launchers.bench gpu`."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from launchers.bench import TASKS
from launchers.bench.measure import report, timed
from launchers.bench.models import Deltas, Models
from merging import methods
from merging.context import Context
from merging.experts import Experts
from merging.methods.method import Method, call

CHECKED, FFNS = 2, 24  # images whose features are checked; FFN matrices that are decomposed
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2, "merge": 1e-3}  # of the relative error, by Frobenius norms
METHODS = ("TaskArithmetic", "TsvM", "IsoC", "Wudi", "Ties")  # the last is the slowest to check
Row = tuple[str, str, Callable[[], tuple[float, float]]]  # title, key of TOLERANCES, measures seconds and error


def main(options: argparse.Namespace) -> None:
    """Exits 1 where a check fails, after the table."""
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: torch sees no GPU. --device cpu --arch tiny tries the code without one.")
    torch.backends.cudnn.allow_tf32 = False  # of the patch embedding: fp32 is fp32
    end, lines, wrong = time.perf_counter() + 60 * options.minutes, [], []
    for arch in options.arch:
        models = Models(arch, options.batch)
        for title, kind, measure in (*forwards(models, device, options.repeat), *merges(models, device)):
            if time.perf_counter() > end:
                lines.append((arch, title, "not begun: out of time", ""))
                continue
            seconds, error = measure()
            wrong += [f"{arch}, {title}: {error:.1e}"] * (not error <= TOLERANCES[kind])
            lines.append((arch, title, f"{seconds:.4f}", f"{error:.1e}"))
            print(*lines[-1], sep=", ", file=sys.stderr, flush=True)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    report(options, "gpu", lines, card=card, checked=CHECKED)
    if wrong:
        raise SystemExit(f"error: not what the CPU computes in double precision: {'; '.join(wrong)}")


def forwards(models: Models, device: torch.device, repeat: int) -> Iterator[Row]:
    """Static, Duet and Twin, every image with gating weights of its own."""
    deltas: dict[str, Callable[[], Deltas]] = {"static": dict, "Twin, r = 16": partial(models.twin, 16)}
    deltas |= {f"Duet, R = {rank}": partial(models.duet, rank) for rank in (64, 160) if rank <= models.width}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for title, make in deltas.items():
            yield f"forward, {title}, {name}", name, partial(forward, models, make, device, dtype, repeat)


@torch.inference_mode()
def forward(
    models: Models, make: Callable[[], Deltas], device: torch.device, dtype: torch.dtype, repeat: int
) -> tuple[float, float]:
    """Seconds of the fastest, and the error of its first features."""
    deltas, images, w = make(), models.images, models.w
    exact = models.installed(deltas).double()(images[:CHECKED].double(), w=w[:CHECKED].double())
    model, (images, w) = models.installed(deltas).to(device, dtype), (x.to(device, dtype) for x in (images, w))
    times, outputs = zip(*(timed(lambda: model(images, w=w)) for _ in range(1 + repeat)), strict=True)
    return min(times), relative(outputs[0][:CHECKED], exact)


def merges(models: Models, device: torch.device) -> Iterator[Row]:
    """Methods of merging.methods on all parameters, and Tucker decompositions of FFN matrices."""
    experts = cache(lambda: synthetic(models, device))
    yield f"merge, Tucker of {FFNS} FFN matrices", "merge", lambda: decompose(experts())
    for name in METHODS:
        yield f"merge, {name}", "merge", lambda name=name: merge(getattr(methods, name)(), experts())


def merge(method: Method, experts: Experts) -> tuple[float, float]:
    """Seconds for all parameters, and the largest error of one in the first block."""
    seconds, merged = timed(lambda: call(method, experts, Context(device=experts.device)))
    block = [key for key in experts.specs() if ".resblocks.0." in key]
    whole = isinstance(method, methods.Ties)  # its threshold is that of all parameters
    exact = call(method, on_cpu(experts if whole else experts.part(block)))
    return seconds, max(relative(merged.shared[key], exact.shared[key]) for key in block)


def decompose(experts: Experts) -> tuple[float, float]:
    """Seconds for all, and how much less of the norm of the first is kept than on the CPU."""
    shapes = {key: experts.specs()[key].shape for key in experts.keys("ffn")}
    ranks = {key: (TASKS, *[max(1, min(shape) * 160 // 768)] * 2) for key, shape in shapes.items() if len(shape) == 2}
    keys = [*ranks][:FFNS]
    seconds, factors = timed(lambda: [experts.tucker(experts.tau(key), ranks[key]) for key in keys])
    # both stop before the best subspace of noise: what is kept can be compared, the factors cannot
    exact = on_cpu(experts).tucker(experts.tau(keys[0]), ranks[keys[0]])
    return seconds, max(0.0, 1 - float(factors[0].core.double().norm() / exact.core.double().norm()))


def synthetic(models: Models, device: torch.device) -> Experts:
    """The base and experts near it, in memory: each entry moved by N(0, 0.002)."""
    states = [{key: weight + 0.002 * torch.randn(weight.shape) for key, weight in models.weights.items()}
              for _ in range(TASKS)]  # fmt: skip
    return Experts.open(models.weights, states, device=device)


def on_cpu(experts: Experts) -> Experts:
    return replace(experts, device=torch.device("cpu"))


def relative(result: Tensor, exact: Tensor) -> float:
    """||result - exact|| / ||exact||, in double precision."""
    result, exact = result.detach().cpu().double(), exact.detach().cpu().double()
    return float((result - exact).norm() / exact.norm().clamp_min(1e-300))
