"""Made-up rows for the tests of this folder."""

from collections.abc import Mapping
from typing import Any

from launchers.rows import Row
from merging.identity import fingerprint
from tasks.score import Score

TASKS = ["scenes", "cars", "aerial", "land", "street", "signs", "digits", "textures"]


def run_id(config: Any, checkpoints: Any) -> str:
    """A name that differs where these do."""
    return fingerprint([config, checkpoints], 12)


def make_row(method: str = "ties", level: float = 0.6, tasks: list[str] = TASKS, **changes: Any) -> Row:
    """A finished row; task number i has accuracy level + i / 100."""
    seed = changes.get("seed", 0)
    config = {"suite": "mini8", "seed": seed, "method": {"_target_": f"merging.methods.{method}"}}
    config["method"].update(changes.pop("knobs", {}))
    checkpoints = changes.pop("checkpoints", {"base": "b" * 8, **{task: task for task in tasks}})
    fields: dict[str, Any] = {
        "run_id": run_id(config, checkpoints),
        "status": "ok",
        "method": method,
        "config": config,
        "suite": "mini8",
        "tasks": list(tasks),
        "accuracy": {task: level + index / 100 for index, task in enumerate(tasks)},
        "validation": None,
        "scale": None if method in ("base", "expert") else 0.3,
        "scale_source": "-" if method in ("base", "expert") else "search:val",
        "needs": "nothing",
        "router": "oracle" if method == "expert" else "none",
        "granularity": "none",
        "family": "mini8",
        "checkpoints": checkpoints,
        "splits": {task: {"name": "test", "id": f"{task}-test", "size": 500} for task in tasks},
        "seed": seed,
        "code": "1a2b3c4",
        "stored_bytes": 12_345_678,
        "macs": 10**7,
        "seconds": {"merge": 0.42, "search": 3.0, "score": 1.5},
        "created": "2025-01-01T00:00:00+00:00",
        "error": None,
    }
    fields |= changes
    if "accuracy" in fields:
        fields["scores"] = scores(fields.pop("accuracy"), fields["splits"])
    fields["unseen"] = scores(fields.get("unseen", {}), fields["splits"])
    return Row(**fields)


def scores(shares: Mapping[str, float | None], splits: Mapping[str, Mapping[str, Any]] | None = None):
    """Shares of correct images as scores of 500 images each, or as many as `splits` tell."""
    sizes = {task: split["size"] for task, split in (splits or {}).items()}
    return {task: None if share is None else Score("accuracy", share, sizes.get(task, 500), 0.01)
            for task, share in shares.items()}  # fmt: skip


def failed_row(method: str = "tsv_m", error: str = "ValueError: rank 0\n  at line 3", **changes: Any) -> Row:
    """A row of a cell that raised."""
    return make_row(method, status="error", error=error, accuracy={}, stored_bytes=0, seconds={}, **changes)


def routed_row(method: str = "duet", level: float = 0.8, sure: float = 0.9, **changes: Any) -> Row:
    """A finished row of gates that give the own task the weight `sure` and share the rest out evenly."""
    tasks = changes.setdefault("tasks", TASKS)
    rest = (1 - sure) / (len(tasks) - 1)
    told: dict[str, Any] = {
        "router": "task_id",
        "granularity": "sample",
        "needs": "inputs",
        "adaptation": "calibration",
        "params": 100_000,
        "macs": 12_600_000,
        "stored_bytes": 15_000_000,
        "seconds": {"merge": 0.75, "search": 3.0, "router": 6.08, "score": 1.5},
        "routing": {
            "matrix": [[sure if own == other else rest for other in tasks] for own in tasks],
            "accuracy": {task: sure + index / 100 for index, task in enumerate(tasks)},
        },
        "energy": {"mlp.c_fc.weight": [0.5] * len(tasks), "mlp.c_proj.weight": [0.7] * len(tasks)},
    }
    return make_row(method, level, **(told | changes))
