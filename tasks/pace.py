"""How long a search would take."""

import time

import torch

from merging.merged import Merged
from tasks.evaluate import Grid, answer, reader
from tasks.split import count_of


def seconds(grid: Grid, merged: Merged, split: str) -> float:
    """About how long one more coefficient takes on a split, from a batch of the first task.

    On a CPU in its own time, so that other processes play no role.
    """
    remade = 0.0
    if merged.remade is not None and merged.scale is not None:
        begin = time.process_time()
        merged.remade(merged.scale)
        remade = (time.process_time() - begin) / torch.get_num_threads()
    with grid.pool(1) as pool:
        sample = pool.submit(_sample, grid, split).result()
    return remade + sample * sum(len(task.split(split)) for task in grid.suite.tasks) / grid.engine.workers


def _sample(grid: Grid, split: str) -> float:
    batch = next(grid.engine.stream(grid.suite.tasks[0].split(split).inputs), None)
    if batch is None:
        return 0.0
    with grid.module() as module:
        inputs = grid.backbone.prepare(batch)
        read = reader(grid.backbone, grid.suite.tasks[0])
        answer(module, inputs, read=read, engine=grid.engine)  # the first time is slower
        begin = grid.engine.clock()
        answer(module, inputs, read=read, engine=grid.engine)
        return (grid.engine.clock() - begin) / count_of(batch)
