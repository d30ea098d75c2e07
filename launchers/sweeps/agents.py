"""An experiment as a W&B sweep: the server hands out the cells, any number of agents run them with `duet`."""

import re
from collections.abc import Sequence
from typing import Any

import yaml
from hydra.errors import HydraException

from launchers.sweeps.axes import Sweep, composed, parsed, value_of
from launchers.sweeps.check import check
from launchers.tracking import wandb_tracker
from merging.errors import UserError

METHODS = ("grid", "random", "bayes")
NAME = r"[A-Za-z_][A-Za-z0-9_.-]*"  # of a parameter, by W&B's own schema
GOAL = {"name": "accuracy/norm", "goal": "maximize"}  # as the tracker logs it


def tracked(overrides: Sequence[str]) -> list[str]:
    """The overrides with the live tracker and its group, unless they say otherwise."""
    fixed = _fixed(overrides)
    if fixed.get("tracker", "wandb") != "wandb":
        raise UserError("The runs of a W&B sweep need the W&B tracker: leave tracker=... out, or set tracker=wandb.")
    defaults = {"tracker": "wandb", "tracker.group": fixed.get("experiment", "sweep")}
    return [*overrides, *(f"{key}={value}" for key, value in defaults.items() if key not in fixed)]


def definition(sweep: Sweep, method: str = "grid") -> dict[str, Any]:
    """The sweep as W&B's schema has it. Raises UserError where it cannot be one: see `check`, and scalars only."""
    check(sweep)
    if method == "grid" and sweep.intervals:
        raise UserError(
            f"A grid has no intervals, but {', '.join(sorted(sweep.intervals))} is one. Give --method random."
        )
    if not sweep.axes:
        raise UserError("There is nothing to sweep. Name an experiment with axes, or give one: method=ties,tsv_m.")
    if odd := [key for key in sweep.axes if not re.fullmatch(NAME, key)]:
        raise UserError(
            f"W&B cannot sweep {', '.join(odd)}: it takes names of letters, digits, dots, - and _. Choose one with "
            f"{odd[0]}=... and sweep the rest, or sweep it with duet -m."
        )
    tracker = composed(sweep.fixed).tracker
    return {
        "name": _fixed(sweep.fixed).get("experiment", "sweep"),
        **{name: tracker[name] for name in ("project", "entity") if tracker[name] is not None},
        "method": method,
        "metric": dict(GOAL),
        "program": "duet",
        "command": ["${env}", "${program}", "hydra.mode=RUN", *sweep.fixed, "${args_no_hyphens}"],  # of one job
        "parameters": {key: _parameter(sweep, key) for key in sweep.axes},
    }


def text(sweep: Sweep, defined: dict[str, Any]) -> str:
    """The definition as YAML, with the command that wrote it."""
    head = f"# Written by python -m launchers.sweeps wandb {' '.join(sweep.fixed)}; register it with wandb sweep."
    return f"{head}\n{yaml.safe_dump(defined, sort_keys=False, width=120)}"


def register(defined: dict[str, Any]) -> str:
    """Make the sweep known to the server; its path for `wandb agent`. Raises UserError where that fails."""
    wandb, project = wandb_tracker.client(), defined["project"]
    try:
        return f"{project}/{wandb.sweep(defined, entity=defined.get('entity'), project=project)}"
    except Exception as error:  # the client raises what its transport raises
        raise UserError(
            f"{wandb_tracker.server()} did not take the sweep: {type(error).__name__}: {error}. Log in with `wandb "
            "login`, see that tracker.project and tracker.entity are yours, or register the file later: "
            "wandb sweep FILE."
        ) from error


def _fixed(overrides: Sequence[str]) -> dict[str, str]:
    return {override.get_key_element(): override.get_value_element_as_str()
            for override in parsed(overrides) if not override.is_sweep_override()}  # fmt: skip


def _parameter(sweep: Sweep, key: str) -> dict[str, Any]:
    values = sweep.axes[key]
    if key in sweep.intervals:
        return dict(zip(("min", "max"), map(value_of, values), strict=True))
    return {"values": [_scalar(key, value) for value in values]}


def _scalar(key: str, text: str) -> str | int | float | bool:
    """A value that comes back the same when W&B writes `key=value`. Raises UserError for lists, mappings and commas."""
    value = value_of(text)
    sent = "null" if value is None else value
    try:
        (back,) = parsed([f"{key}={sent}"])
        survives = not back.is_sweep_override() and back.value() == value
    except HydraException:
        survives = False
    if isinstance(sent, (str, int, float)) and survives:
        return sent
    raise UserError(
        f"W&B cannot sweep {key}={text}: its command line carries numbers, booleans and plain names only. Name the "
        f"choices in the experiment file and sweep their names, as conf/experiment/task_count.yaml does."
    )
