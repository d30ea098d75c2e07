"""What routing costs at inference: `python -m launchers.bench forward`; --against compares with another checkout.

Random weights and images; every sample mixes the tasks in its own way. All rows take turns in one process.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from launchers.bench import pairs
from launchers.bench.measure import MIB, machine, report
from launchers.bench.models import SIZES, TASKS, Models

if TYPE_CHECKING:
    from torch import Tensor

    from merging.deltas import Delta

HELP = "routed models against the static one"
LOOPED = 2  # samples that a loop is timed on
DUET, DEFAULT = (16, 64, 160, 256), 160


class Row(NamedTuple):
    """One way to run the batch, or `samples` of it alone."""

    title: str
    run: Callable[[], object]
    macs: int  # per sample
    samples: int  # no more than the batch has


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", choices=SIZES, default="b32", help="shapes of ViT-B/32 or ViT-L/14")
    parser.add_argument("--batch", type=int, default=32, help=f"images, at least {LOOPED}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeat", type=int, default=5, help="turns, the fastest counts")
    parser.add_argument("--training-memory", action="store_true", help="what training gates keeps, instead of time")
    parser.add_argument("--against", type=Path, help="an older checkout: CPU time of both in turns, on one thread")
    parser.add_argument("--pairs", type=int, default=20, help="turns of --against, the median counts")


class Bench:
    """Models of one size, a batch of images, and gating weights for each."""

    def __init__(self, arch: str, batch: int, device: str, dtype: str):
        import torch

        self.models = Models(arch)
        self.like = {"device": device, "dtype": torch.bfloat16 if dtype == "bf16" else torch.float32}
        self.images, self.w = self.models.inputs(batch, **self.like)

    def rows(self) -> Iterator[Row]:
        """The static forward first."""
        import torch

        from merging.merged import Routing
        from merging.routing.gates import GateShape

        models, batch = self.models, len(self.images)
        static, tower = models.backbone.macs, models.backbone.build().to(**self.like)
        tower.load_state_dict(models.weights)
        yield Row("static", self._calling({}), static, batch)
        yield Row("static, open_clip's own forward", lambda: tower(self.images), static, batch)
        for rank in DUET:
            deltas = models.duet(rank)
            yield Row(f"Duet, R = {rank}", self._calling(deltas), models.macs(deltas), batch)
            if rank == DEFAULT:
                gates = models.gates()
                gated = models.installed(deltas, gates, **self.like)
                title = f"Duet, R = {rank}, a gate in every block"
                yield Row(title, partial(gated, self.images), models.macs(deltas, gates), batch)
                building = static + sum(delta.mix_macs() for delta in deltas.values())
                title = f"Duet, R = {rank}, a matrix per sample"
                yield Row(title, self._calling(deltas, "materialised"), building, batch)
                yield Row(f"Duet, R = {rank}, loop over samples", self._folding(deltas), building, LOOPED)
        for rank in (4, 16, models.tenth):
            deltas = models.twin(rank)
            yield Row(f"Twin, r = {rank}", self._calling(deltas), models.macs(deltas), batch)
            if rank == 16:  # every image to one expert, the images sorted by expert
                w = torch.eye(TASKS, **self.like)[torch.arange(batch) % TASKS]
                macs = models.macs(deltas, Routing("given", gate=GateShape(sees="early", top_k=1)))
                yield Row("Twin, r = 16, top-1, grouped", self._calling(deltas, "grouped", w), macs, batch)
        for title, whole in (("the FFNs, added in place", False), ("all linear layers, added as dictionaries", True)):
            weights = {key: weight for key, weight in tower.named_parameters()
                       if weight.ndim == 2 and ("resblocks" if whole else ".mlp.") in key}  # fmt: skip
            macs = static + TASKS * sum(weight.numel() for weight in weights.values())
            run = self._summing(tower, weights, whole)
            yield Row(f"loop over samples, T dense changes of {title}", run, macs, LOOPED)

    def _calling(self, deltas: "Mapping[str, Delta]", kernel: str = "auto", w: "Tensor | None" = None) -> Callable:
        """The whole batch with given gating weights."""
        model: Any = self.models.installed(deltas, **self.like)
        model, w = model.use(kernel), self.w if w is None else w
        return lambda: model(self.images, w=w)

    def _folding(self, deltas: "Mapping[str, Delta]") -> Callable[[], object]:
        """Sample by sample: multiply the factors out to W(x), then a static forward."""
        model: Any = self.models.installed(deltas, **self.like)
        model.use("folded")
        return lambda: [model(x, w=w) for x, w in zip(self.images[:LOOPED].split(1), self.w, strict=False)]

    def _summing(self, tower: Any, weights: "Mapping[str, Tensor]", whole: bool) -> Callable[[], object]:
        """For each sample, add T weighted dense changes to the weights, and run the model that comes out.

        The whole model as Twin-Merging's code does it, one dictionary of products and one of sums for each task; or
        the FFNs alone and in place, as fast as a loop gets. Weights of one shape share their changes.
        """
        import torch
        from torch.func import functional_call

        dense = {weight.shape: torch.randn(TASKS, *weight.shape, **self.like) * 1e-3 for weight in weights.values()}

        def run() -> None:
            for x, w in zip(self.images[:LOOPED].split(1), self.w.tolist(), strict=False):
                total = dict(weights) if whole else {key: weight.clone() for key, weight in weights.items()}
                for task, share in enumerate(w):
                    if whole:
                        scaled = {key: share * dense[weight.shape][task] for key, weight in weights.items()}
                        total = {key: weight + scaled[key] for key, weight in total.items()}
                    for weight in () if whole else total.values():
                        weight.add_(dense[weight.shape][task], alpha=share)
                functional_call(tower, total, (x,))

        return run


def timed(runs: list[Callable[[], object]], repeat: int, device: str) -> list[float]:
    """Seconds of each, the fastest of `repeat` turns."""
    import torch

    best = [float("inf")] * len(runs)
    with torch.inference_mode():
        for turn in range(repeat + 1):  # the first warms up
            for index, run in enumerate(runs):
                start = time.perf_counter()
                run()
                if device == "cuda":
                    torch.cuda.synchronize()
                best[index] = min(best[index], time.perf_counter() - start) if turn else best[index]
    return best


def main(options: argparse.Namespace) -> None:
    import torch

    from launchers.bench.memory import peak

    if options.against is not None:
        return report(options, f"forward against {options.arch}", pairs.compare(options))
    if options.training_memory:
        return report(options, f"forward memory {measured(options)}", training_memory(options))
    rows = list(Bench(options.arch, options.batch, options.device, options.dtype).rows())
    seconds = timed([row.run for row in rows], options.repeat, options.device)
    lines = ["| | ms per batch | ratio to static | ratio in MACs | peak memory, MiB |", "|---" + "|---:" * 4 + "|"]
    with torch.inference_mode():
        for row, best in zip(rows, seconds, strict=True):
            took, held = best * options.batch / row.samples, peak(row.run, options.device) / MIB
            numbers = f"{1e3 * took:.1f} | {took / seconds[0]:.3f} | {row.macs / rows[0].macs:.3f} | {held:.0f}"
            lines.append(f"| {row.title} | {numbers} |")
    report(options, f"forward {measured(options)}", f"{caption(options)}\n\n" + "\n".join(lines))


def measured(options: argparse.Namespace) -> str:
    return f"{options.arch} {options.device} {options.dtype}"


def training_memory(options: argparse.Namespace) -> str:
    """Bytes that autograd keeps for gradients to the gating weights, beyond those of the static blocks."""
    from launchers.bench.memory import saved

    lines = ["| images | factored, MiB | a matrix per sample, MiB |", "|---:|---:|---:|"]
    for batch in (options.batch, 2 * options.batch):
        bench = Bench(options.arch, batch, options.device, options.dtype)
        deltas, images = bench.models.duet(DEFAULT), bench.images.requires_grad_()

        def kept(deltas: Any, kernel: str = "auto", bench: Bench = bench, images: Any = images) -> float:
            model: Any = bench.models.installed(deltas, **bench.like)
            model.use(kernel)
            w = bench.w.clone().requires_grad_()
            return saved(lambda: model(images, w=w).sum(), [*model.parameters(), *model.buffers()]) / MIB

        sizes = [kept(deltas, kernel) - kept({}) for kernel in ("factored", "materialised")]
        lines.append(f"| {batch} | {sizes[0]:.1f} | {sizes[1]:.1f} |")
    title = f"Duet, R = {DEFAULT}, {options.arch}: what autograd keeps for the gates beyond the static blocks' share."
    return f"{title}\n\n" + "\n".join(lines)


def caption(options: argparse.Namespace) -> str:
    """What was measured, where and how."""
    import torch

    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    return (
        f"Forward of {options.batch} images through {options.arch} shapes with random weights, {TASKS} tasks, weights "
        f"of its own for every image; {options.dtype}. {where}; {machine()}; "
        f"{time.strftime('%Y-%m-%d', time.gmtime())}; the fastest of {options.repeat} turns, in which all rows "
        f"alternate; one turn before to warm up. The ratio in MACs is the accountant's, the floor of the measured one. "
        f"Peak memory is that of the tensors made by the forward, weights left out. Loops run {LOOPED} images and are "
        f"scaled to the batch, their memory is that of one image; matrices of one shape share their dense changes, "
        f"which saves memory, not work."
    )
