"""Makes experts: fine-tunes the image tower of a base on one task, the zero-shot head frozen (Ilharco et al., 2023)."""

import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional

from merging.backbones.tower import Backbone
from merging.cache import Cache, key_of
from merging.checkpoints import Checkpoint, StateDict
from merging.ops import generator
from merging.preflight import check_range
from merging.threads import each
from tasks.progress import Progress
from tasks.suite import Split, Suite, Task

State = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """AdamW with linear warm-up and cosine decay; one learning rate for all parameters of the tower."""

    steps: int = 80
    batch: int = 64
    lr: float = 5.0e-4
    warmup: int = 20
    weight_decay: float = 0.01
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_range("recipe: steps", self.steps, 1, 10**9)
        check_range("recipe: batch", self.batch, 1, 10**6)
        check_range("recipe: lr", self.lr, 0.0, 1.0, open_low=True)

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))


@dataclass(frozen=True)
class Job:
    """One expert to make; picklable, so that a worker process can."""

    base: State  # floating parameters of the tower
    backbone: Backbone
    task: Task
    recipe: Recipe
    seed: int
    split: Split  # training images
    key: str  # cache key: the content of base, data, head and recipe


def train_expert(job: Job, on_step: Callable[[], object] = lambda: None) -> State:
    """The fine-tuned tower (fp32). Repeats bitwise for a given job on one machine and thread count."""
    torch.manual_seed(job.seed)
    tower, split, head = job.backbone.build().train(), job.split, job.task.head()
    tower.load_state_dict(job.base)
    optimizer = torch.optim.AdamW(tower.parameters(), weight_decay=job.recipe.weight_decay)
    rng = generator("finetune", job.seed, job.task.name)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(job.recipe.steps):
        while len(order) < job.recipe.batch:
            order = torch.cat([order, torch.randperm(len(split), generator=rng)])
        batch, order = order[: job.recipe.batch], order[job.recipe.batch :]
        for group in optimizer.param_groups:
            group["lr"] = job.recipe.rate(step)
        features = functional.normalize(tower(job.backbone.prepare(split.images[batch])), dim=-1)
        loss = functional.cross_entropy(features @ head.T, split.labels[batch])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), job.recipe.clip)
        optimizer.step()
        on_step()
    return {key: value.detach().clone() for key, value in tower.state_dict().items()}


def make_experts(
    base: Checkpoint,
    backbone: Backbone,
    suite: Suite,
    recipe: Recipe,
    seed: int,
    cache: Cache,
    workers: int | None = None,
) -> list[Checkpoint]:
    """One expert per task, from the cache or trained now by `workers` processes of one thread (default: one per core).

    A finished expert is stored at once: after Ctrl-C the same call trains only what is missing.
    """
    state = {key: base.tensor(key).float() for key in base.specs()}
    splits = each(lambda task: task.split("train"), suite.tasks)
    keys = [_key(base, backbone, *pair, recipe, seed) for pair in zip(suite.tasks, splits, strict=True)]
    facts = zip(suite.tasks, splits, keys, strict=True)
    jobs = [Job(state, backbone, task, recipe, seed, split, key) for task, split, key in facts]
    missing = [job for job in jobs if cache.get(job.key) is None]
    if missing:
        _train_all(missing, cache, min(workers or len(os.sched_getaffinity(0)), len(missing)))
    states = [cache.tensors(job.key, lambda job=job: train_expert(job)) for job in jobs]
    return [StateDict(state, f"fine-tuned on {task.name}") for state, task in zip(states, suite.tasks, strict=True)]


def _key(base: Checkpoint, backbone: Backbone, task: Task, split: Split, recipe: Recipe, seed: int) -> str:
    data, head = split.id, StateDict({"head": task.head()}).id
    return key_of("expert", base.id, backbone.facts(), task.name, data, head, asdict(recipe), seed)


def _train_all(jobs: Sequence[Job], cache: Cache, workers: int) -> None:
    names, steps = [job.task.name for job in jobs], jobs[0].recipe.steps
    with Progress(f"fine-tuning {len(jobs)} experts", steps * len(jobs), ", ".join(names)) as progress:
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
                progress.wait(0.2)
                progress.at(ticks.value)
            for future in waiting:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(ticks, cache: Cache) -> None:
    """Runs once in a worker process: one thread, and a silent death on Ctrl-C."""
    global _TICKS, _CACHE
    _TICKS, _CACHE = ticks, cache
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)


def _work(job: Job) -> None:
    def tick() -> None:
        with _TICKS.get_lock():
            _TICKS.value += 1

    _CACHE.tensors(job.key, lambda: train_expert(job, tick))
