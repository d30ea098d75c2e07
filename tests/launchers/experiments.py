"""Rows as if experiments had run: every cell with the configuration it would have, and made-up numbers."""

import itertools
import json
import zlib
from dataclasses import replace
from pathlib import Path

from cells import make_row, routed_row, run_id
from omegaconf import OmegaConf

import conf
from launchers.job import resolved
from launchers.sweeps.axes import composed, is_group, read, value_of

FOLDER = Path(conf.__path__[0]) / "experiment"


def rows_of(*overrides, seeds=(0, 1)):
    """A row for every cell of a command line such as "experiment=seeds", base and experts included."""
    sweep = read(overrides)
    axes = {key: values for key, values in sweep.axes.items() if key != "seed"}
    groups = {key: values for key, values in axes.items() if is_group(key)}
    knobs = [key for key in axes if key not in groups]
    found = {}
    for chosen in itertools.product(*groups.values()):
        choices = [f"{key}={value}" for key, value in zip(groups, chosen, strict=True)]
        whole = composed((*sweep.fixed, *choices))
        config = OmegaConf.masked_copy(whole, [str(name) for name in whole if name != "hydra"])
        for values in itertools.product(*map(axes.get, knobs)):
            cell = config.copy()
            for key, value in zip(knobs, values, strict=True):
                OmegaConf.update(cell, key, value_of(value))
            for seed in seeds:
                cell.seed = seed
                for row in _rows(whole.hydra.runtime.choices.method, json.loads(json.dumps(resolved(cell))), seed):
                    found[row.run_id] = row
    return [*found.values()]


def _rows(method, config, seed):
    """The cell's row and its references, as `duet` would have written them."""
    tasks = config["suite"]["tasks"]
    bare = {**config, "scale": None, "router": None}
    for label, level in (("base", 0.5), ("expert", 0.9)):
        yield _row(make_row, label, level, {**bare, "method": {"_target_": f"merging.methods.{label.title()}"}}, seed)
    noise = zlib.crc32(json.dumps(config, sort_keys=True).encode())
    routed = config["router"] is not None
    level = 0.55 + 0.1 * routed + noise % 997 / 997 * 0.2 + 0.002 * str(config["method"]).count("_target_")
    row = _row(routed_row if routed else make_row, method, level, config, seed)
    size = 10_000_000 + noise % 1_000_003 * 10 * routed
    if not routed:
        yield replace(row, stored_bytes=size, scale=config["method"].get("scale"))
        return
    told, sure = config["router"]["name"], 0.3 + noise % 991 / 991 * 0.6
    rest = (1 - sure) / (len(tasks) - 1)
    matrix = [[sure if one == other else rest for other in tasks] for one in tasks]
    right = {"matrix": matrix, "accuracy": dict.fromkeys(tasks, sure)}
    granularity = (config["router"].get("gate") or {}).get("granularity", "sample")
    held, routing = {"1.mlp": [sure] * len(tasks)}, {} if told == "oracle" else right
    yield replace(row, stored_bytes=size, router=told, granularity=granularity, routing=routing, energy=held)


def _row(make, label, level, config, seed):
    tasks = config["suite"]["tasks"]
    checkpoints = {"base": "b", **{task: f"{task}{seed}" for task in tasks}}
    row = make(label, level, tasks=list(tasks), checkpoints=checkpoints, seed=seed)
    return replace(row, config=config, run_id=run_id(config, checkpoints))
