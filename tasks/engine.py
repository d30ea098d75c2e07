"""How samples are run through a model: device, precision, batch size, compiled or not."""

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, TypeVar

import torch
from torch import nn

from merging.errors import UserError
from merging.identity import WHERE
from merging.preflight import check_range
from tasks.split import Inputs, count_of, mapped, take

Module = TypeVar("Module", bound=nn.Module)
Item = TypeVar("Item")
Read = TypeVar("Read")
DEVICES = re.compile(r"cpu|cuda(:\d+)?")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Engine:
    """What decides the speed of scoring and training, and at most the last digits of a result.

    device: "auto" is the first GPU, or the CPU where there is none. precision: "fp32", or "bf16", autocast, which moves
    a few images across a decision boundary, or "auto", bf16 on a GPU. compile: torch.compile for models without gates
    (a routed one reports its weights while it runs, which a compiled one cannot). batch: samples at a time.
    """

    device: str = field(default="auto", metadata=WHERE)
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    compile: bool = False
    batch: int = 100

    def __post_init__(self) -> None:
        if self.precision == "auto":
            object.__setattr__(self, "precision", "bf16" if self.torch_device.type == "cuda" else "fp32")
        if self.precision not in PRECISIONS:
            known = ", ".join(["auto", *PRECISIONS])
            raise UserError(f"engine.precision={self.precision!r} is unknown. Choose one of {known}.")
        check_range("engine.batch", self.batch, 1, 10**6)
        device = self.torch_device
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UserError(
                f"engine.device={self.device} is not there: torch sees {torch.cuda.device_count()} GPUs. Set "
                f"engine.device=cpu, or check the driver and CUDA_VISIBLE_DEVICES."
            )

    @property
    def torch_device(self) -> torch.device:
        """The device. Raises UserError for one that is not supported."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if not DEVICES.fullmatch(self.device):
            raise UserError(f"engine.device={self.device!r} cannot be used. Choose auto, cpu, cuda or cuda:1.")
        return torch.device(self.device)

    @property
    def identity(self) -> tuple[int, str]:
        """What may move the last digits of a result and is in no configuration of a row."""
        return self.batch, self.torch_device.type

    @property
    def workers(self) -> int:
        """Tasks scored at once: on a CPU one per torch thread, each on a single thread."""
        return torch.get_num_threads() if self.torch_device.type == "cpu" else 1

    def clock(self) -> float:
        """Seconds that this thread has worked on the CPU, or until the GPU has done what it was given."""
        if self.torch_device.type == "cpu":
            return time.thread_time()
        torch.cuda.synchronize(self.torch_device)
        return time.perf_counter()

    def ready(self, module: Module, routed: bool = False) -> Module:
        """The module on the device, compiled if asked for."""
        module = module.to(self.torch_device)
        if self.compile and not routed:
            module.compile()
        return module

    def running(self) -> AbstractContextManager[object]:
        """Autocast where the precision asks for it."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.torch_device.type, PRECISIONS[self.precision])

    def stream(self, inputs: Inputs, start: int = 0) -> Iterator[Inputs]:
        """Batches of inputs [N, ...] from sample `start` on, on the device.

        For a GPU the next one is read into pinned memory while the last is worked on.
        """
        count = count_of(inputs)
        batches = [slice(first, min(first + self.batch, count)) for first in range(start, count, self.batch)]
        if self.torch_device.type == "cpu":
            yield from (take(inputs, some) for some in batches)
            return
        pinned = lambda some: mapped(lambda tensor: tensor.contiguous().pin_memory(), take(inputs, some))  # noqa: E731
        for batch in ahead(pinned, iter(batches)):
            yield mapped(lambda tensor: tensor.to(self.torch_device, non_blocking=True), batch)


def ahead(read: Callable[[Item], Read], items: Iterator[Item]) -> Iterator[Read]:
    """`read` of each item, in order; the next one is read by another thread while this one is used."""
    with ThreadPoolExecutor(1) as reader:
        waiting = [reader.submit(read, item) for item in islice(items, 1)]
        while waiting:
            ready = waiting.pop().result()
            waiting = [reader.submit(read, item) for item in islice(items, 1)]
            yield ready
