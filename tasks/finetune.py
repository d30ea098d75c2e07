"""Makes experts: fine-tunes a base on one task, its head frozen (Ilharco et al., 2023) or trained with it."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from merging.backbones.base import Backbone
from merging.backbones.hugging_face import head_of
from merging.cache import Cache, code, key_of
from merging.checkpoints import Checkpoint, StateDict
from merging.errors import UserError
from merging.experts import Experts
from merging.identity import WHERE
from merging.threads import each
from tasks.engine import Engine
from tasks.heads.head import Given
from tasks.heads.probe import Probe
from tasks.multitask import Together
from tasks.progress import Progress
from tasks.recipes import Recipe
from tasks.suite import Suite
from tasks.task import Task, head_id
from tasks.training import HEAD, Job, State, Training

__all__ = ["FineTuned", "Job", "Recipe", "make_experts", "make_multitask", "train_expert"]
LIBRARIES = {"open_clip": ("open_clip_torch",), "hugging_face": ("transformers",)}  # by family of backbones
CODE = (
    "tasks.training",
    "tasks.multitask",
    "tasks.recipes",
    "tasks.adapters",
    "tasks.answers",
    "merging.backbones",
    "merging.ops",
)  # that makes an expert


@dataclass(frozen=True)
class FineTuned:
    """A family whose experts are tuned by the run that needs them; a subclass says from which base.

    seed: orders the training samples. workers: processes, None is one per core. heads_from: "expert", those that the
    recipe trains, else the suite's own; "base", linear probes fitted on the features of the base. precision: of the
    forward pass; bf16 is twice as fast on a CPU that has it, and slow on others.
    """

    family: str
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0
    workers: int | None = field(default=None, metadata=WHERE)
    heads_from: Literal["expert", "base"] = "expert"
    precision: Literal["fp32", "bf16"] = "fp32"

    def base(self, backbone: Backbone, cache: Cache) -> Checkpoint:
        """Raises UserError where it does not fit the backbone."""
        raise NotImplementedError

    def open(self, suite: Suite, backbone: Backbone, cache: Cache) -> Experts:
        """Experts for the tasks of `suite`, from the cache or trained now."""
        base = self.base(backbone, cache)
        table = backbone.table if self.recipe.head_lr is not None else None
        return Experts.open(base, self._made(base, suite, backbone, cache), suite.names, cache, table=table)

    def headed(self, suite: Suite, backbone: Backbone, cache: Cache) -> Suite:
        """The suite with the heads that were trained with the experts, or with linear probes of the base."""
        if self.heads_from == "expert" and self.recipe.head_lr is None:
            return suite
        base = self.base(backbone, cache)
        if self.heads_from == "base":
            engine = Engine("cpu", self.precision)
            heads: list[Any] = [Probe(base, backbone, task.data, cache, engine) for task in suite.every]  # type: ignore[attr-defined]
        else:
            made = self._made(base, Suite(suite.name, suite.every), backbone, cache)
            heads = [Given(head_of(parts_of_head(expert))) for expert in made]
        every = {task.name: replace(task, heads=head) for task, head in zip(suite.every, heads, strict=True)}  # type: ignore[type-var]
        merged, unseen = (tuple(every[task.name] for task in some) for some in (suite.tasks, suite.held_out))
        return Suite(suite.name, merged, unseen)

    def _made(self, base: Checkpoint, suite: Suite, backbone: Backbone, cache: Cache) -> list[Checkpoint]:
        return make_experts(base, backbone, suite, self.recipe, self.seed, cache, self.workers, self.precision)

    def open_multitask(self, suite: Suite, backbone: Backbone, cache: Cache) -> Checkpoint:
        """One model trained on all tasks of `suite`, from the cache or trained now.

        Raises UserError where every task trains a head of its own.
        """
        if self.recipe.head_lr is not None:
            raise UserError(
                f"The experts of {self.family} train heads of their own, and there is no model of all tasks with one "
                f"head. Leave method=multitask out."
            )
        return make_multitask(self.base(backbone, cache), backbone, suite, self.recipe, self.seed, cache)


def parts_of_head(expert: Checkpoint) -> dict[str, Tensor]:
    """The parameters of the head that was trained with an expert."""
    return {key: expert.tensor(key) for key in expert.specs() if key.startswith(f"{HEAD}.")}


def train_expert(job: Job, on_step: Callable[[], object] = lambda: None) -> State:
    """The fine-tuned tower, or its adapter (fp32). Repeats bitwise for a given job on one machine and thread count."""
    training = Training(job, Engine("cpu", job.precision))
    training.run(on_step)
    return training.weights()


def make_experts(
    base: Checkpoint, backbone: Backbone, suite: Suite, recipe: Recipe, seed: int, cache: Cache,
    workers: int | None = None, precision: Literal["fp32", "bf16"] = "fp32",
) -> list[Checkpoint]:  # fmt: skip
    """One expert per task, from the cache or trained now by `workers` processes of one thread (default: one per core).

    A finished expert is stored at once: after Ctrl-C the same call trains only what is missing.
    """
    return _make(base, backbone, suite.tasks, recipe, seed, cache, workers, precision)


def make_multitask(
    base: Checkpoint, backbone: Backbone, suite: Suite, recipe: Recipe, seed: int, cache: Cache
) -> Checkpoint:
    """One model for all tasks, from the cache or trained now, in as many steps as its experts together."""
    return _make(base, backbone, [Together(suite.tasks)], recipe.for_tasks(len(suite.tasks)), seed, cache, 1)[0]


def _make(
    base: Checkpoint, backbone: Backbone, tasks: Sequence[Task | Together], recipe: Recipe, seed: int, cache: Cache,
    workers: int | None, precision: Literal["fp32", "bf16"] = "fp32",
) -> list[Checkpoint]:  # fmt: skip
    state = {key: base.tensor(key).float() for key in base.specs()}
    libraries = LIBRARIES[str(backbone.facts().get("family", "open_clip"))] + (("peft",) if recipe.adapter else ())
    facts = code(CODE, libraries), base.id, backbone.identity()
    jobs = []
    for task, split in zip(tasks, each(lambda task: task.split("train"), tasks), strict=True):
        head, own = head_id(task) if recipe.head_lr is None else "trained", recipe.for_samples(len(split))
        key = key_of("expert", *facts, task.name, split.id, head, asdict(own), seed, precision)
        jobs.append(Job(state, backbone, task, own, seed, split, key, precision))
    if missing := [job for job in jobs if cache.get(job.key) is None]:
        _train_all(missing, cache, min(workers or len(os.sched_getaffinity(0)), len(missing)) if _may_spawn() else 1)
    made = [cache.tensors(job.key, lambda job=job: train_expert(job)) for job in jobs]
    trained = [StateDict(state, f"fine-tuned on {job.task.name}") for state, job in zip(made, jobs, strict=True)]
    return trained if recipe.adapter is None else [recipe.adapter.opened(base, state, (HEAD,)) for state in trained]  # type: ignore[return-value]


def _may_spawn() -> bool:
    """Not in a worker of joblib's: its start method is one that processes of our own do not know."""
    return multiprocessing.get_start_method(allow_none=True) in (None, *multiprocessing.get_all_start_methods())


def _train_all(jobs: Sequence[Job], cache: Cache, workers: int) -> None:
    names, steps = [job.task.name for job in jobs], sum(job.recipe.steps for job in jobs)
    what = "one model on all tasks" if isinstance(jobs[0].task, Together) else f"{len(jobs)} experts"
    with Progress(f"fine-tuning {what}", steps, ", ".join(names)) as progress:
        if workers == 1:
            for job in jobs:
                cache.tensors(job.key, lambda job=job: train_expert(job, progress.advance))
            return
        context = multiprocessing.get_context("spawn")
        ticks = context.Value("l", 0)
        pool = ProcessPoolExecutor(workers, context, _start_worker, (ticks, cache))
        try:
            waiting = [pool.submit(_work, job) for job in jobs]
            while not all(future.done() for future in waiting):
                time.sleep(0.2)
                progress.at(ticks.value)
            for future in waiting:
                future.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"A process that fine-tuned {', '.join(names)} was killed, perhaps because memory ran out. Run the "
                "same command again, with fewer of them (experts.workers=1); experts that were finished are kept."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(ticks, cache: Cache) -> None:
    """Runs once in a worker process: one thread, and a silent death on Ctrl-C."""
    global _TICKS, _CACHE
    _TICKS, _CACHE = ticks, cache
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """The workers of a killed process would wait for their next job for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: Job) -> None:
    def tick() -> None:
        with _TICKS.get_lock():
            _TICKS.value += 1

    _CACHE.tensors(job.key, lambda: train_expert(job, tick))
