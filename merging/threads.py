"""Work on all cores for tensors that are too small, or operations too serial, for torch's own threads."""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def each(function: Callable[..., Result], *items: Iterable) -> list[Result]:
    """`function` of every item, in order: one worker per torch thread, each of which runs torch on a single thread.

    Forking and joining inside every small operation costs more than it gains, and far more on a busy machine.
    """
    with workers() as run:
        return list(run(function, *items))


def in_order(function: Callable[[Any], Result], items: Iterable) -> Iterator[Result]:
    """As `each`, one result after the other; only as many items as there are workers are begun before they are due."""
    if torch.get_num_threads() == 1:
        yield from map(function, items)
        return
    with _pool() as pool:
        due: deque[Future[Result]] = deque()
        for item in items:
            due.append(pool.submit(function, item))
            if len(due) > torch.get_num_threads():
                yield due.popleft().result()
        while due:
            yield due.popleft().result()


class Scratch(threading.local):
    """Memory that every thread uses again: fresh pages for each small piece cost more than the work on it."""

    def of(self, shape: Sequence[int], which: int = 0) -> Tensor:
        """A tensor of that shape in fp32, to be written first; the next call with the same `which` takes its memory."""
        memory, size = self.__dict__.get(str(which)), math.prod(shape)
        if memory is None or memory.numel() < size:
            memory = self.__dict__[str(which)] = torch.empty(size)
        return memory[:size].view(*shape)

    def like(self, tensor: Tensor, which: int = 0) -> Tensor:
        """A tensor of the shape of another one."""
        return self.of(tensor.shape, which)


@contextmanager
def workers() -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` on one worker per torch thread, for several calls of `each`. What fails cancels what has not begun."""
    if torch.get_num_threads() == 1:  # also inside a worker
        yield map
        return
    with _pool() as pool:
        yield pool.map


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
