"""What may be learned without labels: images whose task is known, and what they say about an expert."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from merging.backbones.tower import ImageTower
from merging.checkpoints import Checkpoint
from merging.ops import generator
from merging.threads import each

BATCH = 64


@dataclass(frozen=True)
class Calibration:
    """Unlabelled images of every task, in the order of the experts, and the frozen heads that score them."""

    split: str
    ids: tuple[str, ...]  # content of the images of each task
    sizes: tuple[int, ...]
    images: Callable[[int, Tensor], Tensor]  # (task, indices) -> normalised images [n, 3, H, W]
    heads: tuple[Tensor, ...]  # [classes, D]: logits = unit features @ head.T
    tower: Callable[[], ImageTower]  # an empty backbone

    def batches(self, task: int, count: int | None = None, batch: int = BATCH) -> Iterator[Tensor]:
        """The first `count` images of a task (default: all) in order."""
        size = min(self.sizes[task], self.sizes[task] if count is None else count)
        for indices in torch.arange(size).split(batch):
            yield self.images(task, indices)

    def drawn(self, task: int, batch: int, *seed: object) -> Iterator[Tensor]:
        """Endless random batches of indices, every image once per round."""
        rng, left = generator("calibration", *seed, task), torch.empty(0, dtype=torch.int64)
        while True:
            while len(left) < batch:
                left = torch.cat([left, torch.randperm(self.sizes[task], generator=rng)])
            yield left[:batch]
            left = left[batch:]


def activations(
    calibration: Calibration, checkpoints: tuple[Checkpoint, ...], names: tuple[str, ...], count: int | None = None
) -> dict[str, Tensor]:
    """Mean |input| of each linear layer `names` (parameter names of their weights), [T, inputs] fp32.

    Expert t is run on the images of task t; the mean is over images and tokens. For the second layer of an FFN the
    input is the activation of its hidden neurons.
    """

    def one(task: int) -> dict[str, Tensor]:
        tower = calibration.tower()
        state = {key: checkpoints[task].tensor(key).float() for key in tower.state_dict()}
        tower.load_state_dict(state)
        return mean_magnitudes(tower, names, calibration.batches(task, count))

    found = each(one, range(len(checkpoints)))
    return {name: torch.stack([means[name] for means in found]) for name in names}


@torch.inference_mode()
def mean_magnitudes(model: nn.Module, names: tuple[str, ...], batches: Iterator[Tensor]) -> dict[str, Tensor]:
    """Mean |input| of the modules that own the weights `names`, over every axis but the last, in fp64 sums."""
    sums: dict[str, Tensor | float] = dict.fromkeys(names, 0.0)
    counts = dict.fromkeys(names, 0)

    def note(name: str, x: Tensor) -> None:
        sums[name] = sums[name] + x.abs().flatten(0, -2).sum(0, dtype=torch.float64)
        counts[name] += x.shape[:-1].numel()

    def hook(name: str) -> RemovableHandle:
        module = model.get_submodule(name.rpartition(".")[0])
        return module.register_forward_pre_hook(lambda _, inputs: note(name, inputs[0]))

    hooks = [hook(name) for name in names]
    for images in batches:
        model(images)
    for each_hook in hooks:
        each_hook.remove()
    return {name: (sums[name] / counts[name]).float() for name in names}  # type: ignore[union-attr]
