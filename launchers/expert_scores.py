"""What the experts score on a split of their own tasks: the measure of a search, computed once for all cells."""

from collections.abc import Mapping

import torch

from merging.cache import Cache, code, key_of
from merging.checkpoints import digest
from merging.experts import Experts
from merging.methods import Expert
from tasks.grid import Grid, Scores
from tasks.journal import Journal
from tasks.suite import Task


def expert_scores(
    split: str, experts: Experts, grid: Grid, ids: Mapping[str, str], cache: Cache | None, journal: Journal
) -> Scores:
    """Task -> share of correct images. `ids` name the checkpoints, `journal` is that of the cell which asks."""
    backbone, made_by = grid.backbone, code(("merging", "tasks"))

    def score() -> dict[str, torch.Tensor]:
        found = grid.score(
            Expert()(experts), split, journal=Journal(journal.folder, f"expert scores {made_by}")
        ).accuracy
        return {"accuracy": torch.tensor([found[name] for name in grid.suite.names], dtype=torch.float64)}

    looks = [backbone.facts(), list(backbone.mean), list(backbone.std), grid.engine.precision, *grid.engine.identity]
    key = key_of("expert scores", made_by, dict(ids), looks, [_content(task, split) for task in grid.suite.tasks])
    found = score() if cache is None else cache.tensors(key, score)
    return dict(zip(grid.suite.names, found["accuracy"].tolist(), strict=True))


def _content(task: Task, split: str) -> list[str]:
    return [task.name, task.split(split).id, digest(task.head())]
