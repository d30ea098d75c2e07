"""The forward of two checkouts in turns, each in a process of its own and by public calls alone."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from launchers.bench import SIZES, TASKS
from launchers.bench.measure import report

HERE = Path(__file__).parents[2]
MODELS = ("static", "duet", "twin")
MAKE = """
import json, sys, torch, merging
from dataclasses import replace
from open_clip.model import _build_vision_tower
from merging.methods import Duet, TaskArithmetic, Twin
from merging.methods.duet import Ranks
folder, config, embed_dim, tasks = sys.argv[1], json.loads(sys.argv[2]), *map(int, sys.argv[3:])
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


def compare(options: argparse.Namespace) -> None:
    """The median over pairs of forwards of the CPU time of this checkout to that of `--against`.

    Raises RuntimeError where they compute different features.
    """
    size, against = SIZES[options.arch], Path(options.against)
    folder = Path("outputs/.cache/bench-forward", options.arch).absolute()
    if not (folder / f"{MODELS[-1]}.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        child(against, MAKE, folder, json.dumps(size["tower"]), size["features"], TASKS).communicate()
    arguments = (folder, options.batch, size["tower"]["image_size"], TASKS)
    both = [child(checkout, RUN, *arguments) for checkout in (against, HERE)]
    lines = []
    for name in MODELS:
        pairs = [pair(both, name, turn % 2 == 1) for turn in range(-1, options.pairs)][1:]  # the first warms up
        ratios = [ours / theirs for theirs, ours in pairs]
        medians = map(statistics.median, (*zip(*pairs, strict=True), ratios))
        lines.append((name, *(f"{value:.3f}" for value in (*medians, min(ratios), max(ratios)))))
    for process in both:
        process.communicate()
    report(options, "against", lines)


def child(checkout: Path, code: str, *arguments: object) -> subprocess.Popen:
    """A process that imports the packages of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout.absolute()), "OMP_NUM_THREADS": "1"}
    command, pipe = [sys.executable, "-c", code, *map(str, arguments)], subprocess.PIPE
    return subprocess.Popen(command, cwd=checkout, env=environment, text=True, stdin=pipe, stdout=pipe)


def pair(both: list[subprocess.Popen], name: str, last_first: bool) -> tuple[float, float]:
    """CPU seconds of one forward in each process."""
    order = (1, 0) if last_first else (0, 1)
    costs = {index: forward(both[index], name) for index in order}
    (theirs, norm), (ours, other) = costs[0], costs[1]
    if abs(norm - other) > 1e-4 * abs(norm):
        raise RuntimeError(f"{name}: the checkouts compute different features, squared norms {norm}, {other}")
    return theirs, ours


def forward(process: subprocess.Popen, name: str) -> tuple[float, float]:
    """CPU seconds of one forward, and the squared norm of its output. Raises RuntimeError where the process ended."""
    assert process.stdin is not None and process.stdout is not None
    print(name, file=process.stdin, flush=True)
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the forward of {name} ended with exit status {process.wait()}")
    seconds, norm = map(float, line.split())
    return seconds, norm
