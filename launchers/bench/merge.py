"""Merging against the floor of the hardware: `python -m launchers.bench merge`.

Eight synthetic experts are merged from files to one file, every method in a fresh process. `job` runs in that process;
nothing else here imports torch.
"""

import argparse
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from launchers.bench.measure import MIB, Measured, machine, measure, report, table

HELP = "methods, from files to one file"
EXPERTS = 8
METHODS = ("Average", "TaskArithmetic", "Ties", "Dare", "IsoC", "TsvM", "IsoCts")
MADE = {"made_by": "launchers.bench"}  # in the header of the inputs
DECOMPOSING = ("IsoC", "IsoCts", "TsvM")  # these have a cold and a warm row


class Tower(NamedTuple):
    """Sizes of a CLIP image tower; the defaults are ViT-B/32, 87,456,000 parameters."""

    width: int = 768
    depth: int = 12
    patch: int = 32
    tokens: int = 50

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameters under the names of Hugging Face transformers."""
        wide, narrow = 4 * self.width, self.width
        linear = {f"self_attn.{part}_proj": (narrow, narrow) for part in "qkv"} | {
            "self_attn.out_proj": (narrow, narrow)
        }
        linear |= {"mlp.fc1": (wide, narrow), "mlp.fc2": (narrow, wide)}
        shapes: dict[str, tuple[int, ...]] = {
            "embeddings.class_embedding": (narrow,),
            "embeddings.patch_embedding.weight": (narrow, 3, self.patch, self.patch),
            "embeddings.position_embedding.weight": (self.tokens, narrow),
        }
        for block in range(self.depth):
            for name, shape in linear.items():
                shapes |= {
                    f"encoder.layers.{block}.{name}.weight": shape,
                    f"encoder.layers.{block}.{name}.bias": shape[:1],
                }
        norms = [f"encoder.layers.{block}.layer_norm{i}" for block in range(self.depth) for i in (1, 2)]
        for norm in ("pre_layrnorm", "post_layernorm", *norms):
            shapes |= {f"{norm}.weight": (narrow,), f"{norm}.bias": (narrow,)}
        return {f"vision_model.{key}": shape for key, shape in sorted(shapes.items())}


def inputs(folder: Path) -> list[Path]:
    """The base, then the experts."""
    return [folder / "base.safetensors", *(folder / f"expert{task}.safetensors" for task in range(EXPERTS))]


def write_inputs(folder: Path, tower: Tower) -> None:
    """A base of N(0, 0.02) and experts that differ by N(0, 0.002), seeded, in fp32; files that exist are kept.

    Raises UserError rather than overwrite a file that it did not make.
    """
    import torch

    from merging.checkpoints import SafetensorsFile, Spec
    from merging.checkpoints.writing import write_safetensors
    from merging.errors import UserError
    from merging.ops import generator

    specs = {key: Spec(torch.Size(shape), torch.float32) for key, shape in tower.shapes().items()}
    normal = lambda key, who: torch.randn(specs[key].shape, generator=generator("bench", who, key))  # noqa: E731
    for path in inputs(folder):
        if path.exists():
            there = SafetensorsFile(path)
            if there.specs() == specs:
                continue
            if there.metadata != MADE:
                raise UserError(f"{path} is there and was not made by this benchmark. Choose another --folder.")
        if path.stem == "base":
            tensors = ((key, 0.02 * normal(key, "base")) for key in specs)
        else:
            base = SafetensorsFile(inputs(folder)[0])
            tensors = ((key, base.tensor(key) + 0.002 * normal(key, path.stem)) for key in specs)
        write_safetensors(path, specs, tensors, MADE)


def floor(folder: Path, output: Path) -> None:
    """What no merge can avoid: every input is read once and one model written, by the reader and writer of merges."""
    import torch

    from merging.checkpoints import SafetensorsFile
    from merging.checkpoints.writing import write_safetensors

    files = [SafetensorsFile(path) for path in inputs(folder)]
    specs = files[0].specs()
    buffer = torch.empty(max(spec.shape.numel() for spec in specs.values()))

    def tensors():
        for key, spec in specs.items():
            for file in files:
                copy = buffer[: spec.shape.numel()].view(spec.shape).copy_(file.tensor(key))
                file.release()
            yield key, copy

    write_safetensors(output, specs, tensors(), {})


def identify(folder: Path, cache_folder: Path) -> None:
    """The content ids of all inputs."""
    from merging import Cache
    from merging.checkpoints import SafetensorsFile

    for path in inputs(folder):
        _ = SafetensorsFile(path, Cache(cache_folder)).id


def job(name: str, folder: str, cache_folder: str, width: str, depth: str) -> float:
    """Runs in the measured process: a merge, or "inputs", "floor" or "ids". Returns seconds, imports left out."""
    from merging import Cache, merge, methods

    where, cache, output = Path(folder), Path(cache_folder), Path(folder) / "merged-by-bench.safetensors"
    start = time.perf_counter()
    if name == "inputs":
        write_inputs(where, Tower(int(width), int(depth)))
    elif name == "floor":
        floor(where, output)
    elif name == "ids":
        identify(where, cache)
    else:
        base, *experts = inputs(where)
        merge(getattr(methods, name)(), base, experts, cache=Cache(cache)).save(output)
    seconds = time.perf_counter() - start
    output.unlink(missing_ok=True)
    return seconds


def rows(names: Sequence[str], folder: Path, tower: Tower, repeat: int) -> Iterator[tuple[str, Measured]]:
    """(title, the fastest of `repeat` processes): the floor, the ids, then every method."""
    known, scratch = folder / "ids", folder / "cache"

    def process(name: str, cache: Path = scratch) -> Measured:
        return measure("launchers.bench.merge:job", name, folder, cache, tower.width, tower.depth)

    def fastest(name: str, prepare: Callable[[], object]) -> Measured:
        found = []
        for _ in range(repeat):
            prepare()
            for path in inputs(folder):  # into the file cache, which may have dropped some
                with path.open("rb") as file:
                    while file.read(MIB):
                        pass
            found.append(process(name))
        return min(found)

    def forget() -> None:
        shutil.rmtree(scratch, ignore_errors=True)

    process("inputs")
    process("ids", known)
    yield "floor: read all, write one", fastest("floor", forget)
    yield "content ids, once per file", fastest("ids", forget)
    for name in names:
        cold = fastest(name, lambda: (forget(), shutil.copytree(known, scratch)))
        yield (f"{name}, cold" if name in DECOMPOSING else name), cold
        if name in DECOMPOSING:
            yield f"{name}, warm", fastest(name, lambda: None)
        else:
            yield f"{name}, of new files", fastest(name, forget)
    forget()


def caption(tower: Tower, repeat: int) -> str:
    """What was measured, where and how."""
    count = sum(math.prod(shape) for shape in tower.shapes().values())
    return (
        f"A base and {EXPERTS} experts of {count:,} parameters each (fp32 safetensors, CLIP image tower of width "
        f"{tower.width} and depth {tower.depth}), merged from files to one file. {machine()}; "
        f"{time.strftime('%Y-%m-%d', time.gmtime())}; every row is the fastest of {repeat} fresh processes.\n\n"
        "Seconds are those of the whole process, Python and torch included; `merge + save` leaves imports out. Peak "
        "memory is the largest resident set, with the touched pages of mapped files. Inputs are in the file cache and "
        "their content ids (sha256) remembered from an earlier run, as in any sweep; the second row is what that costs "
        "once, alone, and `of new files` is a merge that computes them too, beside its own work. `cold` decomposes, "
        "`warm` finds the factors in the cache."
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=Path("outputs/.cache/bench"), help="where the inputs are kept")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, metavar="NAME",
                        help=", ".join(METHODS))  # fmt: skip
    parser.add_argument("--repeat", type=int, default=1, help="processes per row, the fastest counts")
    parser.add_argument("--width", type=int, default=Tower().width, help="of the tower")
    parser.add_argument("--depth", type=int, default=Tower().depth, help="blocks of the tower")


def main(options: argparse.Namespace) -> None:
    tower, measured = Tower(options.width, options.depth), []
    for title, row in rows(options.methods, options.folder.resolve(), tower, options.repeat):
        print(f"{title}: {row.wall:.2f} s, {row.cpu:.2f} CPU s, {row.peak / MIB:.0f} MiB", file=sys.stderr)
        measured.append((title, row))
    report(options, "merge", f"{caption(tower, options.repeat)}\n\n{table(measured)}")
