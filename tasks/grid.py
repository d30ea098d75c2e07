"""Scores a merged model on every task of a suite; picks the scale on validation, reports on test."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from merging.backbones.tower import Backbone, ImageTower
from merging.errors import UserError
from merging.merged import Merged
from merging.routed import RoutedTower, install
from merging.routers import listening
from tasks.suite import Split, Suite, Task

Scores = dict[str, float]  # task -> share of correct images
BY_TASK = ("oracle", "learned")  # routers that are told the true task: a gate that is still to be trained is one


class RoutingFound(NamedTuple):
    """Where the images of each task went."""

    matrix: list[list[float]]  # true task x mean weight of each task's parts
    accuracy: dict[str, float]  # task -> share of images whose largest weight is their own task's


class Scored(NamedTuple):
    """One split of all tasks."""

    accuracy: Scores
    routing: RoutingFound | None


class Outcome(NamedTuple):
    """One task: the share of correct images and the gates' mean weights per image [images, G]."""

    accuracy: float
    weights: Tensor | None


@dataclass(frozen=True)
class Fixed:
    """Keep the method's own scale."""

    source: str = "fixed"

    def choose(self, merged: Merged, grid: "Grid") -> tuple[Merged, Scores | None]:
        return merged, None


@dataclass(frozen=True)
class Search:
    """The scale with the best mean accuracy on `split`, the smallest of equals; a method without one stays as it is.

    What a gate will route is mixed by the true task meanwhile: the scale is chosen before the gate is trained.
    """

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
        tried = [
            (merged.scaled(scale), grid.score(merged.scaled(scale), self.split).accuracy)
            for scale in sorted(self.scales)
        ]
        return max(tried, key=lambda pair: sum(pair[1].values()))


class Grid:
    """A suite and towers to score on it: one single-threaded worker per torch thread, a task each."""

    def __init__(self, suite: Suite, backbone: Backbone, batch: int = 100):
        self.suite, self.backbone, self.batch = suite, backbone, batch
        self._towers: list[ImageTower] = []

    def score(
        self, merged: Merged, split: str, on_task: Callable[[str, float], object] = lambda task, score: None
    ) -> Scored:
        """Accuracy per task, and how a gate routed it; `on_task` hears each score.

        Banks without a trained gate are mixed by the true task (oracle), those with one sample by sample.
        """
        model = self._model(merged)
        pool = ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))
        found: dict[str, Outcome] = {}
        try:
            run = lambda index: self._one(merged, model, index, split)  # noqa: E731
            for task, outcome in zip(self.suite.tasks, pool.map(run, range(len(self.suite.tasks))), strict=True):
                found[task.name] = outcome
                on_task(task.name, outcome.accuracy)
        finally:
            pool.shutdown(cancel_futures=True)
        return Scored({name: outcome.accuracy for name, outcome in found.items()}, routed(found, merged))

    def _model(self, merged: Merged) -> RoutedTower | dict[str, Tensor] | None:
        """What all tasks share: a routed tower, or the weights of a static merge."""
        if merged.routing is not None and merged.routing.router not in BY_TASK:
            return install(self.backbone.build(), merged)
        return None if merged.own else dict(merged.state())

    def _one(self, merged: Merged, model: RoutedTower | dict[str, Tensor] | None, index: int, split: str) -> Outcome:
        task = self.suite.tasks[index]
        if isinstance(model, RoutedTower):
            return outcome(model, self.backbone, task, task.split(split), self.batch)
        try:
            tower = self._towers.pop()
        except IndexError:  # asking first would race with the other workers
            tower = self.backbone.build()
        tower.load_state_dict(dict(merged.state(merged.one_hot(index))) if model is None else model, strict=False)
        try:
            return outcome(tower, self.backbone, task, task.split(split), self.batch)
        finally:
            self._towers.append(tower)


@torch.inference_mode()
def outcome(tower: nn.Module, backbone: Backbone, task: Task, split: Split, batch: int = 100) -> Outcome:
    """Accuracy, and the mean weights of every image. Raises UserError if a logit is not finite."""
    head, right, weights = task.head(), 0, []
    for images, labels in zip(split.images.split(batch), split.labels.split(batch), strict=True):
        with listening() as heard:
            logits = functional.normalize(tower(backbone.prepare(images)), dim=-1) @ head.T
        if not logits.isfinite().all():
            raise UserError(
                f"The merged model gives NaN or Inf on {task.name} ({split.name}). "
                f"Lower the scale or check the experts."
            )
        right += int((logits.argmax(1) == labels).sum())
        weights += [torch.stack([per_image(w, len(images)) for w in heard]).mean(0)] if heard else []
    return Outcome(right / len(split), torch.cat(weights) if weights else None)


def per_image(weights: Tensor, images: int) -> Tensor:
    """[B, G] from what a gate answered: per image, per token or for the whole batch."""
    if weights.ndim == 1:
        return weights.expand(images, -1)
    return weights.mean(1) if weights.ndim == 3 else weights


def routed(found: Mapping[str, Outcome], merged: Merged) -> RoutingFound | None:
    """The routing matrix of a scored model, None without gates. The parts of a task are added up."""
    matrix, accuracy = [], {}
    for index, (name, outcome) in enumerate(found.items()):
        if outcome.weights is None:
            return None
        by_task = outcome.weights.unflatten(1, (len(merged.tasks), -1)).sum(-1)
        matrix.append([round(weight, 6) for weight in by_task.double().mean(0).tolist()])
        accuracy[name] = float((by_task.argmax(1) == index).float().mean())
    return RoutingFound(matrix, accuracy)
