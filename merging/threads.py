"""Work on all cores for tensors that are too small, or operations too serial, for torch's own threads."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def each(function: Callable[..., Result], *items: Iterable) -> list[Result]:
    """`function` of every item, in order: one worker per torch thread, each of which runs torch on a single thread.

    Forking and joining inside every small operation costs more than it gains, and far more on a busy machine.
    """
    if torch.get_num_threads() == 1:  # also inside a worker
        return list(map(function, *items))
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(function, *items))
