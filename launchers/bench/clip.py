"""A rehearsal at full size: random ViT-B/32 weights and random images, from files to rows, by the user's own command.

`python -m launchers.bench clip` measures seconds and peak memory of every method in a process of its own.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy
import torch
from PIL import Image
from safetensors.torch import save_file

from launchers.bench import TASKS
from launchers.bench.measure import MIB, called, measured, report
from merging.ops import generator

CLASSES, SIDE = 10, 256
METHODS = ("base", "expert", "task_arithmetic", "tsv_m", "twin", "duet")


def main(options: argparse.Namespace) -> None:
    folder = Path("outputs/.cache/rehearsal").absolute()
    called("weights and images", "launchers.bench.clip:prepare", folder, options.images)
    report(options, "clip", [line(folder, method) for method in METHODS], training=2 * options.images, side=SIDE)


def line(folder: Path, method: str) -> tuple[str, ...]:
    """One method in a fresh process: what a user would type for these files, and what the row says of it."""
    sources = [f"+suite.sources.task{task}.folder={folder}/images/task{task}" for task in range(TASKS)]
    command = [
        str(Path(sys.executable).with_name("duet")), f"method={method}", "backbone=clip_vit_b32", "suite=folder",
        f"suite.text={folder}/base.safetensors", "~suite.sources.pets", *sources, "experts=folder",
        f"experts.base={folder}/base.safetensors", f'experts.experts="{folder}/{{task}}.safetensors"', "scale=fixed",
        f"output={folder}/outputs",
    ]  # fmt: skip
    process = measured(method, command)
    rows = [json.loads(path.read_text()) for path in (folder / "outputs" / "results").glob("*.json")]
    row = max((row for row in rows if row["method"] == method), key=lambda row: row["created"])
    seconds, images = row["seconds"], sum(split["size"] for split in row["splits"].values())
    phases = [f"{seconds[phase]:.1f}" if phase in seconds else "-" for phase in ("merge", "router", "score")]
    rate, peak = f"{images / seconds['score']:.1f}", f"{process.peak / MIB:.0f}"
    return f"`method={method}`", f"{process.wall:.0f}", *phases, rate, peak


def prepare(folder: str, images: str) -> None:
    """Weights and images below `folder`, kept if they are there."""
    if not (Path(folder) / f"task{TASKS - 1}.safetensors").exists():
        write_weights(Path(folder))
    for task in range(TASKS):
        write_images(Path(folder) / "images" / f"task{task}", int(images), task)


def write_weights(folder: Path) -> None:
    """A whole CLIP, and eight image towers: its own plus noise, a twentieth of each parameter's spread."""
    from open_clip import create_model

    folder.mkdir(parents=True, exist_ok=True)
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
    for part, size in (("train", 2 * count), ("test", count)):
        rng = numpy.random.default_rng([task, size])
        for index in range(size):
            path = folder / part / f"class{index % CLASSES}" / f"{index:05}.jpg"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                coarse = rng.integers(0, 256, (16, 16, 3), dtype=numpy.uint8)
                Image.fromarray(coarse).resize((SIDE, SIDE)).save(path, quality=90)
