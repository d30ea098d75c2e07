"""What may be learned without labels: images whose task is known, and what they say about an expert."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from merging.backbones.open_clip import ImageTower
from merging.ops import generator

BATCH, CPU = 64, torch.device("cpu")


@dataclass(frozen=True)
class Calibration:
    """Unlabelled images of every task, in the order of the experts, and the frozen heads that score them."""

    split: str
    ids: tuple[str, ...]  # content of the images of each task
    sizes: tuple[int, ...]
    images: Callable[[int, Tensor], Tensor]  # (task, indices) -> normalised images [n, 3, H, W]
    heads: tuple[Tensor, ...]  # [classes, D]: logits = unit features @ head.T
    tower: Callable[[], ImageTower]  # an empty backbone, in main memory
    backbone: Mapping[str, object]  # its identity, as JSON: what it is and how its images are normalised
    device: torch.device = CPU  # where images and heads lie, and towers are to run

    def batches(self, task: int, count: int | None = None, batch: int = BATCH) -> Iterator[Tensor]:
        """The first `count` images of a task (default: all) in order."""
        size = min(self.sizes[task], self.sizes[task] if count is None else count)
        for indices in torch.arange(size).split(batch):
            yield self.images(task, indices)

    def every(self, batch: int = BATCH) -> list[tuple[int, Tensor]]:
        """What `images` takes to give all images of all tasks, in order."""
        return [(task, some) for task, size in enumerate(self.sizes) for some in torch.arange(size).split(batch)]

    def drawn(self, task: int, batch: int, *seed: object) -> Iterator[Tensor]:
        """Endless random batches of indices, every image once per round."""
        rng, left = generator("calibration", *seed, task), torch.empty(0, dtype=torch.int64)
        while True:
            while len(left) < batch:
                left = torch.cat([left, torch.randperm(self.sizes[task], generator=rng)])
            yield left[:batch]
            left = left[batch:]
