"""The forward of two checkouts in turns, each in a process of its own and by public calls alone."""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from launchers.bench.measure import machine
from launchers.bench.models import SIZES, TASKS

HERE = Path(__file__).parents[2]
MODELS = ("static", "duet", "twin")
MAKE = """
import sys, torch, merging
from dataclasses import replace
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from merging.methods import Duet, TaskArithmetic, Twin
from merging.methods.duet import Ranks
folder, embed_dim, tasks, image, patch, width, layers = sys.argv[1], *map(int, sys.argv[2:])
config = dict(image_size=image, patch_size=patch, width=width, layers=layers, head_width=64)
torch.manual_seed(0)
tower = _build_vision_tower(embed_dim, config, True)
base = {f"visual.{key}": value.clone() for key, value in tower.state_dict().items()}
experts = [{key: value + 0.002 * torch.randn(value.shape) for key, value in base.items()} for _ in range(tasks)]
ranks = Ranks("fraction", 160 / 768)
methods = dict(static=TaskArithmetic(), duet=Duet(static=False, ranks=ranks, engine="randomised"), twin=Twin(rank=16))
for name, method in methods.items():
    merged = merging.merge(method, base, experts)
    facts = dict(embed_dim=embed_dim, vision_cfg=config, quick_gelu=True)
    replace(merged, provenance={**merged.provenance, "backbone": facts}).save(f"{folder}/{name}.safetensors")
"""
RUN = """
import sys, time, torch, merging
folder, batch, image, tasks = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
torch.manual_seed(1)
images, w = torch.randn(batch, 3, image, image), torch.randn(batch, tasks).softmax(-1)
models = {name: merging.load(f"{folder}/{name}.safetensors") for name in ("static", "duet", "twin")}
for line in sys.stdin:
    model = models[line.strip()]
    with torch.inference_mode():
        start = time.process_time()
        output = model(images) if line.strip() == "static" else model(images, w=w)
        print(time.process_time() - start, float(output.double().square().sum()), flush=True)
"""


def compare(options: argparse.Namespace) -> str:
    """Markdown: the median over pairs of forwards of the CPU time of this checkout to that of `options.against`."""
    image, patch, width, layers, features, _ = SIZES[options.arch]
    folder = Path("outputs/.cache/bench-forward", options.arch).absolute()
    if not (folder / f"{MODELS[-1]}.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        sizes = (features, TASKS, image, patch, width, layers)
        child(options.against, MAKE, folder, *sizes).communicate()
    old, new = (child(checkout, RUN, folder, options.batch, image, TASKS) for checkout in (options.against, HERE))
    lines = ["| | older, s | this, s | median ratio | lowest | highest |", "|---" + "|---:" * 5 + "|"]
    for name in MODELS:
        for process in (old, new):
            forward(process, name)  # warms up
        seconds = [pair(old, new, name, turn % 2 == 1) for turn in range(options.pairs)]
        ratios = [ours / theirs for theirs, ours in seconds]
        medians = " | ".join(f"{statistics.median(values):.3f}" for values in (*zip(*seconds, strict=True), ratios))
        lines.append(f"| {name} | {medians} | {min(ratios):.3f} | {max(ratios):.3f} |")
    for process in (old, new):
        process.communicate()
    text = (
        f"CPU time of a forward of {options.batch} images, {options.arch} shapes, one thread: {options.pairs} pairs, "
        f"every second one begins with this checkout. {machine()}; {time.strftime('%Y-%m-%d', time.gmtime())}."
    )
    return f"{text}\n\n" + "\n".join(lines)


def child(checkout: Path, code: str, *arguments: object) -> subprocess.Popen:
    """A process that imports the packages of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout.absolute()), "OMP_NUM_THREADS": "1"}
    command, pipe = [sys.executable, "-c", code, *map(str, arguments)], subprocess.PIPE
    return subprocess.Popen(command, cwd=checkout, env=environment, text=True, stdin=pipe, stdout=pipe)


def forward(process: subprocess.Popen, name: str) -> tuple[float, float]:
    """CPU seconds of one forward, and the squared norm of its output. Raises RuntimeError where the process ended."""
    assert process.stdin is not None and process.stdout is not None
    print(name, file=process.stdin, flush=True)
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the forward of {name} ended with exit status {process.wait()}")
    seconds, norm = map(float, line.split())
    return seconds, norm


def pair(old: subprocess.Popen, new: subprocess.Popen, name: str, new_first: bool) -> tuple[float, float]:
    """Seconds of both. Raises RuntimeError where they compute different features."""
    first = forward(new, name) if new_first else forward(old, name)
    second = forward(old, name) if new_first else forward(new, name)
    if abs(first[1] - second[1]) > 1e-4 * abs(first[1]):
        raise RuntimeError(f"{name}: the checkouts compute different features, squared norms {first[1]}, {second[1]}")
    return (second[0], first[0]) if new_first else (first[0], second[0])
