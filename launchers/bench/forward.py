"""What routing costs at inference: `python -m launchers.bench forward` prints a markdown table.

Random weights and images; every sample mixes the tasks in its own way. All rows take turns in one process.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

from launchers.bench.measure import MIB, machine, report

if TYPE_CHECKING:
    from torch import Tensor

    from merging.deltas import Delta
    from merging.layers import RoutedLinear
    from merging.merged import Routing
    from merging.routed import RoutedTower

HELP = "routed models against the static one"
TASKS, LOOPED = 8, 2  # samples that a loop is timed on
DUET, DEFAULT = (16, 64, 160, 256), 160
SIZES = {  # image, patch, width, blocks, features, rank that keeps a tenth of the singular values of a square matrix
    "b32": (224, 32, 768, 12, 512, 76),
    "l14": (224, 14, 1024, 24, 768, 102),
    "tiny": (32, 8, 64, 2, 32, 6),
}


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


class Bench:
    """Models of one size over the same static weights, a batch of images, and weights of the tasks for each."""

    def __init__(self, arch: str, batch: int, device: str, dtype: str):
        import torch

        from merging.backbones.open_clip import OpenClip

        image, patch, width, layers, features, self.tenth = SIZES[arch]
        facts = {"image_size": image, "patch_size": patch, "width": width, "layers": layers, "head_width": 64}
        self.backbone: OpenClip = OpenClip(arch, features, facts, quick_gelu=True)
        with torch.device("meta"):
            _ = self.backbone.macs  # is kept; counted on no memory
        self.like = {"device": device, "dtype": torch.bfloat16 if dtype == "bf16" else torch.float32}
        torch.manual_seed(0)
        self.tower = self.backbone.build().to(**self.like)
        self.weights = {key: tensor.detach() for key, tensor in self.tower.state_dict().items()}
        self.images = torch.randn(batch, 3, image, image, **self.like)
        self.w = torch.randn(batch, TASKS, **self.like).softmax(-1)

    def normal(self, *shape: int, size: float = 1.0) -> "Tensor":
        import torch

        return torch.randn(shape, **self.like) * size

    def install(self, own: Mapping[str, "Delta"]) -> "RoutedTower":
        """The backbone with these deltas, as merging.routed.install does it."""
        from merging.routed import RoutedTower

        return RoutedTower(self.tower, self.weights, own).eval()

    def duet(self, rank: int) -> "dict[str, Delta]":
        """Shared-factor deltas on the FFN matrices, their biases whole."""
        from merging.deltas import Dense, Tucker

        own: dict[str, Delta] = {}
        for key, weight in self.weights.items():
            if ".mlp." in key and weight.ndim == 2:
                (m, n), one = weight.shape, self.normal(TASKS, TASKS, size=0.3)
                core, out = self.normal(TASKS, rank, rank, size=1 / rank), self.normal(m, rank, size=m**-0.5)
                own[key] = Tucker(core, one, out, self.normal(n, rank, size=n**-0.5))
            elif ".mlp." in key:
                own[key] = Dense(self.normal(TASKS, *weight.shape, size=0.01))
        return own

    def twin(self, rank: int) -> "dict[str, Delta]":
        """Low-rank deltas on all linear layers of the blocks; query, key and value apart."""
        from merging.deltas import Delta, LowRank, Rows

        def low_rank(m: int, n: int) -> Delta:
            down = self.normal(TASKS * rank, n, size=n**-0.5)
            return LowRank(self.normal(m, TASKS * rank, size=0.1 * rank**-0.5), down, TASKS)

        own: dict[str, Delta] = {}
        for key, weight in self.weights.items():
            if "resblocks" in key and weight.ndim == 2:
                m, n = weight.shape
                own[key] = Rows([low_rank(m // 3, n) for _ in range(3)]) if "in_proj" in key else low_rank(m, n)
        return own

    def macs(self, own: "Mapping[str, Delta]", routing: "Routing | None" = None) -> int:
        """Of one sample, from the accountant."""
        from merging.accounting import macs
        from merging.checkpoints import StateDict
        from merging.merged import Merged, Routing

        tasks = tuple(map(str, range(TASKS)))
        return macs(Merged(StateDict({}), tasks, {}, deltas=own, routing=routing or Routing("given")), self.backbone)

    def rows(self) -> Iterator[Row]:
        """The static forward first."""
        static, batch = self.backbone.macs, len(self.images)
        yield Row("static", self._calling({}), static, batch)
        yield Row("static, open_clip's own forward", lambda: self.tower(self.images), static, batch)
        for rank in DUET:
            own = self.duet(rank)
            yield Row(f"Duet, R = {rank}", self._calling(own), self.macs(own), batch)
            if rank == DEFAULT:
                yield self._gated(own)
                building = static + sum(delta.mix_macs() for delta in own.values())
                yield Row(f"Duet, R = {rank}, a matrix per sample", self._calling(own, "materialised"), building, batch)
                yield Row(f"Duet, R = {rank}, loop over samples", self._folding(own), building, LOOPED)
        for rank in (4, 16, self.tenth):
            own = self.twin(rank)
            yield Row(f"Twin, r = {rank}", self._calling(own), self.macs(own), batch)
            if rank == 16:
                yield self._top_1(own)
        for title, whole in (("the FFNs, added in place", False), ("all linear layers, added as dictionaries", True)):
            linear = [
                w for key, w in self.weights.items() if w.ndim == 2 and ("resblocks" if whole else ".mlp.") in key
            ]
            dense = TASKS * sum(weight.numel() for weight in linear)
            yield Row(f"loop over samples, T dense changes of {title}", self._summing(whole), static + dense, LOOPED)

    def _calling(self, own: "Mapping[str, Delta]", kernel: str = "auto", w: "Tensor | None" = None) -> Callable:
        """The whole batch with given weights."""
        model, w = self.install(own).use(kernel), self.w if w is None else w
        return lambda: model(self.images, w)

    def _gated(self, own: "dict[str, Delta]") -> Row:
        from torch import nn

        from merging.merged import Routing
        from merging.routed import attach
        from merging.routing.gates import Gate, GateShape

        shape = GateShape()
        width = self.weights["visual.ln_post.weight"].numel()
        gates = nn.ModuleList([Gate(width, TASKS, shape).eval().to(**self.like) for _ in self.install({}).steps])
        routing, model = Routing("given", gate=shape, gates=gates), self.install(own)
        attach(model, routing)
        title = f"Duet, R = {DEFAULT}, a gate in every block"
        return Row(title, lambda: model(self.images), self.macs(own, routing), len(self.images))

    def _top_1(self, own: "dict[str, Delta]") -> Row:
        """Every image to one expert, the images sorted by expert."""
        import torch

        from merging.merged import Routing
        from merging.routing.gates import GateShape

        w = torch.eye(TASKS, **self.like)[torch.arange(len(self.images)) % TASKS]
        macs = self.macs(own, Routing("given", gate=GateShape(sees="early", top_k=1)))
        return Row("Twin, r = 16, top-1, grouped", self._calling(own, "grouped", w), macs, len(self.images))

    def _folding(self, own: "dict[str, Delta]") -> Callable[[], object]:
        """Sample by sample: multiply the factors out to W(x), then a static forward."""
        model = self.install(own).use("folded")
        return lambda: [model(x, w) for x, w in zip(self.images[:LOOPED].split(1), self.w, strict=False)]

    def _summing(self, whole: bool) -> Callable[[], object]:
        """For each sample, add T weighted dense changes to the weights, and run the model that comes out.

        The whole model as Twin-Merging's code does it, one dictionary of products and one of sums for each task; or
        the FFNs alone and in place, as fast as a loop gets.
        """
        model = self.install({})
        layers = [layer for block in model.steps for layer in (block.c_fc, block.c_proj)]
        layers += [cast("RoutedLinear", layer) for block in model.steps for layer in (block.attn, block.out) if whole]
        weights = [layer.weight for layer in layers]
        dense = {weight.shape: self.normal(TASKS, *weight.shape, size=1e-3) for weight in weights}
        mixing = self.w.tolist()

        def run() -> None:
            for x, w in zip(self.images[:LOOPED].split(1), mixing, strict=False):
                changes = [dense[weight.shape] for weight in weights]
                if not whole:
                    total = [weight.clone() for weight in weights]
                    for task, share in enumerate(w):
                        for each, change in zip(total, changes, strict=True):
                            each.add_(change[task], alpha=share)
                else:
                    total = weights
                    for task, share in enumerate(w):  # a model of changes after the other, as task vectors are added
                        scaled = [share * change[task] for change in changes]
                        total = [each + change for each, change in zip(total, scaled, strict=True)]
                for layer, weight in zip(layers, total, strict=True):
                    layer.weight = weight
                model(x)

        return run


def timed(rows: list[Row], repeat: int, device: str) -> list[float]:
    """Seconds per batch, the fastest of `repeat` turns."""
    import torch

    best = [float("inf")] * len(rows)
    with torch.inference_mode():
        for turn in range(repeat + 1):  # the first warms up
            for index, row in enumerate(rows):
                start = time.perf_counter()
                row.run()
                if device == "cuda":
                    torch.cuda.synchronize()
                best[index] = min(best[index], time.perf_counter() - start) if turn else best[index]
    return best


def main(options: argparse.Namespace) -> None:
    import torch

    from launchers.bench.memory import peak

    if options.training_memory:
        return report(options, f"forward memory {measured(options)}", training_memory(options))
    bench = Bench(options.arch, options.batch, options.device, options.dtype)
    rows = list(bench.rows())
    seconds = timed(rows, options.repeat, options.device)
    scale = [options.batch / row.samples for row in rows]
    lines = ["| | ms per batch | ratio to static | ratio in MACs | peak memory, MiB |", "|---" + "|---:" * 4 + "|"]
    with torch.inference_mode():
        for row, best, times in zip(rows, seconds, scale, strict=True):
            took, held = best * times, peak(row.run, options.device) / MIB
            numbers = f"{1e3 * took:.1f} | {took / seconds[0]:.3f} | {row.macs / rows[0].macs:.3f} | {held:.0f}"
            lines.append(f"| {row.title} | {numbers} |")
    report(options, f"forward {measured(options)}", f"{caption(options)}\n\n" + "\n".join(lines))


def measured(options: argparse.Namespace) -> str:
    return f"{options.arch} {options.device} {options.dtype}"


def training_memory(options: argparse.Namespace) -> str:
    """Bytes that autograd keeps for gradients to the weights of the parts, beyond those of the static blocks."""
    from launchers.bench.memory import saved

    lines = ["| images | factored, MiB | a matrix per sample, MiB |", "|---:|---:|---:|"]
    for batch in (options.batch, 2 * options.batch):
        bench = Bench(options.arch, batch, options.device, options.dtype)
        own, static = bench.duet(DEFAULT), bench.install({})
        tokens = static.embed(bench.images).detach().requires_grad_()

        def kept(model: "RoutedTower", tokens: "Tensor" = tokens, w: "Tensor" = bench.w) -> float:
            return saved(lambda: model.run(tokens, w.clone().requires_grad_())[0].sum(), model.buffers()) / MIB

        found = [kept(bench.install(own).use(kernel)) - kept(static) for kernel in ("factored", "materialised")]
        lines.append(f"| {batch} | {found[0]:.1f} | {found[1]:.1f} |")
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
