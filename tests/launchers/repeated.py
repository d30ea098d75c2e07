"""Rows as if a run had repeated a published number, for the tests of this folder."""

from dataclasses import replace

import yaml
from cells import make_row

from launchers.results.published import FOLDER, published

KNOWN = published()
SUITES = {name: tuple(tasks) for name, tasks in yaml.safe_load((FOLDER / "about.yaml").read_text())["suites"].items()}

SEARCH = {"criterion": "norm", "scales": [round(0.1 * step, 1) for step in range(1, 31)], "scored": 30}


def names(row):
    return f"{row.table} {row.backbone} {row.suite} {row.printed}"


def published_row(table, method, backbone="clip_vit_b32", suite="clip8", printed=None):
    (found,) = (
        row for row in KNOWN
        if (row.table, row.method, row.backbone, row.suite) == (table, method, backbone, suite)
        and printed in (None, row.printed)
    )  # fmt: skip
    return found


def measured(there, off=0.0, make=make_row, suite=None, config=None, **changes):
    """A row as if it had repeated a published one, `off` points better on every task."""
    tasks = SUITES[suite or there.suite]
    scores = {task: (there.accuracy.get(task, 80.0) + off) / 100 for task in tasks}
    told = {
        name: value for name, value in there.settings.items() if "." not in name and value not in ("search", "unknown")
    }
    source = {"search": "search:val"}.get(there.settings.get("scale"), "fixed" if "scale" in there.settings else "-")
    row = make(
        there.method,
        **{
            "tasks": list(tasks),
            "suite": suite or there.suite,
            "family": there.family,
            "accuracy": scores,
            "splits": {task: {"name": "test", "id": task, "size": there.test_images.get(task, 7)} for task in tasks},
            "scale_source": source,
            "search": SEARCH if source.startswith("search") else {},
            **told,
            **changes,
        },
    )
    parts = {"backbone.name": there.backbone, "suite.variant": there.variant, **there.settings, **(config or {})}
    return replace(row, config=with_parts(row.config, parts), run_id=f"{row.run_id}{off}{there.printed}")


def with_parts(config, parts):
    changed = {**config, "suite": {}}
    for name, value in parts.items():
        if "." in name:
            *path, last = name.split(".")
            inner = changed
            for part in path:
                inner[part] = dict(inner.get(part) or {})
                inner = inner[part]
            inner[last] = value
    return changed
