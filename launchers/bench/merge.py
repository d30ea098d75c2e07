"""Merging against the floor of the hardware: `python -m launchers.bench merge`.

Eight synthetic experts are merged from files to one file, every method in a fresh process, in which `job` runs; by
default every method that needs nothing besides the weights of such experts.
"""

import argparse
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from launchers.bench import TASKS, fusion
from launchers.bench.measure import MIB, Process, called, measured, report, timed
from launchers.bench.models import Models
from merging import Cache, methods
from merging.api import merge
from merging.checkpoints import Checkpoint, SafetensorsFile, Spec
from merging.checkpoints.safetensors_file import write_safetensors
from merging.errors import UserError
from merging.methods.method import Method
from merging.ops import generator

DECOMPOSING = ("IsoC", "IsoCts", "TsvM")  # these have a cold and a warm row
STREAMING = ("TaskArithmetic", "Ties")  # these have one of files whose content ids are not known, too
VARIANTS: Mapping[str, tuple[str, Mapping[str, str]]] = {"BayesianDataFree": ("Bayesian", {"gram": "task_vectors"})}
LEFT_OUT = ("Base", "Expert", "Single")  # references
OUTPUT = "merged-by-bench.safetensors"
ADAPTERS = ("AsAdapter", "Cat", "DoMerging", "Knots")  # methods made for LoRA experts


def main(options: argparse.Namespace) -> None:
    rows = [*rows_of(options)]
    floor = rows[0][1].output
    lines = [(title, f"{cost.wall:.2f}", f"{cost.output:.2f}", f"{cost.output / floor:.2f}", f"{cost.cpu:.2f}",
              f"{cost.peak / MIB:.0f}") for title, cost in rows]  # fmt: skip
    report(options, "merge", lines, spectrum="falling as 1 / k" if options.decaying else "those of noise, flat")


def rows_of(options: argparse.Namespace) -> Iterator[tuple[str, Process]]:
    """(title, the fastest of `repeat` processes): the floor, the ids, then every method."""
    folder = Path("outputs/.cache/bench", options.arch, *["decaying"] * options.decaying).resolve()
    ids, scratch = folder / "ids", folder / "cache"

    def process(title: str, name: str, start: Path | None = None, cache: Path = scratch) -> Process:
        """`job` with a cache that begins as another one, or empty."""
        if start != cache:
            shutil.rmtree(cache, ignore_errors=True)
        if start == ids != cache:
            shutil.copytree(ids, cache)
        warm(folder)
        return called(title, "launchers.bench.merge:job", name, folder, cache, options.arch)

    def theirs(title: str, name: str) -> Process:
        warm(folder)
        output = folder / OUTPUT
        cost = measured(title, [options.fusion_bench, fusion.__file__, name, str(output), *map(str, inputs(folder))])
        output.unlink()
        return cost._replace(output=float(cost.output.splitlines()[-1]))

    process("inputs", f"inputs{', decaying' * options.decaying}")
    process("ids", "ids", start=ids, cache=ids)
    rows = [("floor: read all, write one", partial(process, name="floor"))]
    rows += [("content ids, once per file", partial(process, name="ids"))]
    for name in asked(options.methods):
        rows.append((f"{name}, cold" if name in DECOMPOSING else name, partial(process, name=name, start=ids)))
        if name in DECOMPOSING:
            rows.append((f"{name}, warm", partial(process, name=name, start=scratch)))
        if name in STREAMING:
            rows.append((f"{name}, of new files", partial(process, name=name)))
        if name in fusion.TITLES and options.fusion_bench:
            rows.append((f"FusionBench: {fusion.TITLES[name]}", partial(theirs, name=name)))
    for title, run in rows:
        yield title, min(run(title) for _ in range(options.repeat))
    shutil.rmtree(scratch, ignore_errors=True)


def warm(folder: Path) -> None:
    """Inputs into the file cache, which may have dropped some."""
    for path in filter(Path.exists, inputs(folder)):
        with path.open("rb") as file, open(os.devnull, "wb") as nowhere:
            shutil.copyfileobj(file, nowhere)


def covered() -> list[str]:
    """The methods of this benchmark, by class: all that need weights alone and merge as many whole experts."""
    names = [
        name
        for name, method in methods.discovered().items()
        if getattr(method, "needs", "") == "nothing" and TASKS in getattr(method, "takes", range(TASKS + 1))
    ]
    names = [*(set(names) - {*LEFT_OUT, *ADAPTERS}), *VARIANTS]
    return sorted(names, key=lambda name: (name not in STREAMING, name))


def asked(names: Sequence[str]) -> Sequence[str]:
    """The methods to measure, all where none is named. Raises UserError for a name that is none of them."""
    if unknown := [name for name in names if name not in covered()]:
        raise UserError(f"--methods {unknown[0]} is none of this benchmark: {', '.join(covered())}.")
    return names or covered()


def made(name: str) -> Method:
    """A method with its defaults, or those of a variant."""
    of_class, settings = VARIANTS.get(name, (name, {}))
    return getattr(methods, of_class)(**settings)


def job(name: str, folder: str, cache_folder: str, arch: str) -> float:
    """Runs in the measured process: a merge, or "inputs", "floor" or "ids". Returns seconds, imports left out."""
    cache, output = Cache(Path(cache_folder)), Path(folder) / OUTPUT
    base, *experts = inputs(Path(folder))
    runs = {
        "inputs": lambda: write_inputs(Path(folder), arch),
        "inputs, decaying": lambda: write_inputs(Path(folder), arch, decaying=True),
        "floor": lambda: write_safetensors(output, *floor([*map(SafetensorsFile, inputs(Path(folder)))]), {}),
        "ids": lambda: [SafetensorsFile(path, cache).id for path in (base, *experts)],
    }
    seconds, _ = timed(runs.get(name, lambda: merge(made(name), base, experts, cache=cache).save(output)))
    output.unlink(missing_ok=True)
    return seconds


def inputs(folder: Path) -> list[Path]:
    """The base, then the experts."""
    return [folder / "base.safetensors", *(folder / f"expert{task}.safetensors" for task in range(TASKS))]


def write_inputs(folder: Path, arch: str, decaying: bool = False) -> None:
    """A base of N(0, 0.02) and experts that differ by N(0, 0.002), seeded, in fp32; files that exist are kept.

    decaying: the singular values of how a matrix differs fall about as 1 / k, its norm as before.
    """
    specs = {key: Spec(weight.shape, torch.float32) for key, weight in Models(arch).weights.items()}

    def noise(path: Path, key: str, size: float) -> Tensor:
        shape, draw = specs[key].shape, generator("bench", path.stem, key)
        if not decaying or len(shape) != 2 or path.stem == "base":
            return size * torch.randn(shape, generator=draw)
        rank = min(shape)
        falling = 1 / torch.arange(1, rank + 1)
        left, right = torch.randn(shape[0], rank, generator=draw), torch.randn(rank, shape[1], generator=draw)
        return size / falling.norm() * (left * falling) @ right

    for path in inputs(folder):
        if path.exists():
            continue
        base, size = (None, 0.02) if path.stem == "base" else (SafetensorsFile(inputs(folder)[0]), 0.002)
        changes = ((key, noise(path, key, size)) for key in specs)
        tensors = ((key, change if base is None else base.tensor(key) + change) for key, change in changes)
        write_safetensors(path, specs, tensors, {})


def floor(models: Sequence[Checkpoint]) -> tuple[Mapping[str, Spec], Iterator[tuple[str, Tensor]]]:
    """What no merge can avoid: every input is read once and one model written, by the reader and writer of merges."""
    specs = models[0].specs()
    buffer = torch.empty(max(spec.bytes for spec in specs.values()), dtype=torch.uint8)

    def tensors():
        for key, spec in specs.items():
            for model in models:
                copy = buffer[: spec.bytes].view(spec.dtype).view(spec.shape).copy_(model.tensor(key))
                model.release()
            yield key, copy

    return specs, tensors()
