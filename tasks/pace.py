"""How long a search would take."""

import time

import torch

from merging.merged import Merged
from tasks.grid import Grid, answer


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
        image = pool.submit(_image, grid, split).result()
    return remade + image * sum(len(task.split(split)) for task in grid.suite.tasks) / grid.engine.workers


def _image(grid: Grid, split: str) -> float:
    images = next(grid.engine.stream(grid.suite.tasks[0].split(split).images), None)
    if images is None:
        return 0.0
    with grid.tower() as tower:
        images = grid.backbone.prepare(images)
        answer(tower, images, engine=grid.engine)  # the first time is slower
        begin = grid.engine.clock()
        answer(tower, images, engine=grid.engine)
        return (grid.engine.clock() - begin) / len(images)
