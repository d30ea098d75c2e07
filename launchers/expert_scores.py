"""What the experts score on a split of their own tasks: the measure of a search, computed once for all cells."""

from typing import TYPE_CHECKING

import torch

from merging.cache import code, key_of
from merging.checkpoints import digest
from merging.methods import Expert
from tasks.grid import Scores
from tasks.journal import Journal
from tasks.suite import Task

if TYPE_CHECKING:
    from launchers.cells import Setup


def expert_scores(split: str, setup: "Setup", journal: Journal) -> Scores:
    """Task -> share of correct images. `journal` is that of the cell which asks."""
    grid, cache, made_by = setup.grid, setup.gates, code(("merging", "tasks"))

    def score() -> dict[str, torch.Tensor]:
        own = Journal(journal.folder, f"expert scores {made_by}")
        found = grid.score(Expert()(setup.experts), split, journal=own).accuracy
        return {"accuracy": torch.tensor([found[name] for name in grid.suite.names], dtype=torch.float64)}

    looks, engine = grid.backbone, grid.engine
    how = [looks.facts(), list(looks.mean), list(looks.std), engine.precision, *engine.identity]
    key = key_of("expert scores", made_by, setup.checkpoints, how, [_content(task, split) for task in grid.suite.tasks])
    found = score() if cache is None else cache.tensors(key, score)
    return dict(zip(grid.suite.names, found["accuracy"].tolist(), strict=True))


def _content(task: Task, split: str) -> list[str]:
    return [task.name, task.split(split).id, digest(task.head())]
