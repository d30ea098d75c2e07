"""What may be learned without labels: images whose task is known, and what they say about an expert."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from merging.backbones.open_clip import ImageTower
from merging.checkpoints import Checkpoint
from merging.ops import generator
from merging.threads import each

BATCH, CPU = 64, torch.device("cpu")
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean_abs": torch.abs,
    "mean": lambda x: x,
    "positive": lambda x: x > 0,
    "rms": torch.square,
}
TOKENS = ("all", "class")


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


def activations(
    calibration: Calibration,
    checkpoints: tuple[Checkpoint, ...],
    names: tuple[str, ...],
    count: int | None = None,
    statistic: str = "mean_abs",
    tokens: str = "all",
    side: str = "input",
) -> dict[str, Tensor]:
    """What goes into each linear layer `names` (parameter names of their weights), as statistics [T, inputs] fp32.

    Checkpoint t is run on the images of task t. For the second layer of an FFN the input is the activation of its
    hidden neurons; side="output" measures what comes out of the layers instead, [T, outputs]. statistic and tokens: see
    `linear_statistics`.
    """

    def one(task: int) -> dict[str, Tensor]:
        tower = calibration.tower()
        state = {key: checkpoints[task].tensor(key).float() for key in tower.state_dict()}
        tower.load_state_dict(state)
        images = calibration.batches(task, count)
        return linear_statistics(tower.to(calibration.device), names, images, statistic, tokens, side)

    found = each(one, range(len(checkpoints)))
    return {name: torch.stack([means[name] for means in found]) for name in names}


@torch.inference_mode()
def linear_statistics(
    model: nn.Module,
    names: tuple[str, ...],
    batches: Iterator[Tensor],
    statistic: str = "mean_abs",
    tokens: str = "all",
    side: str = "input",
) -> dict[str, Tensor]:
    """One number per input of the modules that own the weights `names`, over samples and tokens; summed in fp64.

    Tokens that an `attention_mask` among the inputs leaves out are padding and do not count.

    statistic: mean_abs, mean, positive (share above zero) or rms. tokens: all, or the first alone ("class"). side:
    "input", or "output" for one number per output.
    """
    sums: dict[str, Tensor | float] = dict.fromkeys(names, 0.0)
    counts = dict.fromkeys(names, 0)
    measure = STATISTICS[statistic]

    mask: Tensor | None = None

    def note(name: str, x: Any) -> None:
        if tokens == "class":
            rows = x[:, 0]
        else:
            rows = x.flatten(0, -2) if mask is None or mask.shape != x.shape[:-1] else x[mask.bool()]
        sums[name] = sums[name] + measure(rows).sum(0, dtype=torch.float64)
        counts[name] += len(rows)

    def hook(name: str) -> RemovableHandle:
        module = model.get_submodule(name.rpartition(".")[0])
        return module.register_forward_hook(
            lambda _, inputs, output: note(name, inputs[0] if side == "input" else output)
        )

    hooks = [hook(name) for name in names]
    for inputs in batches:
        named = isinstance(inputs, Mapping)
        mask = inputs.get("attention_mask") if named else None
        model(**inputs) if named else model(inputs)
    for each_hook in hooks:
        each_hook.remove()
    means = {name: sums[name] / counts[name] for name in names}
    return {name: (mean.sqrt() if statistic == "rms" else mean).float().cpu() for name, mean in means.items()}  # type: ignore[union-attr]
