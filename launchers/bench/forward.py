"""What routing costs at inference: `python -m launchers.bench forward`; --against compares with another checkout.

Random weights and images; every sample mixes the tasks in its own way. All rows take turns in one process.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from launchers.bench import TASKS, pairs
from launchers.bench.measure import MIB, report, tensor_bytes, timed
from launchers.bench.models import Deltas, Models
from merging.merged import Routing
from merging.routing.gates import GateShape

LOOPED = 2  # samples that a loop is timed on
DUET, DEFAULT = (16, 64, 160, 256), 160  # ranks


class Row(NamedTuple):
    """One way to run the batch, or `samples` of it alone."""

    title: str
    run: Callable[[], Any]
    macs: int  # per sample
    samples: int | None = None


def main(options: argparse.Namespace) -> None:
    if options.against is not None:
        return pairs.compare(options)
    if options.training_memory:
        return training_memory(options)
    ways = [*rows(Models(options.arch, options.batch))]
    with torch.inference_mode():
        turns = [[timed(way.run)[0] for way in ways] for _ in range(1 + options.repeat)][1:]
        peaks = [tensor_bytes(way.run)[0] / MIB for way in ways]
    seconds = [min(times) * options.batch / (way.samples or options.batch)
               for way, times in zip(ways, zip(*turns, strict=True), strict=True)]  # fmt: skip
    lines = [(way.title, f"{1e3 * took:.1f}", f"{took / seconds[0]:.3f}", f"{way.macs / ways[0].macs:.3f}",
              f"{peak:.0f}") for way, took, peak in zip(ways, seconds, peaks, strict=True)]  # fmt: skip
    report(options, "forward", lines, looped=LOOPED, threads=torch.get_num_threads())


def rows(models: Models) -> Iterator[Row]:
    """The static forward first."""
    static = models.backbone.macs
    yield Row("static", calling(models, {}), static)
    yield Row("static, open_clip's own forward", lambda: models.tower(models.images), static)
    for rank in DUET:
        deltas = models.duet(rank)
        yield Row(f"Duet, R = {rank}", calling(models, deltas), models.macs(deltas))
        if rank == DEFAULT:
            yield from variants(models, deltas)
    for rank in (4, 16, models.tenth):
        deltas = models.twin(rank)
        yield Row(f"Twin, r = {rank}", calling(models, deltas), models.macs(deltas))
        if rank == 16:  # every image to one expert, the images sorted by expert
            top = Routing("given", gate=GateShape(sees="early", top_k=1))
            w = torch.eye(TASKS)[torch.arange(len(models.images)) % TASKS]
            run = calling(models, deltas, "grouped", w)
            yield Row("Twin, r = 16, top-1, grouped", run, models.macs(deltas, top))
    for title, whole in (("the FFNs, added in place", False), ("all linear layers, added as dictionaries", True)):
        weights = {key: weight for key, weight in models.tower.named_parameters()
                   if weight.ndim == 2 and ("resblocks" if whole else ".mlp.") in key}  # fmt: skip
        macs = static + TASKS * sum(weight.numel() for weight in weights.values())
        title = f"loop over samples, T dense changes of {title}"
        yield Row(title, summing(models, weights, whole), macs, LOOPED)


def variants(models: Models, deltas: Deltas) -> Iterator[Row]:
    """Duet at its usual rank by other ways."""
    title, gates = f"Duet, R = {DEFAULT}", models.gates()
    gated = models.installed(deltas, gates)
    yield Row(f"{title}, a gate in every block", lambda: gated(models.images), models.macs(deltas, gates))
    building = models.backbone.macs + sum(delta.mix_macs() for delta in deltas.values())
    yield Row(f"{title}, a matrix per sample", calling(models, deltas, "materialised"), building)
    folded = models.installed(deltas).use("folded")  # multiplies the factors out to W(x), then a static forward
    loop = lambda: [folded(x, w=w) for x, w in zip(models.images[:LOOPED].split(1), models.w, strict=False)]  # noqa: E731
    yield Row(f"{title}, loop over samples", loop, building, LOOPED)


def calling(models: Models, deltas: Deltas, kernel: str = "auto", w: Tensor | None = None) -> Callable[[], Any]:
    """The whole batch with given gating weights."""
    model, w = models.installed(deltas).use(kernel), models.w if w is None else w
    return lambda: model(models.images, w=w)


def summing(models: Models, weights: Mapping[str, Tensor], whole: bool) -> Callable[[], Any]:
    """For each sample, add T weighted dense changes to the weights, and run the model that comes out.

    The whole model as Twin-Merging's code does it, one dictionary of products and one of sums for each task; or the
    FFNs alone and in place, as fast as a loop gets. Weights of one shape share their changes.
    """
    dense = {weight.shape: torch.randn(TASKS, *weight.shape) * 1e-3 for weight in weights.values()}

    def run() -> None:
        for x, w in zip(models.images[:LOOPED].split(1), models.w.tolist(), strict=False):
            total = dict(weights) if whole else {key: weight.clone() for key, weight in weights.items()}
            for task, share in enumerate(w):
                if whole:
                    scaled = {key: share * dense[weight.shape][task] for key, weight in weights.items()}
                    total = {key: weight + scaled[key] for key, weight in total.items()}
                for weight in () if whole else total.values():
                    weight.add_(dense[weight.shape][task], alpha=share)
            functional_call(models.tower, total, (x,))

    return run


def training_memory(options: argparse.Namespace) -> None:
    """MiB that autograd keeps for gradients to the gating weights, beyond those of the static blocks."""
    lines = []
    for batch in (options.batch, 2 * options.batch):
        models = Models(options.arch, batch)
        deltas, static = models.duet(DEFAULT), kept(models, {}, "auto")
        sizes = [kept(models, deltas, kernel) - static for kernel in ("factored", "materialised")]
        lines.append((str(batch), *(f"{size:.1f}" for size in sizes)))
    report(options, "memory", lines, rank=DEFAULT)


def kept(models: Models, deltas: Deltas, kernel: str) -> float:
    model, images, w = models.installed(deltas).use(kernel), models.images.requires_grad_(), models.w.requires_grad_()
    return tensor_bytes(lambda: model(images, w=w).sum())[1] / MIB
