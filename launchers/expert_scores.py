"""What the experts score on a split of their own tasks: the measure of a search, computed once for all cells."""

import json
from typing import TYPE_CHECKING

from merging.cache import code, key_of
from merging.methods import Expert
from tasks.evaluate import Scores
from tasks.journal import Journal
from tasks.score import Score
from tasks.task import Task, head_id

if TYPE_CHECKING:
    from launchers.cells import Setup


def expert_scores(split: str, setup: "Setup", journal: Journal) -> Scores:
    """Task -> score. `journal` is that of the cell which asks."""
    grid, cache, made_by = setup.grid, setup.gates, code(("merging", "tasks"))

    def score() -> str:
        own = Journal(journal.folder, f"expert scores {made_by}")
        scored = grid.score(Expert()(setup.experts), split, journal=own)
        return json.dumps({task: score.to_json() for task, score in scored.scores.items()})

    how = [grid.backbone.identity(), grid.engine.precision, *grid.engine.identity]
    key = key_of("expert scores", made_by, setup.checkpoints, how, [_content(task, split) for task in grid.suite.tasks])
    stored = json.loads(score() if cache is None else cache.text(key, score))
    return {task: Score.from_json(stored[task]) for task in grid.suite.names}


def _content(task: Task, split: str) -> list[str]:
    return [task.name, task.split(split).id, head_id(task)]
