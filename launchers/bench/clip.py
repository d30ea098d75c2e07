"""A rehearsal at full size: random ViT-B/32 weights and random images, from files to rows, by the user's own command.

`python -m launchers.bench clip` measures seconds and peak memory of every method in a process of its own.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

from launchers.bench.measure import MIB, machine, measure, report, spawned

HELP = "the whole chain at ViT-B/32 size, with random weights and images"
TASKS, CLASSES, SIDE = 8, 10, 256
METHODS = ("base", "expert", "task_arithmetic", "tsv_m", "twin", "duet")


class Run(NamedTuple):
    """One `duet` process."""

    method: str
    wall: float
    peak: int  # bytes resident
    seconds: dict[str, float]  # of the phases, from the row
    rate: float  # test images per second


def prepare(folder: str, images: str) -> float:
    """Weights and images below `folder`, kept if they are there; runs in a process of its own."""
    start, where = time.perf_counter(), Path(folder)
    write_weights(where)
    for task in range(TASKS):
        write_images(where / "images" / f"task{task}", int(images), task)
    return time.perf_counter() - start


def write_weights(folder: Path) -> None:
    """A whole CLIP, and eight image towers: its own plus noise, a twentieth of each parameter's spread."""
    import torch
    from open_clip import create_model
    from safetensors.torch import save_file

    from merging.ops import generator

    folder.mkdir(parents=True, exist_ok=True)
    if (folder / f"task{TASKS - 1}.safetensors").exists():
        return
    torch.manual_seed(0)
    base = {key: value.clone() for key, value in create_model("ViT-B-32-quickgelu").state_dict().items()}
    save_file(base, folder / "base.safetensors")
    for task in range(TASKS):
        rng, tower = generator("rehearsal", task), {}
        for key, value in base.items():
            if key.startswith("visual."):
                change = 0.05 * value.std() * torch.randn(value.shape, generator=rng) if value.numel() > 1 else 0
                tower[key] = value + change
        save_file(tower, folder / f"task{task}.safetensors")


def write_images(folder: Path, count: int, task: int) -> None:
    """Class folders of JPEG files: coloured noise, `count` for test and twice as many to train on."""
    import numpy
    from PIL import Image

    for part, size in (("train", 2 * count), ("test", count)):
        rng = numpy.random.default_rng([task, size])
        for index in range(size):
            path = folder / part / f"class{index % CLASSES}" / f"{index:05}.jpg"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                coarse = rng.integers(0, 256, (16, 16, 3), dtype=numpy.uint8)
                Image.fromarray(coarse).resize((SIDE, SIDE)).save(path, quality=90)


def command(folder: Path, output: Path, method: str) -> list[str]:
    """What a user would type for these files."""
    sources = [f"+suite.sources.task{task}.folder={folder}/images/task{task}" for task in range(TASKS)]
    return [
        str(Path(sys.executable).with_name("duet")), f"method={method}", "backbone=clip_vit_b32", "suite=folder",
        f"suite.text={folder}/base.safetensors", "~suite.sources.pets", *sources, "experts=folder",
        f"experts.base={folder}/base.safetensors", f'experts.experts="{folder}/{{task}}.safetensors"', "scale=fixed",
        f"output={output}",
    ]  # fmt: skip


def run(folder: Path, method: str) -> Run:
    """One method in a fresh process."""
    output = folder / "outputs"
    process, _ = spawned(command(folder, output, method))
    rows = [json.loads(path.read_text()) for path in (output / "results").glob("*.json")]
    row = max((row for row in rows if row["method"] == method), key=lambda row: row["created"])
    images = sum(split["size"] for split in row["splits"].values())
    return Run(method, process.wall, process.peak, row["seconds"], images / row["seconds"]["score"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=Path("outputs/.cache/rehearsal"), help="for weights and images")
    parser.add_argument("--images", type=int, default=200, help="test images per task")


def main(options: argparse.Namespace) -> None:
    folder = options.folder.absolute()
    measure("launchers.bench.clip:prepare", folder, options.images)
    runs = []
    for method in METHODS:
        runs.append(run(folder, method))
        print(f"{method}: {runs[-1].wall:.0f} s, {runs[-1].peak / MIB:.0f} MiB", file=sys.stderr)
    text = f"{caption(options)}\n\n{table(runs)}"
    report(options, "clip", text)


def table(runs: list[Run]) -> str:
    """Markdown, a line per process."""
    phases = ("merge", "router", "score")
    lines = ["| | seconds | merge | router | score | images a second | peak memory, MiB |", "|---" + "|---:" * 6 + "|"]
    for run in runs:
        times = " | ".join(f"{run.seconds[phase]:.1f}" if phase in run.seconds else "-" for phase in phases)
        lines.append(f"| `method={run.method}` | {run.wall:.0f} | {times} | {run.rate:.1f} | {run.peak / MIB:.0f} |")
    return "\n".join(lines)


def caption(options: argparse.Namespace) -> str:
    """What was measured, where and how."""
    return (
        f"{TASKS} tasks of {options.images} test and {2 * options.images} training images (JPEG, {SIDE} x {SIDE}), a "
        f"random ViT-B/32 and experts near it, a fresh process per line, in this order. {machine()}; "
        f"{time.strftime('%Y-%m-%d', time.gmtime())}. The first line decodes all images and scores base and experts; "
        "later ones find both."
    )
