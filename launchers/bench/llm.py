"""Merging a language model against the floor of the hardware: `python -m launchers.bench llm`.

A base and four experts in folders are merged to a folder, every method in a fresh process, in which `job` runs.
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import yaml

from launchers.bench import MODELS
from launchers.bench.measure import MIB, Process, called, measured, report, timed
from launchers.bench.merge import floor
from merging import Cache, Experts, methods
from merging.api import merge
from merging.checkpoints import Spec
from merging.checkpoints.opening import open_file
from merging.checkpoints.safetensors_file import write_safetensors
from merging.files import check_room
from merging.ops import generator
from merging.threads import in_order

EXPERTS = 4
BLOCKS = 2  # that TSV-M merges
SHARD = 1 << 30  # bytes of a file at most
MERGEKIT = {  # the same methods at the same options
    "TaskArithmetic": ("task_arithmetic", {}), "Ties": ("ties", {"density": 0.2}),
    "Dare": ("dare_linear", {"density": 0.5}),
}  # fmt: skip


def main(options: argparse.Namespace) -> None:
    folder = Path(options.folder).resolve()
    count = counted(options.model)
    check_room(folder, (EXPERTS + 2) * 2 * count)
    try:
        rows = dict(rows_of(options, folder))
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    lines = [(title, f"{cost.wall:.2f}", f"{cost.output:.2f}", f"{cost.output / rows['floor'].output:.2f}",
              f"{cost.cpu:.2f}", f"{cost.peak / MIB:.0f}") for title, cost in rows.items()]  # fmt: skip
    facts = {"billions": f"{count / 1e9:.2f}", "blocks": BLOCKS, "layers": MODELS[options.model]["num_hidden_layers"]}
    report(options, "llm", lines, experts=EXPERTS, threads=torch.get_num_threads(), **facts)
    report(options, "foreseen", foreseen(rows, count), experts=EXPERTS)


def counted(model: str) -> int:
    """The number of parameters, told by a process of its own: the memory of this one is where all others begin."""
    return int(called(model, "launchers.bench.llm:parameters", model).output)


def parameters(model: str) -> int:
    return sum(spec.shape.numel() for spec in specs_of(model).values())


def rows_of(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Process]]:
    """(title, the fastest of `repeat` processes): the floor, the ids, then every method, ours and mergekit's."""
    for part in parts(folder):
        if not (part / "config.json").exists():  # written last
            called(f"{part.name} of the inputs", "launchers.bench.llm:write", folder, part.name, options.model)
    jobs = {"floor": "floor", "content ids, once per file": "ids", **{name: name for name in options.methods}}
    for title, name in jobs.items():
        yield title, min(called(title, "launchers.bench.llm:job", name, folder) for _ in range(options.repeat))
        if name in MERGEKIT and shutil.which(options.mergekit):
            recipe = folder / f"{name}.yaml"
            recipe.write_text(yaml.safe_dump(mergekit(name, folder)))
            command = [options.mergekit, str(recipe), str(folder / "merged"), "--quiet"]
            cost = min(measured(f"mergekit: {name}", command) for _ in range(options.repeat))
            yield f"mergekit: {name}", cost._replace(output=cost.wall)
        shutil.rmtree(folder / "merged", ignore_errors=True)


def foreseen(rows: Mapping[str, Process], count: int) -> Iterator[list[str]]:
    """What larger models read, write and take if nothing but their size changes.

    Memory does not change: it is that of blocks of a model whose changes are not kept, which that of the table is too.
    """
    peak = max((rows[name].peak for name in MERGEKIT if name in rows), default=math.nan)
    for model in ("llama_7b", "llama_72b"):
        billions = counted(model) / 1e9
        times = (rows[name].output if name in rows else math.nan for name in ("floor", "TaskArithmetic", "Ties"))
        seconds = [time * 1e9 * billions / count for time in times]
        read, written = 2 * (1 + EXPERTS) * billions, 2 * billions
        yield [model, f"{billions:.1f}", f"{read:.0f}", f"{written:.0f}", f"{read + written:.0f}", f"{peak / MIB:.0f}",
               *(f"{value:.0f}" for value in seconds)]  # fmt: skip


def job(name: str, folder: str) -> float:
    """Runs in the measured process: a merge, "floor" or "ids". Returns seconds, imports left out."""
    base, *experts = parts(Path(folder))
    cache, target = Cache(Path(folder) / "cache"), Path(folder) / "merged"
    if name == "ids":
        seconds, _ = timed(lambda: [open_file(path, cache).id for path in (base, *experts)])
    elif name == "floor":
        models = [open_file(path) for path in (base, *experts)]
        seconds, _ = timed(lambda: write_safetensors(target / "model.safetensors", *floor(models), {}))
    elif name == "TsvM":
        seconds = decomposed(Experts.open(base, experts))
    else:
        method = getattr(methods, name)()
        seconds, _ = timed(lambda: merge(method, base, experts, cache=cache).save(f"{target}/", shard_gb=SHARD / 1e9))
    return seconds


def decomposed(experts: Experts) -> float:
    """Seconds of TSV-M on all blocks, from those of the first ones."""
    depths = {key: experts.param(key).depth for key in experts.specs()}
    first = [key for key, depth in depths.items() if depth is not None and depth < BLOCKS]
    seconds, _ = timed(lambda: methods.TsvM()(experts.part(first)))
    return seconds * len({*depths.values()} - {None}) / BLOCKS


def mergekit(name: str, folder: Path) -> dict[str, object]:
    """The recipe of a method for mergekit."""
    base, *experts = map(str, parts(folder))
    method, knobs = MERGEKIT[name]
    models = [{"model": expert, "parameters": {"weight": 0.3, **knobs}} for expert in experts]
    return {"merge_method": method, "base_model": base, "models": models, "dtype": "bfloat16",
            "parameters": {"normalize": False}}  # fmt: skip


def parts(folder: Path) -> list[Path]:
    """The folder of the base, then those of the experts."""
    return [folder / "base", *(folder / f"expert{task}" for task in range(EXPERTS))]


def specs_of(model: str) -> dict[str, Spec]:
    """Names and shapes of a Llama's parameters, in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        state = LlamaForCausalLM(LlamaConfig(**MODELS[model])).state_dict()
    return {key: Spec(tensor.shape, torch.bfloat16) for key, tensor in state.items()}


def write(folder: str, name: str, model: str) -> None:
    """One part of the inputs, seeded: a base of N(0, 0.02), or an expert that differs from it by N(0, 0.002)."""
    from transformers import LlamaConfig

    part, specs = Path(folder) / name, specs_of(model)
    base = None if name == "base" else open_file(Path(folder) / "base")

    def tensor(key: str) -> tuple[str, torch.Tensor]:
        noise = torch.randn(specs[key].shape, generator=generator("bench", name, key))
        weight = noise.mul_(0.02) if base is None else noise.mul_(0.002).add_(base.tensor(key))
        if base is not None:
            base.release()
        return key, weight.bfloat16()

    tensors, shards, size = in_order(tensor, specs), list[dict[str, Spec]](), SHARD
    for key, spec in specs.items():
        shards, size = (shards, size) if size + spec.bytes <= SHARD and shards else ([*shards, {}], 0)
        shards[-1][key] = spec
        size += spec.bytes
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for shard, file in zip(shards, names, strict=True):
        write_safetensors(part / file, shard, (next(tensors) for _ in shard), {"format": "pt"})
    index = {key: file for shard, file in zip(shards, names, strict=True) for key in shard}
    (part / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = LlamaConfig(**MODELS[model], architectures=["LlamaForCausalLM"], dtype="bfloat16")
    (part / "config.json").write_text(json.dumps(config.to_dict()))
