"""Merging against the floor of the hardware: `python -m launchers.bench merge`.

Eight synthetic experts are merged from files to one file, every method in a fresh process. `job` runs in that process;
nothing else here imports torch.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launchers.bench.measure import MIB, Measured, machine, measure, report, table
from launchers.bench.models import SIZES, TASKS, Models

HELP = "methods, from files to one file"
METHODS = ("Average", "TaskArithmetic", "Ties", "Dare", "IsoC", "TsvM", "IsoCts")
MADE = {"made_by": "launchers.bench"}  # in the header of the inputs
DECOMPOSING = ("IsoC", "IsoCts", "TsvM")  # these have a cold and a warm row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=Path("outputs/.cache/bench"), help="where the inputs are kept")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, metavar="NAME",
                        help=", ".join(METHODS))  # fmt: skip
    parser.add_argument("--repeat", type=int, default=1, help="processes per row, the fastest counts")
    parser.add_argument("--arch", choices=SIZES, default="b32", help="shapes of the parameters")


def inputs(folder: Path) -> list[Path]:
    """The base, then the experts."""
    return [folder / "base.safetensors", *(folder / f"expert{task}.safetensors" for task in range(TASKS))]


def write_inputs(folder: Path, arch: str) -> None:
    """A base of N(0, 0.02) and experts that differ by N(0, 0.002), seeded, in fp32; files that exist are kept.

    Raises UserError rather than overwrite a file that it did not make.
    """
    import torch

    from merging.checkpoints import SafetensorsFile, Spec
    from merging.checkpoints.writing import write_safetensors
    from merging.errors import UserError
    from merging.ops import generator

    specs = {key: Spec(weight.shape, torch.float32) for key, weight in Models(arch).weights.items()}
    for path in inputs(folder):
        if path.exists():
            there = SafetensorsFile(path)
            if there.specs() == specs:
                continue
            if there.metadata != MADE:
                raise UserError(f"{path} is there and was not made by this benchmark. Choose another --folder.")
        base, size = (None, 0.02) if path.stem == "base" else (SafetensorsFile(inputs(folder)[0]), 0.002)
        noise = ((key, size * torch.randn(spec.shape, generator=generator("bench", path.stem, key)))
                 for key, spec in specs.items())  # fmt: skip
        tensors = ((key, change if base is None else base.tensor(key) + change) for key, change in noise)
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


def job(name: str, folder: str, cache_folder: str, arch: str) -> float:
    """Runs in the measured process: a merge, or "inputs", "floor" or "ids". Returns seconds, imports left out."""
    from merging import Cache, merge, methods
    from merging.checkpoints import SafetensorsFile

    cache, output = Cache(Path(cache_folder)), Path(folder) / "merged-by-bench.safetensors"
    base, *experts = inputs(Path(folder))
    start = time.perf_counter()
    if name == "inputs":
        write_inputs(Path(folder), arch)
    elif name == "floor":
        floor(Path(folder), output)
    elif name == "ids":
        _ = [SafetensorsFile(path, cache).id for path in (base, *experts)]
    else:
        merge(getattr(methods, name)(), base, experts, cache=cache).save(output)
    seconds = time.perf_counter() - start
    output.unlink(missing_ok=True)
    return seconds


def rows(options: argparse.Namespace) -> Iterator[tuple[str, Measured]]:
    """(title, the fastest of `repeat` processes): the floor, the ids, then every method."""
    folder = options.folder.resolve()
    known, scratch = folder / "ids", folder / "cache"

    def process(name: str, cache: Path = scratch) -> Measured:
        return measure("launchers.bench.merge:job", name, folder, cache, options.arch)

    def fastest(name: str, prepare: Callable[[], object]) -> Measured:
        processes = []
        for _ in range(options.repeat):
            prepare()
            for path in inputs(folder):  # into the file cache, which may have dropped some
                with path.open("rb") as file:
                    while file.read(MIB):
                        pass
            processes.append(process(name))
        return min(processes)

    def forget() -> None:
        shutil.rmtree(scratch, ignore_errors=True)

    process("inputs")
    process("ids", known)
    yield "floor: read all, write one", fastest("floor", forget)
    yield "content ids, once per file", fastest("ids", forget)
    for name in options.methods:
        cold = fastest(name, lambda: (forget(), shutil.copytree(known, scratch)))
        yield (f"{name}, cold" if name in DECOMPOSING else name), cold
        if name in DECOMPOSING:
            yield f"{name}, warm", fastest(name, lambda: None)
        else:
            yield f"{name}, of new files", fastest(name, forget)
    forget()


def main(options: argparse.Namespace) -> None:
    measured = []
    for title, row in rows(options):
        print(f"{title}: {row.wall:.2f} s, {row.cpu:.2f} CPU s, {row.peak / MIB:.0f} MiB", file=sys.stderr)
        measured.append((title, row))
    report(options, "merge", f"{caption(options)}\n\n{table(measured)}")


def caption(options: argparse.Namespace) -> str:
    """What was measured, where and how."""
    return (
        f"A base and {TASKS} experts of {options.arch} shapes (fp32 safetensors), merged from files to one file. "
        f"{machine()}; {time.strftime('%Y-%m-%d', time.gmtime())}; every row is the fastest of {options.repeat} fresh "
        "processes.\n\nSeconds are those of the whole process, Python and torch included; `merge + save` leaves out "
        "imports. Peak memory is the largest resident set, with the touched pages of mapped files. Inputs are in the "
        "file cache and their content ids (sha256) remembered from an earlier run, as in any sweep; the second row is "
        "what that costs once, alone, and `of new files` is a merge that computes them too, beside its own work. "
        "`cold` decomposes, `warm` finds the factors in the cache."
    )
