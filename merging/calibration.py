"""What may be learned without labels: samples whose task is known, and what they say about an expert."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from merging.checkpoints import Checkpoint
from merging.checkpoints.tied import filled
from merging.identity import fingerprint
from merging.ops import generator
from merging.threads import each

BATCH, CPU = 64, torch.device("cpu")


@dataclass(frozen=True)
class Calibration:
    """Unlabelled inputs of every task, in the order of the experts, and the frozen heads that score them."""

    split: str
    ids: tuple[str, ...]  # content of the samples of each task
    sizes: tuple[int, ...]
    inputs: Callable[[int, Tensor], Tensor]  # (task, indices) -> what the model takes: images [n, 3, H, W], ...
    heads: tuple[Callable[[Tensor], Tensor] | None, ...]  # features [n, D] -> logits [n, C], frozen, on the device
    tower: Callable[[], nn.Module]  # an empty backbone, in main memory
    backbone: Mapping[str, object]  # its identity, as JSON: what it is and how its inputs are prepared
    device: torch.device = CPU  # where inputs and heads lie, and towers are to run
    head_ids: tuple[str, ...] = ()  # content of the heads
    read: Callable[[nn.Module, Any], Tensor] = lambda module, inputs: module(inputs)  # what heads read, [n, D]
    precision: str = "fp32"  # or bf16, autocast, of forwards that learn; statistics are in fp32

    def running(self) -> AbstractContextManager[object]:
        """What a forward is run in."""
        return nullcontext() if self.precision == "fp32" else torch.autocast(self.device.type, torch.bfloat16)

    def features(self, module: nn.Module, inputs: Any) -> Tensor:
        """What heads read, fp32 [n, D]."""
        with self.running():
            return self.read(module, inputs).float()

    def outputs(self, task: int, features: Tensor) -> Tensor:
        """What the task's frozen head makes of features [n, D]; themselves where it has none."""
        head = self.heads[task]
        return features if head is None else head(features)

    def model(self, checkpoint: Checkpoint) -> nn.Module:
        """The backbone with a checkpoint's weights, on the device."""
        module = self.tower()
        stored = (key for key in module.state_dict() if key in checkpoint.specs())  # files hold a tied weight once
        module.load_state_dict(filled({key: checkpoint.tensor(key).float() for key in stored}, module))
        return module.to(self.device)

    def batches(self, task: int, count: int | None = None, batch: int = BATCH) -> Iterator[Tensor]:
        """The first `count` samples of a task (default: all) in order."""
        size = min(self.sizes[task], self.sizes[task] if count is None else count)
        for indices in torch.arange(size).split(batch):
            yield self.inputs(task, indices)

    def part(self, rows: Mapping[int, Tensor]) -> "Calibration":
        """These tasks alone, by their numbers, and of each the samples in these rows."""
        tasks, inputs = list(rows), self.inputs
        return replace(
            self,
            ids=tuple(f"{self.ids[task]} {fingerprint(some, 16)}" for task, some in rows.items()),
            sizes=tuple(map(len, rows.values())),
            inputs=lambda task, some: inputs(tasks[task], rows[tasks[task]][some]),
            heads=tuple(self.heads[task] for task in tasks),
            head_ids=tuple(self.head_ids[task] for task in tasks if self.head_ids),
        )

    def every(self, batch: int = BATCH) -> list[tuple[int, Tensor]]:
        """What `inputs` takes to give all samples of all tasks, in order."""
        return [(task, some) for task, size in enumerate(self.sizes) for some in torch.arange(size).split(batch)]

    def drawn(self, task: int, batch: int, *seed: object) -> Iterator[Tensor]:
        """Endless random batches of indices, every sample once per round; the place of a task decides its own."""
        rng, left = generator("calibration", *seed, task), torch.empty(0, dtype=torch.int64)
        while True:
            while len(left) < batch:
                left = torch.cat([left, torch.randperm(self.sizes[task], generator=rng)])
            yield left[:batch]
            left = left[batch:]


@torch.inference_mode()
def expert_features(checkpoints: Sequence[Checkpoint], calibration: Calibration) -> list[Tensor]:
    """What heads read of every expert on the inputs of its own task, [n, D] each."""

    def one(task: int) -> Tensor:
        module = calibration.model(checkpoints[task])
        return torch.cat([calibration.features(module, inputs) for inputs in calibration.batches(task)])

    return [features.clone() for features in each(one, range(len(checkpoints)))]
