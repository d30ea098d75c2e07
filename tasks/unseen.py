"""Scores a merge on tasks whose experts were left out of it: how far it generalises (Twin-Merging, Table 5)."""

from typing import NamedTuple

from merging.merged import Merged
from tasks.grid import NOWHERE, Grid, by_task, mean_weights, silent
from tasks.journal import Journal


class Unseen(NamedTuple):
    """One split of the held-out tasks; no accuracy (None) where the true task chooses: the merge has no part for it."""

    accuracy: dict[str, float | None]
    weights: dict[str, list[float]]  # held-out task -> mean weight of each merged task's parts; empty without gates


def score_unseen(grid: Grid, merged: Merged, split: str, journal: Journal = NOWHERE) -> Unseen:
    """Score the grid's held-out tasks. Where gates look at batches of several tasks, these are among themselves."""
    tasks = grid.suite.held_out
    if merged.deltas and (merged.routing is None or merged.routing.by_task):
        return Unseen({task.name: None for task in tasks}, {})
    found = grid.outcomes(merged, tasks, split, silent, journal) if tasks else {}
    weights = {
        name: mean_weights(by_task(each.weights, merged)) for name, each in found.items() if each.weights is not None
    }
    return Unseen({name: each.accuracy for name, each in found.items()}, weights)
