"""Scores a merged model on every task of a suite; picks the scale on validation, reports on test."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from merging.backbones.tower import Backbone, ImageTower
from merging.checkpoints import digest
from merging.errors import UserError
from merging.groupwise import grouped
from merging.merged import Merged
from merging.ops import generator
from merging.routed import RoutedTower, install
from merging.routers import listening
from merging.visit import gate_of
from tasks.engine import Engine
from tasks.journal import Journal, Page
from tasks.suite import Split, Suite, Task, gather

OnTask = Callable[[str, float], object]
ENGINE, NOWHERE = Engine("cpu"), Journal()
Scores = dict[str, float]  # task -> share of correct images
TOGETHER = ("mixed", "group")  # granularities that look at images of several tasks at once


def silent(task: str, accuracy: float) -> None:
    """Hears a score and says nothing."""


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

    def choose(self, merged: Merged, grid: "Grid", journal: Journal = NOWHERE) -> tuple[Merged, Scores | None]:
        return merged, None


@dataclass(frozen=True)
class Search:
    """The scale with the best mean accuracy on `split`, the smallest of equals; a method without one stays as it is.

    The list is searched as a curve with one peak, which spares a third of it or more.
    routed: whether the static part of a merge with task-specific parts is searched too (they are then mixed by the true
    task, before any gate is trained); otherwise it keeps its own scale.
    """

    scales: Sequence[float]
    split: Literal["train", "val", "calibration", "test"] = "val"
    routed: bool = False

    def __post_init__(self) -> None:
        if not self.scales:
            raise UserError("scale.scales is empty. List at least one coefficient, such as scale.scales=[0.3].")
        if self.split == "test":
            raise UserError("scale.split=test would choose on the split that is reported. Choose on val.")

    @property
    def source(self) -> str:
        return f"search:{self.split}"

    def choose(self, merged: Merged, grid: "Grid", journal: Journal = NOWHERE) -> tuple[Merged, Scores | None]:
        if merged.scale is None or (merged.own and not self.routed):
            return merged, None
        scales, scores = sorted(self.scales), {}

        def mean(index: int) -> float:
            if index not in scores:
                scores[index] = grid.score(merged.scaled(scales[index]), self.split, journal=journal).accuracy
            return sum(scores[index].values())

        best = climb(mean, len(scales))
        return merged.scaled(scales[best]), scores[best]


def climb(value: Callable[[int], float], count: int) -> int:
    """Where `value` of 0 .. count - 1 is largest, the first of equals, if it has one peak.

    Asks every third index, then the neighbours of the best until both are lower.
    """
    asked = set(range(min(1, count - 1), count, 3))
    while True:
        best = max(sorted(asked), key=value)
        new = {index for index in (best - 1, best + 1) if 0 <= index < count} - asked
        if not new:
            return best
        asked |= new


class Grid:
    """A suite and towers to score on it: on a CPU one single-threaded worker per torch thread, a task each."""

    def __init__(self, suite: Suite, backbone: Backbone, engine: Engine = ENGINE):
        self.suite, self.backbone, self.engine = suite, backbone, engine
        self._towers: list[ImageTower] = []

    def score(self, merged: Merged, split: str, on_task: OnTask = silent, journal: Journal = NOWHERE) -> Scored:
        """Accuracy per task, and how a gate routed it; `on_task` hears each score, `journal` remembers batches.

        Banks without a trained gate are mixed by the true task (oracle), those with one sample by sample. Raises
        UserError for a merge whose parts are of other tasks than the suite's, or in another order.
        """
        check_order(merged, self.suite)
        found = self.outcomes(merged, self.suite.tasks, split, on_task, journal)
        return Scored({name: outcome.accuracy for name, outcome in found.items()}, routed(found, merged))

    def outcomes(
        self, merged: Merged, tasks: Sequence[Task], split: str, on_task: OnTask, journal: Journal
    ) -> dict[str, Outcome]:
        """What the merge makes of tasks; one that is mixed by the true task takes its own, in its order."""
        model = self._model(merged)
        if isinstance(model, RoutedTower) and merged.routing is not None and merged.routing.granularity in TOGETHER:
            return self._together(model, merged, tasks, split, on_task)
        single = {"initializer": torch.set_num_threads, "initargs": (1,)} if self.engine.workers > 1 else {}
        pool = ThreadPoolExecutor(self.engine.workers, **single)  # type: ignore[arg-type]
        found: dict[str, Outcome] = {}
        try:
            run = lambda index: self._one(merged, model, tasks[index], index, split, journal)  # noqa: E731
            for task, outcome in zip(tasks, pool.map(run, range(len(tasks))), strict=True):
                found[task.name] = outcome
                on_task(task.name, outcome.accuracy)
        finally:
            pool.shutdown(cancel_futures=True)
        return found

    def _together(
        self, model: RoutedTower, merged: Merged, tasks: Sequence[Task], split: str, on_task: OnTask
    ) -> dict[str, Outcome]:
        """As `outcomes`, where the images of all tasks meet in one batch."""
        splits = [task.split(split) for task in tasks]
        prepare = lambda some: self.backbone.prepare(gather(splits, some).to(self.engine.place))  # noqa: E731
        features, weights = together(model, merged, prepare, sum(map(len, splits)), self.engine)
        sizes, found = [len(each) for each in splits], {}
        parts = zip(tasks, splits, features.split(sizes), weights.split(sizes), strict=True)
        for task, images, some, share in parts:
            right = share_right(judged(some, task.head().to(some.device), task, images), images)
            found[task.name] = Outcome(right, share)
            on_task(task.name, found[task.name].accuracy)
        return found

    def _model(self, merged: Merged) -> RoutedTower | dict[str, Tensor] | None:
        """What all tasks share: a routed tower, or the weights of a static merge."""
        if merged.routing is not None and not merged.routing.by_task:
            return self.engine.ready(install(self.backbone.build(), merged), routed=True)
        return None if merged.own else dict(merged.state())

    def _one(
        self, merged: Merged, model: RoutedTower | dict[str, Tensor] | None, task: Task, index: int, split: str,
        journal: Journal,
    ) -> Outcome:  # fmt: skip
        images = task.split(split)
        page = journal.page(task.name, split, images.id, merged.scale, digest(task.head()), *self.engine.identity)
        if isinstance(model, RoutedTower):
            return outcome(model, self.backbone, task, images, self.engine, page)
        try:
            tower = self._towers.pop()
        except IndexError:  # asking first would race with the other workers
            tower = self.engine.ready(self.backbone.build())
        tower.load_state_dict(dict(merged.state(merged.one_hot(index))) if model is None else model, strict=False)
        try:
            return outcome(tower, self.backbone, task, images, self.engine, page)
        finally:
            self._towers.append(tower)


def check_order(merged: Merged, suite: Suite) -> None:
    """Raises UserError where the parts of a merge are not those of the suite's tasks, one by one."""
    if merged.own and tuple(merged.tasks) != suite.names:
        raise UserError(
            f"The parts of this merge and its router are for the tasks {', '.join(merged.tasks)}, in this order; the "
            f"suite {suite.name} has {', '.join(suite.names)}. Score it on its own tasks in its own order, or merge "
            f"and train a router for these."
        )


def outcome(
    tower: nn.Module, backbone: Backbone, task: Task, split: Split, engine: Engine = ENGINE, page: Page | None = None
) -> Outcome:
    """Accuracy, and the mean weights of every image; what the page holds already is not scored again.

    Raises UserError if a logit is not finite.
    """
    page = NOWHERE.page() if page is None else page
    head = task.head().to(engine.place)
    for images in engine.stream(split.images, page.done):
        features, weights = answer(tower, backbone.prepare(images), engine=engine)
        page.add(judged(features, head, task, split), weights)
    page.store()
    predicted, weights = page.together()
    return Outcome(share_right(predicted, split), weights)


@torch.inference_mode()
def answer(tower: nn.Module, images: Tensor, *given: Tensor, engine: Engine = ENGINE) -> tuple[Tensor, Tensor | None]:
    """Unit features [B, D] and the mean weights of all gates that were asked [B, G], None without gates."""
    with listening() as heard, engine.running():
        features = functional.normalize(tower(images, *given).float(), dim=-1)
    weights = [per_image(w, len(images)) for w in heard]
    return features, torch.stack(weights).mean(0) if weights else None


def judged(features: Tensor, head: Tensor, task: Task, split: Split) -> Tensor:
    """The classes with the highest logits, [B]. Raises UserError if a logit is not finite."""
    logits = features @ head.T
    if not logits.isfinite().all():
        raise UserError(
            f"The merged model gives NaN or Inf on {task.name} ({split.name}). Lower the scale or check the experts."
        )
    return logits.argmax(1)


def share_right(predicted: Tensor, split: Split) -> float:
    """Share of images whose predicted class is their label's."""
    return int((predicted.cpu() == split.labels).sum()) / len(split)


def per_image(weights: Tensor, images: int) -> Tensor:
    """[B, G] from what a gate answered: per image, per token or for the whole batch."""
    if weights.ndim == 1:
        return weights.expand(images, -1)
    return weights.mean(1) if weights.ndim == 3 else weights


@torch.inference_mode()
def together(
    model: RoutedTower, merged: Merged, prepare: Callable[[Tensor], Tensor], count: int, engine: Engine
) -> tuple[Tensor, Tensor]:
    """Features [n, D] and weights [n, G] of images from all tasks, in their order.

    mixed: shuffled batches, each with one w. group: what the gate gives all images is known first, and groups of
    similar ones share the mean of their weights.
    """
    shape = merged.routing.gate if merged.routing is not None else None
    assert shape is not None
    order, given = torch.randperm(count, generator=generator("mixed")), None
    if shape.granularity == "group":
        gate = gate_of(model)
        ask = lambda some: gate.logits(gate.features(model.seen(prepare(some)))).float()  # noqa: E731
        with engine.running():
            logits = torch.cat([ask(some) for some in torch.arange(count).split(engine.batch)]).cpu()
        labels, means = grouped(gate, logits)
        order, given = labels.argsort(stable=True), means[labels]
    answers = []
    for some in order.split(engine.batch):
        images = prepare(some)
        features, weights = answer(
            model, images, *([] if given is None else [given[some].to(images.device)]), engine=engine
        )
        answers.append((features, weights if given is None else given[some]))
    back = order.argsort()
    return torch.cat([each[0] for each in answers])[back], torch.cat([each[1] for each in answers])[back]


def routed(found: Mapping[str, Outcome], merged: Merged) -> RoutingFound | None:
    """The routing matrix of a scored model, None without gates."""
    matrix, accuracy = [], {}
    for index, (name, outcome) in enumerate(found.items()):
        if outcome.weights is None:
            return None
        weights = by_task(outcome.weights, merged)
        matrix.append(mean_weights(weights))
        accuracy[name] = float((weights.argmax(1) == index).float().mean())
    return RoutingFound(matrix, accuracy)


def by_task(weights: Tensor, merged: Merged) -> Tensor:
    """Weights of parts [images, G] as weights of tasks [images, T]: the parts of a task are added up."""
    return weights.unflatten(1, (len(merged.tasks), -1)).sum(-1)


def mean_weights(weights: Tensor) -> list[float]:
    """Mean over the images of [images, T], for a row."""
    return [round(weight, 6) for weight in weights.double().mean(0).tolist()]
