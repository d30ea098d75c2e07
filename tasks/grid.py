"""Scores a merged model on every task of a suite; picks the scale on validation, reports on test."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from merging.backbones.tower import Backbone, ImageTower
from merging.errors import UserError
from merging.merged import Merged
from tasks.suite import Split, Suite, Task, one_hot

Scores = dict[str, float]  # task -> share of correct images


@dataclass(frozen=True)
class Fixed:
    """Keep the method's own scale."""

    source: str = "fixed"

    def choose(self, merged: Merged, grid: "Grid") -> tuple[Merged, Scores | None]:
        return merged, None


@dataclass(frozen=True)
class Search:
    """The scale with the best mean accuracy on `split`, the smallest of equals; a method without one stays as it is."""

    scales: Sequence[float]
    split: str = "val"

    def __post_init__(self) -> None:
        if not self.scales:
            raise UserError("scale.scales is empty. List at least one coefficient, such as scale.scales=[0.3].")
        if self.split == "test":
            raise UserError("scale.split=test would choose on the split that is reported. Choose on val.")

    @property
    def source(self) -> str:
        return f"search:{self.split}"

    def choose(self, merged: Merged, grid: "Grid") -> tuple[Merged, Scores | None]:
        if merged.scale is None:
            return merged, None
        tried = [(merged.scaled(scale), grid.score(merged.scaled(scale), self.split)) for scale in sorted(self.scales)]
        return max(tried, key=lambda pair: sum(pair[1].values()))


class Grid:
    """A suite and towers to score on it: one single-threaded worker per torch thread, a task each."""

    def __init__(self, suite: Suite, backbone: Backbone, batch: int = 100):
        self.suite, self.backbone, self.batch = suite, backbone, batch
        self._towers: list[ImageTower] = []

    def score(
        self, merged: Merged, split: str, on_task: Callable[[str, float], object] = lambda task, score: None
    ) -> Scores:
        """Accuracy per task. Task-dependent banks are mixed by the true task (oracle); `on_task` hears each score."""
        weights = None if merged.own else dict(merged.state())
        jobs = [(merged, weights, index, task, split) for index, task in enumerate(self.suite.tasks)]
        pool = ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))
        scores: Scores = {}
        try:
            for (*_, task, _), score in zip(jobs, pool.map(lambda job: self._one(*job), jobs), strict=True):
                scores[task.name] = score
                on_task(task.name, score)
        finally:
            pool.shutdown(cancel_futures=True)
        return scores

    def _one(self, merged: Merged, weights: dict[str, Tensor] | None, index: int, task: Task, split: str) -> float:
        try:
            tower = self._towers.pop()
        except IndexError:  # asking first would race with the other workers
            tower = self.backbone.build()
        state = weights if weights is not None else dict(merged.state(one_hot(index, len(self.suite.tasks))))
        tower.load_state_dict(state, strict=False)
        try:
            return accuracy(tower, self.backbone, task, task.split(split), self.batch)
        finally:
            self._towers.append(tower)


@torch.inference_mode()
def accuracy(tower: torch.nn.Module, backbone: Backbone, task: Task, split: Split, batch: int = 100) -> float:
    """Share of the split's images whose highest logit is the label's. Raises UserError if a logit is not finite."""
    head, right = task.head(), 0
    for images, labels in zip(split.images.split(batch), split.labels.split(batch), strict=True):
        logits = functional.normalize(tower(backbone.prepare(images)), dim=-1) @ head.T
        if not logits.isfinite().all():
            raise UserError(
                f"The merged model gives NaN or Inf on {task.name} ({split.name}). "
                f"Lower the scale or check the experts."
            )
        right += int((logits.argmax(1) == labels).sum())
    return right / len(split)
