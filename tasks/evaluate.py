"""Scores a merged model on every task of a suite."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from merging.backbones.base import Backbone
from merging.errors import UserError
from merging.merged import Merged
from merging.routing.gates import listening
from merging.routing.install import install
from merging.routing.routed import Routed
from merging.threads import workers
from tasks.apart import check_apart, gate_of
from tasks.engine import Engine
from tasks.journal import NOWHERE, Journal, Page, joined
from tasks.mixed import mixes_tasks, run_together
from tasks.moving import Moving
from tasks.score import Score
from tasks.split import Inputs, Split, count_of, held
from tasks.suite import Suite
from tasks.task import Predictions, Read, Task, corrected, head_id, reading

OnTask = Callable[[str, float], object]  # a task's name and the value of its score
ENGINE = Engine("cpu")
Scores = dict[str, Score]  # by task
WEIGHTS = "gating_weights"  # beside the predictions of a page


def silent(task: str, value: float) -> None:
    """Does nothing with a score."""


class Routing(NamedTuple):
    """Where the samples of each task went."""

    matrix: list[list[float]]  # true task x mean weight of each task's experts
    accuracy: dict[str, float]  # task -> share of samples whose largest weight is their own task's


class Scored(NamedTuple):
    """One split of all tasks."""

    scores: Scores
    routing: Routing | None

    @property
    def values(self) -> dict[str, float]:
        """The bare number of every task's score."""
        return {task: score.value for task, score in self.scores.items()}


class Outcome(NamedTuple):
    """One task: its score and the gates' mean weights per sample [N, G]."""

    score: Score
    weights: Tensor | None


class Grid:
    """A suite and models to score on it: on a CPU one single-threaded worker per torch thread, a task each."""

    def __init__(self, suite: Suite, backbone: Backbone, engine: Engine = ENGINE):
        self.suite, self.backbone, self.engine = suite, backbone, engine
        self._modules: list[nn.Module] = []

    def score(self, merged: Merged, split: str, on_task: OnTask = silent, journal: Journal = NOWHERE) -> Scored:
        """Score per task, and how a gate routed it; `on_task` is called with each value, `journal` stores batches.

        Task-specific deltas without a trained gate are mixed by the true task (oracle), those with one sample by
        sample. Raises UserError for a merge of other tasks than the suite's, or in another order.
        """
        check_order(merged, self.suite)
        outcomes = self.outcomes(merged, self.suite.tasks, split, on_task, journal)
        return Scored({name: outcome.score for name, outcome in outcomes.items()}, routing_of(outcomes, merged))

    def outcomes(
        self, merged: Merged, tasks: Sequence[Task], split: str, on_task: OnTask, journal: Journal
    ) -> dict[str, Outcome]:
        """Outcomes by task; a merge that is mixed by the true task takes the index of the task among `tasks`."""
        model, tasks = self._shared(merged), corrected(tasks, merged.corrections)
        if isinstance(model, Routed) and mixes_tasks(merged):
            pairs = self._together(model, merged, tasks, split)
        else:
            run = lambda index: self._one(merged, model, tasks[index], index, split, journal)  # noqa: E731
            pairs = zip(tasks, self.each(run, len(tasks)), strict=True)
        outcomes: dict[str, Outcome] = {}
        for task, outcome in pairs:
            outcomes[task.name] = outcome
            on_task(task.name, outcome.score.value)
        return outcomes

    def at_scales(
        self, merged: Merged, scales: Sequence[float], split: str, journal: Journal = NOWHERE
    ) -> list[Scores]:
        """Scores at each coefficient, as `score` gives them. Batches are prepared once for all of them.

        Deltas are mixed by the true task. A sample with an output that is not finite counts as wrong.
        """
        if merged.remade is not None:
            return [self.score(merged.scaled(scale), split, journal=journal).scores for scale in scales]
        check_order(merged, self.suite)
        moving = None if merged.owned else Moving.of(merged, self.engine.torch_device)
        run = lambda index: self._along(merged, moving, scales, index, split, journal)  # noqa: E731
        columns = self.each(run, len(self.suite.tasks))
        return [dict(zip(self.suite.names, scores, strict=True)) for scores in zip(*columns, strict=True)]

    def each(self, run: Callable[[int], Any], count: int) -> Iterator[Any]:
        """`run` of 0 .. count - 1, in order; what fails cancels what has not begun."""
        with workers() if self.engine.workers > 1 else nullcontext(map) as run_all:
            yield from run_all(run, range(count))

    @contextmanager
    def module(self) -> Iterator[nn.Module]:
        """A model of one's own, with any weights."""
        try:
            module = self._modules.pop()
        except IndexError:  # asking first would race with the other workers
            module = self.engine.ready(self.backbone.build())
        try:
            yield module
        finally:
            self._modules.append(module)

    def _shared(self, merged: Merged) -> Routed | dict[str, Tensor] | None:
        """What all tasks share: a routed model, or the weights of a static merge."""
        if merged.routing is not None and not merged.routing.by_task:
            return self.engine.ready(install(self.backbone.build(), merged), routed=True)
        return None if merged.deltas or merged.owned else dict(merged.state())

    def _one(
        self, merged: Merged, model: Routed | dict[str, Tensor] | None, task: Task, index: int, split: str,
        journal: Journal,
    ) -> Outcome:  # fmt: skip
        page = journal.page(task.name, split, task.split(split).id, merged.scale, head_id(task), *self.engine.identity)
        own = merged.of(task.name)
        if isinstance(model, Routed):
            if not merged.owned:
                return outcome(model, self.backbone, task, split, self.engine, page)
            check_apart(model.sees)
            answers = self.engine.ready(install(self.backbone.build(), own), routed=True)
            return outcome(answers, self.backbone, task, split, self.engine, page, model)
        with self.module() as module:
            state = dict(own.state(own.one_hot(index) if own.deltas else None)) if model is None else model
            module.load_state_dict(state, strict=False)
            return outcome(module, self.backbone, task, split, self.engine, page)

    def _together(
        self, model: Routed, merged: Merged, tasks: Sequence[Task], split: str
    ) -> Iterator[tuple[Task, Outcome]]:
        """As `outcomes`, where samples of all tasks meet in one batch."""
        if merged.owned:
            check_apart("samples of several tasks at once")
        if alone := [task.name for task in tasks if hasattr(task, "run") or hasattr(task, "reading")]:
            raise UserError(
                f"{alone[0]} is scored by itself, and this gate needs samples of all tasks in one batch. Set "
                f"router.gate.granularity=sample."
            )
        splits = [task.split(split) for task in tasks]
        read = reading(self.backbone, tasks[0]).read
        run = lambda inputs, w=None: answer(model, inputs, w, read=read, engine=self.engine)  # noqa: E731
        features, weights = run_together(model, merged, splits, self.backbone, self.engine, run)
        sizes = [len(samples) for samples in splits]
        for task, some, share in zip(tasks, features.split(sizes), weights.split(sizes), strict=True):
            kept = decided(task, some, split)
            yield task, Outcome(task.evaluate(lambda _, kept=kept: kept, split), share)

    def _along(
        self, merged: Merged, moving: Moving | None, scales: Sequence[float], index: int, split: str, journal: Journal
    ) -> list[Score]:
        """The scores of one task at the scales."""
        task = self.suite.tasks[index]
        if hasattr(task, "run"):
            return [self._one(merged.scaled(scale), None, task, index, split, journal).score for scale in scales]
        samples, facts = task.split(split), (list(scales), head_id(task), *self.engine.identity)
        page = journal.page(task.name, split, samples.id, *facts)
        moving = (moving or Moving.of(merged.of(task.name), self.engine.torch_device)).with_delta(merged, index)
        prepare, read, notes = reading(self.backbone, task)
        remarks = notes(samples.inputs)
        with self.module() as module:
            moving.put(module, scales[0])
            for batches in held(map(prepare, self.engine.stream(samples.inputs, page.done))):
                kept: list[Predictions] = []
                for scale in scales:
                    moving.put(module, scale, whole=False)
                    with self.engine.running():  # around all batches: weights are cast once
                        outputs = [decided(task, answer(module, x, read=read, engine=self.engine)[0]) for x in batches]
                    kept.append({name: joined([some[name] for some in outputs]) for name in outputs[0]})
                page.add({name: joined([some[name][:, None] for some in kept], 1) for name in kept[0]})
        page.store()
        stored = page.together().items()
        predictions = [{name: tensor[:, index] for name, tensor in stored} for index in range(len(scales))]
        return [task.evaluate(lambda _, kept=kept: kept, split).with_notes(remarks) for kept in predictions]


def check_order(merged: Merged, suite: Suite) -> None:
    """Raises UserError where the experts of a merge are not those of the suite's tasks, one by one."""
    if merged.deltas and tuple(merged.tasks) != suite.names:
        raise UserError(
            f"The parts of this merge and its router are for the tasks {', '.join(merged.tasks)}, in this order; the "
            f"suite {suite.name} has {', '.join(suite.names)}. Score it on its own tasks in its own order, or merge "
            f"and train a router for these."
        )


def outcome(
    module: nn.Module, backbone: Backbone, task: Task, split: str, engine: Engine = ENGINE, page: Page | None = None,
    gated: Routed | None = None,
) -> Outcome:  # fmt: skip
    """Score, and the mean gating weights of every sample; what the page holds already is not run again.

    gated: a model whose gate decides in the place of the module's. Raises UserError if an output is not finite.
    """
    page = NOWHERE.page() if page is None else page
    remarks: list[str] = []

    def predict(samples: Split) -> Predictions:
        if hasattr(task, "run"):
            if gated is not None:
                raise UserError(
                    f"{task.name} runs its model itself, under one gate and one set of parameters. Choose owned=heads."
                )
            return task.run(module, backbone, engine, samples, page)  # type: ignore[attr-defined]
        prepare, read, notes = reading(backbone, task)
        remarks.extend(notes(samples.inputs))
        with engine.running():  # around all batches: weights are cast once
            for inputs in engine.stream(samples.inputs, page.done):
                prepared = prepare(inputs)
                w = None if gated is None else gate_of(gated, prepared, engine)
                features, weights = answer(module, prepared, w, read=read, engine=engine)
                weights = weights if w is None else w
                page.add({**decided(task, features, split), **({} if weights is None else {WEIGHTS: weights.float()})})
        page.store()
        return page.together()

    score = task.evaluate(predict, split).with_notes(remarks)
    return Outcome(score, page.together().get(WEIGHTS))


@torch.no_grad()  # in inference mode autocast would cast all weights at every forward, of which `read` may run many
def answer(
    module: nn.Module, inputs: Inputs, w: Tensor | None = None, *, read: Read, engine: Engine = ENGINE
) -> tuple[Tensor, Tensor | None]:
    """What `read` gives [B, ...], and the mean weights of all gates that were asked [B, G], None without gates."""
    with listening() as recorded, engine.running():
        features = read(module if w is None else partial(module, w=w), inputs).float()  # type: ignore[arg-type]
    weights = [per_sample(w, count_of(inputs)) for w in recorded]
    return features, torch.stack(weights).mean(0) if weights else None


def decided(task: Task, features: Tensor, strict: str | None = None) -> Predictions:
    """What the task keeps of features through its head, on the CPU.

    Raises UserError if an output is not finite and `strict` names the split.
    """
    head = task.head()
    if head is not None:
        with torch.inference_mode(False):  # what is moved in inference mode could not be learned through any more
            head.to(features.device)
    with torch.inference_mode(), torch.autocast(features.device.type, enabled=False):  # heads are run in fp32
        outputs = features if head is None else head(features)
    if strict is not None and not outputs.isfinite().all():
        raise UserError(
            f"The merged model gives NaN or Inf on {task.name} ({strict}). Lower the scale or check the experts."
        )
    return {name: tensor.cpu() for name, tensor in task.decide(outputs).items()}


def per_sample(weights: Tensor, count: int) -> Tensor:
    """[B, G] from the output of a gate: per sample, per token or for the whole batch."""
    if weights.ndim == 1:
        return weights.expand(count, -1)
    return weights.mean(1) if weights.ndim == 3 else weights


def routing_of(outcomes: Mapping[str, Outcome], merged: Merged) -> Routing | None:
    """The routing matrix of a scored model, None without gates."""
    matrix, accuracy = [], {}
    for index, (name, outcome) in enumerate(outcomes.items()):
        if outcome.weights is None:
            return None
        weights = per_task(outcome.weights, merged)
        matrix.append(mean_weights(weights))
        accuracy[name] = float((weights.argmax(1) == index).float().mean())
    return Routing(matrix, accuracy)


def per_task(weights: Tensor, merged: Merged) -> Tensor:
    """Weights of components [N, G] as weights of tasks [N, T]: the components of a task are added up."""
    return weights.unflatten(1, (len(merged.tasks), -1)).sum(-1)


def mean_weights(weights: Tensor) -> list[float]:
    """Mean over the samples of [N, T], for a row."""
    return [round(weight, 6) for weight in weights.double().mean(0).tolist()]
