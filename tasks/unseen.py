"""Scores a merge on tasks whose experts were left out of it: how far it generalises (Twin-Merging, Table 5)."""

from typing import NamedTuple

from merging.merged import Merged
from tasks.evaluate import Grid, mean_weights, per_task, silent
from tasks.journal import NOWHERE, Journal
from tasks.score import Score


class Unseen(NamedTuple):
    """One split of the held-out tasks; no score (None) where the true task chooses: the merge has no expert for it."""

    scores: dict[str, Score | None]
    weights: dict[str, list[float]]  # held-out task -> mean weight of each merged task's experts; empty without gates


def score_unseen(grid: Grid, merged: Merged, split: str, journal: Journal = NOWHERE) -> Unseen:
    """Score the grid's held-out tasks. Where gates look at batches of several tasks, these are among themselves."""
    tasks = grid.suite.held_out
    if merged.deltas and (merged.routing is None or merged.routing.by_task):
        return Unseen({task.name: None for task in tasks}, {})
    outcomes = grid.outcomes(merged, tasks, split, silent, journal) if tasks else {}
    weights = {
        name: mean_weights(per_task(outcome.weights, merged))
        for name, outcome in outcomes.items()
        if outcome.weights is not None
    }
    return Unseen({name: outcome.score for name, outcome in outcomes.items()}, weights)
