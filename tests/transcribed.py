"""Compares methods without data with independent transcriptions of their published code, on mini8's experts.

    python tests/transcribed.py              # all, or those named: python tests/transcribed.py ties wudi

Per method of conf/ at its own options, seed 0: how far the merged change is from the transcription's, relative to its
length, and what both score on the validation split, mean in percent. A method with parts of its own per task is
compared task by task, the true task given.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from torch import Tensor

from merging import Cache, Experts, Merged
from merging.deltas import Dense
from merging.merged import Routing
from merging.methods.method import call
from tasks.evaluate import Grid

sys.path.insert(0, str(Path(__file__).parent / "merging"))
import published
import published_entries as entries
import published_matrix as matrix
import published_spheres as spheres
import published_switch as switch
from test_interference import RANKS
from test_lines import lines
from test_wudi import published as least_interference

Taus = Mapping[str, Tensor]  # [T, *shape] in fp64


def linear(taus: Taus) -> Taus:
    """The matrices of attention and FFNs."""
    return {key: tau for key, tau in taus.items() if tau.ndim == 3 and (".mlp." in key or ".attn." in key)}


def wudi(taus: Taus) -> Taus:
    """In fp32, as the authors: Adam at 1e-5 moves by what rounding decides where a gradient vanishes."""
    return {key: least_interference(tau.float(), 300, 1e-5).double() for key, tau in linear(taus).items()}


def opcm(taus: Taus, order: list[int]) -> Taus:
    """Matrices of attention and FFNs are projected, all else is added up."""
    flat = {key: tau if key in linear(taus) else tau.flatten(1) for key, tau in taus.items()}
    changes = matrix.opcm(flat, order, 0.5, False)
    return {key: change.reshape(taus[key].shape[1:]) for key, change in changes.items()}


def breadcrumbs(taus: Taus) -> Taus:
    """Before Task Arithmetic at its 0.3."""
    kept = {key: torch.stack([entries.breadcrumbs(t, 0.15, 0.006) for t in tau]) for key, tau in taus.items()}
    return published.task_arithmetic(kept, 0.3)


def sphere(whole: Callable[[Tensor, list[Tensor]], Tensor]) -> Callable[[Taus, Taus], Taus]:
    """A method of flat vectors (base, experts) -> model, as changes of the base."""

    def changes(taus: Taus, base: Taus) -> Taus:
        made = {}
        for key, tau in taus.items():
            w = base[key].flatten()
            made[key] = (whole(w, [w + t.flatten() for t in tau]) - w).view(tau.shape[1:])
        return made

    return changes


def beyond(vectors: Callable[[list[Tensor]], Tensor]) -> Callable[[Taus, Taus], Taus]:
    """As `sphere`, around the base."""
    return sphere(lambda base, experts: base + vectors([expert - base for expert in experts]))


def triplets(taus: Taus) -> Taus:
    """TSV-Compress: of every matrix and task the leading min(m, n) // T singular triplets, of all else the change."""
    changes = {}
    for key, tau in taus.items():
        changes[key] = tau.clone()
        for task, t in enumerate(tau if tau.ndim == 3 else ()):
            u, s, v = torch.linalg.svd(t, full_matrices=False)
            k = len(s) // len(tau)
            changes[key][task] = u[:, :k] @ torch.diag(s[:k]) @ v[:k]
    return changes


TRANSCRIBED: dict[str, Callable[[Taus, Taus], Taus]] = {
    "average": lambda taus, _: published.average(taus),
    "task_arithmetic": lambda taus, _: published.task_arithmetic(taus, 0.3),
    "ties": lambda taus, _: published.ties(taus, 0.2, "sum", 0.3),
    "consensus": lambda taus, _: entries.consensus(taus, published.task_arithmetic(taus, 1), 0.4, 2, 0.3),
    "consensus_ties": lambda taus, _: entries.consensus(taus, published.ties(taus, 0.2, "sum", 1), 0.4, 2, 0.3),
    "mag_max": lambda taus, _: entries.mag_max(taus, 0.5),
    "pcb": lambda taus, _: entries.pcb(taus, 0.05, 0.01, "normalised", 1.2),
    "sce": lambda taus, _: entries.sce(taus, 1.0),
    "ram": lambda taus, _: entries.ram(taus, 1e-5, 1.0),
    "ram_plus": lambda taus, _: entries.ram(taus, 1e-5, 1.2),
    "breadcrumbs": lambda taus, _: breadcrumbs(taus),
    "lines": lambda taus, _: lines(taus, published.task_arithmetic(taus, 1), 0.5, blocks=BLOCKS),
    "karcher": sphere(lambda _, experts: spheres.karcher(experts, 10)),
    "multi_slerp": beyond(spheres.multi_slerp),
    "model_stock": sphere(spheres.model_stock),
    "localize_and_stitch": lambda taus, _: switch.localize_and_stitch(taus, 0.1),
    "tsv_m": lambda taus, _: published.tsv_m(taus, 1.0),
    "iso_c": lambda taus, _: published.iso_c(taus, 1.0),
    "iso_cts": lambda taus, _: published.iso_cts(taus, 0.8, 1.0),
    "wudi": lambda taus, _: wudi(taus),
    "swudi": lambda taus, _: matrix.swudi(taus, lambda value, largest: 1 - math.exp(-1300 * value), 0.65),
    "aswudi": lambda taus, _: matrix.aswudi(taus, RANKS["sqrt_participation"]),
    "opt_merge": lambda taus, _: matrix.opt_merge(taus, "full", 300, 1e-5, "task_vector"),
    "doge": lambda taus, _: matrix.doge(linear(taus), 0.07, 6, 0.3, 400, 1e-4),
    "dc_merge": lambda taus, _: matrix.dc_merge(taus, 0.001, "none", 5.0, None),
    "opcm": lambda taus, _: opcm(taus, list(range(len(next(iter(taus.values())))))),
    "emr": lambda taus, _: published.emr(taus),
    "tall_mask": lambda taus, _: published.tall_masks(taus, 0.4),
    "t_switch": lambda taus, _: switch.t_switch(taus, 0.6),
    "tsv_compress": lambda taus, _: triplets(taus),
}
BLOCKS = 5  # of mini_clip
MORE = {
    "opcm": lambda tasks: [f"method.order=[{','.join(tasks)}]"]
}  # what a transcription must know of a random choice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", choices=[*TRANSCRIBED, []], help="those to compare (all)")
    names = parser.parse_args().methods or list(TRANSCRIBED)
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", ["suite=mini8"])
        suite, backbone = instantiate(config.suite), instantiate(config.backbone, _convert_="all")
        experts = instantiate(config.experts).open(suite, backbone, Cache(Path("outputs/.cache")))
        grid = Grid(suite, backbone, instantiate(config.engine))
        print(f"{'method':20} {'distance':>8} {'ours':>6} {'transcribed':>12}   mean of {', '.join(suite.names)}")
        for name in names:
            more = MORE[name](suite.names) if name in MORE else []
            method = instantiate(compose("config", [f"method={name}", *more]).method, _convert_="all")
            distance, ours, theirs = compared(method, TRANSCRIBED[name], experts, grid)
            print(f"{name:20} {distance:8.0e} {ours:6.2f} {theirs:12.2f}", flush=True)


@torch.inference_mode()
def compared(method: Any, transcribed: Callable, experts: Experts, grid: Grid) -> tuple[float, float, float]:
    """Relative distance of the changes, and both scores."""
    merged = call(method, experts)
    keys = experts.keys()
    base = {key: experts.base(key).double() for key in keys}
    taus = {key: experts.tau(key).double() for key in keys}
    with torch.inference_mode(False):
        changes = transcribed({key: tau.clone() for key, tau in taus.items()}, base)
    whole = {key: changes.get(key, torch.zeros_like(base[key])) for key in keys}
    gates = [merged.one_hot(task) for task in range(len(experts.tasks))] if merged.deltas else [None]
    apart = length = 0.0
    for task, gate in enumerate(gates):
        state = dict(merged.state(gate))
        for key in keys:
            change = whole[key][task] if merged.deltas else whole[key]
            apart += float((state[key].double() - base[key] - change).square().sum())
            length += float(change.square().sum())
    return math.sqrt(apart / length), scored(merged, grid), scored(model_of(whole, merged, experts), grid)


def model_of(changes: Taus, merged: Merged, experts: Experts) -> Merged:
    """A merge of these changes, [T, *shape] each where `merged` has parts of its own per task."""
    changes = {key: change.float() for key, change in changes.items()}
    if not merged.deltas:
        return experts.merged(changes)
    return experts.merged({}, deltas={key: Dense(change) for key, change in changes.items()}, routing=Routing("oracle"))


def scored(merged: Merged, grid: Grid) -> float:
    """The mean over tasks on validation, percent."""
    values = grid.score(merged, "val").values
    return 100 * sum(values.values()) / len(values)


if __name__ == "__main__":
    main()
