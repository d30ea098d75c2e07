"""Scores a merged model on every task of a suite."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from merging.backbones.tower import Backbone, ImageTower
from merging.checkpoints import digest
from merging.errors import UserError
from merging.merged import Merged
from merging.ops import generator
from merging.routed import RoutedTower, install
from merging.routing.gates import listening
from merging.routing.groups import grouped
from merging.visit import gate_of
from tasks.engine import Engine
from tasks.journal import NOWHERE, Journal, Page
from tasks.moving import Moving
from tasks.suite import Split, Suite, Task, gather

OnTask = Callable[[str, float], object]
ENGINE = Engine("cpu")
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


class Grid:
    """A suite and towers to score on it: on a CPU one single-threaded worker per torch thread, a task each."""

    def __init__(self, suite: Suite, backbone: Backbone, engine: Engine = ENGINE):
        self.suite, self.backbone, self.engine = suite, backbone, engine
        self._towers: list[ImageTower] = []

    def score(self, merged: Merged, split: str, on_task: OnTask = silent, journal: Journal = NOWHERE) -> Scored:
        """Accuracy per task, and how a gate routed it; `on_task` hears each score, `journal` remembers batches.

        Deltas without a trained gate are mixed by the true task (oracle), those with one sample by sample. Raises
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
        found: dict[str, Outcome] = {}
        run = lambda index: self._one(merged, model, tasks[index], index, split, journal)  # noqa: E731
        for task, outcome in zip(tasks, self._each(run, len(tasks)), strict=True):
            found[task.name] = outcome
            on_task(task.name, outcome.accuracy)
        return found

    def at_scales(
        self, merged: Merged, scales: Sequence[float], split: str, journal: Journal = NOWHERE
    ) -> list[Scores]:
        """Accuracy per task at each coefficient, as `score` gives it. A batch is prepared once for all of them.

        Parts are mixed by the true task. An image with a logit that is not finite counts as wrong.
        """
        if merged.remade is not None:
            return [self.score(merged.scaled(scale), split, journal=journal).accuracy for scale in scales]
        check_order(merged, self.suite)
        moving, names = Moving.of(merged, self.engine.place), self.suite.names
        run = lambda index: self._along(merged, moving, scales, index, split, journal)  # noqa: E731
        columns = list(self._each(run, len(names)))
        return [dict(zip(names, scores, strict=True)) for scores in zip(*columns, strict=True)]

    def pool(self, workers: int) -> ThreadPoolExecutor:
        """Workers as for scoring."""
        single = {"initializer": torch.set_num_threads, "initargs": (1,)} if self.engine.workers > 1 else {}
        return ThreadPoolExecutor(workers, **single)  # type: ignore[arg-type]

    def _each(self, run: Callable[[int], Any], count: int) -> Iterator[Any]:
        """`run` of 0 .. count - 1, in order, by the workers."""
        pool = self.pool(self.engine.workers)
        try:
            yield from pool.map(run, range(count))
        finally:
            pool.shutdown(cancel_futures=True)

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
        return None if merged.deltas else dict(merged.state())

    def _one(
        self, merged: Merged, model: RoutedTower | dict[str, Tensor] | None, task: Task, index: int, split: str,
        journal: Journal,
    ) -> Outcome:  # fmt: skip
        images = task.split(split)
        page = journal.page(task.name, split, images.id, merged.scale, digest(task.head()), *self.engine.identity)
        if isinstance(model, RoutedTower):
            return outcome(model, self.backbone, task, images, self.engine, page)
        with self.tower() as tower:
            state = dict(merged.state(merged.one_hot(index))) if model is None else model
            tower.load_state_dict(state, strict=False)
            return outcome(tower, self.backbone, task, images, self.engine, page)

    @contextmanager
    def tower(self) -> Iterator[ImageTower]:
        """A tower of one's own, with any weights."""
        try:
            tower = self._towers.pop()
        except IndexError:  # asking first would race with the other workers
            tower = self.engine.ready(self.backbone.build())
        try:
            yield tower
        finally:
            self._towers.append(tower)

    def _along(
        self, merged: Merged, moving: Moving, scales: Sequence[float], index: int, split: str, journal: Journal
    ) -> list[float]:
        """The accuracies of one task at the scales."""
        task = self.suite.tasks[index]
        images, head = task.split(split), task.head().to(self.engine.place)
        page = journal.page(task.name, split, images.id, list(scales), digest(task.head()), *self.engine.identity)
        moving = moving.with_parts(merged, index)
        with self.tower() as tower:
            for batch in self.engine.stream(images.images, page.done):
                prepared, predicted = self.backbone.prepare(batch), []
                for scale in scales:
                    moving.put(tower, scale)
                    logits = answer(tower, prepared, engine=self.engine)[0] @ head.T
                    predicted.append(torch.where(logits.isfinite().all(1), logits.argmax(1), -1))
                page.add(torch.stack(predicted, 1), None)
        page.store()
        return [share_right(column, images) for column in page.together()[0].unbind(1)]


def check_order(merged: Merged, suite: Suite) -> None:
    """Raises UserError where the parts of a merge are not those of the suite's tasks, one by one."""
    if merged.deltas and tuple(merged.tasks) != suite.names:
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
