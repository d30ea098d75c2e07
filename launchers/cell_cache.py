"""What cells share, kept by content: trained gates, and what the experts score on a split of their own tasks."""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from merging.cache import code, key_of, modules_of
from merging.checkpoints import digest
from merging.context import Context, Opened
from merging.fit.gates import Learned
from merging.merged import Merged
from merging.methods import Expert
from tasks.evaluate import Scores
from tasks.journal import Journal
from tasks.score import Score
from tasks.task import head_id

if TYPE_CHECKING:
    from launchers.cells import Cell, Setup

FACTS = "facts"  # beside the gates: those of their training, JSON as bytes


class Fitted(NamedTuple):
    """A merge with its gates, the tasks that the collapse guard suspects, and the time of the training."""

    merged: Merged
    collapsed: list[str]
    seconds: float


def fitted(cell: "Cell", merged: Merged, journal: Journal, context: Context) -> Fitted:
    """Train the gates of a cell's merge, unless those of an equal merge, or of this cell before a kill, are there."""
    setup, router, who = cell.setup, cell.router, f"router={cell.router.name}"
    keep = partial(journal.tensors, "trained gates")
    if setup.gates is not None and isinstance(router, Learned):
        made_by = code(("merging", *modules_of(cell.method)))
        seen = context.opened.by(f"method={cell.label}")
        keep = partial(setup.gates.tensors, content(router, merged, context, cell.identity, made_by, seen))

    def fit() -> dict[str, Tensor]:
        begin, opened = time.perf_counter(), Opened()
        trained, collapsed = router.fit(merged, setup.experts, replace(context.acting(who), opened=opened))
        gates = trained.routing.gates if trained.routing is not None else None  # an oracle has none
        facts = {"collapsed": collapsed, "splits": opened.by(who), "seconds": time.perf_counter() - begin}
        text = torch.tensor([*json.dumps(facts).encode()], dtype=torch.uint8)
        return {**({} if gates is None else gates.state_dict()), FACTS: text}

    stored = keep(fit)
    facts = json.loads(bytes(stored.pop(FACTS).tolist()))
    for split in facts["splits"]:
        context.opened.note(who, split)
    return Fitted(router.restored(merged, stored), facts["collapsed"], facts["seconds"])


def content(
    router: Learned, merged: Merged, context: Context, cell: Mapping[str, Any], made_by: str, seen: Iterable[str] = ()
) -> str:
    """The cache key of gates: equal keys are equal gates. `cell` is the identity of the cell.

    `seen` are the splits that the merge was made from. Where no task-specific delta is before a gate in training, the
    shared weights alone count, whatever made them.
    """
    data = replace(context.acting(f"router={router.name}"), opened=Opened())  # naming opens nothing
    calibration = data.unlabelled(router.split)
    learned_from: Any = {name: cell[name] for name in ("method", "checkpoints", "experts")} | {
        "scale": merged.scale,
        "images": [data.unlabelled(split).ids for split in seen],
        "dtypes": sorted({str(spec.dtype) for spec in merged.specs.values()}),
    }
    if not router.sees_deltas:
        init = merged.routing.init if merged.routing is not None else None
        learned_from = [_shared(merged), sorted(merged.deltas), init]
    how = {name: cell[name] for name in ("router", "backbone", "suite", "seed", "engine")}
    images = (calibration.ids, calibration.head_ids, calibration.backbone, calibration.device.type)
    return key_of("trained gates", made_by, learned_from, how, merged.parts, *images)


def _shared(merged: Merged) -> str:
    """SHA-256 of the weights that all inputs share."""
    hashed = hashlib.sha256()
    for key in sorted(merged.specs):
        hashed.update(f"{key} {digest(merged.static(key))} ".encode())
    return hashed.hexdigest()


def expert_scores(split: str, setup: "Setup", journal: Journal) -> Scores:
    """Task -> score of its expert: the measure of a search. `journal` is that of the cell which asks."""
    grid, made_by = setup.grid, code(("merging", "tasks"))

    def score() -> str:
        pages = Journal(journal.folder, f"expert scores {made_by}")
        scored = grid.score(Expert()(setup.experts), split, journal=pages)
        return json.dumps({task: score.to_json() for task, score in scored.scores.items()})

    how = [grid.backbone.identity(), grid.engine.precision, *grid.engine.identity]
    contents = [[task.name, task.split(split).id, head_id(task)] for task in grid.suite.tasks]
    key = key_of("expert scores", made_by, setup.checkpoints, how, contents)
    stored = json.loads(score() if setup.gates is None else setup.gates.text(key, score))
    return {task: Score.from_json(stored[task]) for task in grid.suite.names}
