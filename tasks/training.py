"""One expert in the making: a base tuned on one task, or on all, with a frozen head or with one that learns too."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from merging.backbones.base import Backbone
from merging.checkpoints.tied import filled
from merging.errors import UserError
from merging.ops import generator
from tasks.adapters import in_files
from tasks.answers import answer_losses, asked
from tasks.engine import Engine, ahead
from tasks.multitask import Mixture, Together
from tasks.recipes import Recipe
from tasks.split import Inputs, Split, mapped, take
from tasks.task import Task

State = dict[str, Tensor]
ON_CPU = Engine("cpu")
WEIGHTS = "weights"  # before the names of the tower's parameters in a snapshot; the optimizer's are beside them
ALIKE = 16  # batches whose samples are put in order together
HEAD = "classifier"  # before the names of the parameters of a head that was trained with the tower


@dataclass(frozen=True)
class Job:
    """One expert to make; picklable, so that a worker process can."""

    base: State  # floating parameters of the tower
    backbone: Backbone
    task: Task | Together
    recipe: Recipe
    seed: int
    split: Split | Mixture  # training samples
    key: str  # the content of base, data, head and recipe
    precision: Literal["fp32", "bf16"] = "fp32"  # of the forward pass where a worker process trains on a CPU


class Training:
    """A tower, its optimizer and the number of steps done. Weights and optimizer are fp32 under any precision.

    On a CPU it repeats bitwise for a given job and thread count, also when it goes on from a snapshot.
    """

    def __init__(self, job: Job, engine: Engine = ON_CPU):
        torch.manual_seed(job.seed)
        self.job, self.engine, self.step = job, engine, 0
        tower = job.backbone.build().train()
        tower.load_state_dict(filled(job.base, tower))
        self.tower = engine.ready(tower)
        self.head = self._head().to(engine.torch_device)
        self._trained = nn.ModuleDict({HEAD: self.head} if job.recipe.head_lr is not None else {})
        body, head = job.recipe.tuned(self.tower), list(self._trained.parameters())
        self.tower.to(engine.torch_device)  # an adapter's factors too
        named = [*self.tower.named_parameters(), *self._trained.named_parameters()]
        self._names: dict[Tensor, str] = {parameter: in_files(name) for name, parameter in named}
        self._parameters, self._optimizer = [*body, *head], job.recipe.stepper(body, head)
        self._owners = job.task.owners().to(engine.torch_device) if isinstance(job.task, Together) else None

    def _head(self) -> nn.Module:
        """The task's own, a new one to train, or nothing where the model itself answers."""
        if self.job.recipe.head_lr is not None:
            return self._new_head()
        return nn.Identity() if asked(self.job.task) else head_of(self.job.task)

    @torch.no_grad()
    def _new_head(self) -> nn.Linear:
        """A linear head of zeros, with an output for every class, or one for numbers."""
        inputs, _ = self.job.split.take(torch.tensor([0]))
        inputs = mapped(lambda tensor: tensor.to(self.engine.torch_device), inputs)
        width = self.job.backbone.features(self.tower, self.job.backbone.prepare(inputs)).shape[-1]
        head = nn.Linear(width, max(1, len(self.job.task.classes)))  # type: ignore[union-attr]
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return head

    def run(self, on_step: Callable[[], object] = lambda: None) -> None:
        """All steps that are left. Raises UserError where the GPU's memory is too small."""
        recipe = self.job.recipe
        try:
            for inputs, labels in self._batches():
                self._learn(inputs, labels)
                self.step += 1
                on_step()
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(
                f"A batch of {recipe.batch} samples in {recipe.accumulate} pieces does not fit into the memory of "
                f"{self.engine.torch_device}. Cut it into more, with the same result: recipe.accumulate="
                f"{2 * recipe.accumulate}."
            ) from error

    def _learn(self, inputs: Inputs, labels: Tensor) -> None:
        """One step on a batch, piece by piece; every sample has the same weight."""
        recipe = self.job.recipe
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.rate(self.step) * group["share"]
        self._optimizer.zero_grad(set_to_none=True)
        for some in torch.arange(len(labels)).chunk(recipe.accumulate):
            (self._loss(take(inputs, some), labels[some]) * (len(some) / len(labels))).backward()
        if recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, recipe.clip)
        self._optimizer.step()

    def _loss(self, inputs: Inputs, truth: Tensor) -> Tensor:
        """Mean over samples."""
        backbone, task = self.job.backbone, self.job.task
        with self.engine.running():
            if asked(task):
                return answer_losses(backbone, self.tower, *task.told(inputs, truth)).mean()  # type: ignore[union-attr]
            features = backbone.features(self.tower, backbone.prepare(inputs))
        logits = self.head(features.float())
        if self._owners is not None:  # a sample chooses among its own task's classes
            logits = logits.masked_fill(self._owners != self._owners[truth][:, None], -torch.inf)
        return loss(logits, truth)

    def _batches(self) -> Iterator[tuple[Inputs, Tensor]]:
        """Inputs and labels of the steps that are left; a GPU's next batch is read while it works."""
        job, device = self.job, self.engine.torch_device
        chosen = order(job.split.sizes, job.recipe, generator("finetune", job.seed, job.task.name), self.step)
        if device.type == "cpu":
            yield from map(job.split.take, chosen)
            return
        pinned = lambda some: [mapped(Tensor.pin_memory, part) for part in job.split.take(some)]  # noqa: E731
        for batch in ahead(pinned, chosen):
            inputs, labels = (mapped(lambda tensor: tensor.to(device, non_blocking=True), part) for part in batch)
            yield inputs, labels  # type: ignore[misc]

    def weights(self) -> State:
        """A copy of the tower, or of its adapter, and of a head that was trained with it, fp32, on the CPU.

        Raises UserError naming a parameter that is not finite.
        """
        tower = {in_files(key): value for key, value in self.tower.state_dict().items()}
        of = self.job.base if self.job.recipe.adapter is None else map(self._names.__getitem__, self._parameters)
        both = {key: tower[key] for key in of if key in tower} | self._trained.state_dict()
        state = {key: value.detach().cpu().clone() for key, value in both.items()}
        for key, value in state.items():
            if not value.isfinite().all():
                raise UserError(
                    f"Training on {self.job.task.name} diverged: {key} is NaN or Inf after step {self.step}. "
                    f"Lower recipe.lr, or clip gradients (recipe.clip=1.0)."
                )
        return state

    def snapshot(self) -> State:
        """All that `resume` needs but the step."""
        state = {f"{WEIGHTS}/{key}": value for key, value in self.weights().items()}
        for parameter, slots in self._optimizer.state.items():
            state |= {f"{slot}/{self._names[parameter]}": value.detach().cpu() for slot, value in slots.items()}
        return state

    def resume(self, step: int, stored: Mapping[str, Tensor]) -> None:
        """Go on from a snapshot taken after `step` steps of the same job."""
        slots: dict[str, dict[str, Tensor]] = {}
        for key, value in stored.items():
            slot, _, name = key.partition("/")
            slots.setdefault(name, {})[slot] = value.clone()
        weights = {name: tensors.pop(WEIGHTS) for name, tensors in slots.items()}
        self._trained.load_state_dict({name: weights.pop(name) for name in self._trained.state_dict()})
        for key, value in self.tower.state_dict().items():
            if (stored_value := weights.get(in_files(key))) is not None:
                value.copy_(stored_value)
        state: dict[str, Any] = self._optimizer.state_dict()
        names = [self._names[parameter] for parameter in self._parameters]
        state["state"] = {index: slots[name] for index, name in enumerate(names) if slots[name]}
        self._optimizer.load_state_dict(state)
        self.step = step


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of classes [N], mean squared error of numbers [N]."""
    if labels.is_floating_point():
        return functional.mse_loss(outputs.reshape(len(labels)), labels)
    return functional.cross_entropy(outputs, labels)


def head_of(task: Task | Together) -> nn.Module:
    """The head of a task. Raises UserError for one without."""
    head = task.head()
    if head is None:
        raise UserError(f"{task.name} has no head to train for. Give it one, such as the zero-shot head of its suite.")
    return head


def order(sizes: Sequence[int], recipe: Recipe, random: torch.Generator, start: int = 0) -> Iterator[Tensor]:
    """Indices [batch] of the samples of every step from `start` on, counted through all tasks.

    Of each task random passes over its samples, on end; of several tasks a sample each in turn, whatever their sizes.
    """
    firsts = accumulate(sizes, initial=0)
    alike = ALIKE * recipe.batch if recipe.group_by_length else 1
    streams = [passes(size, first, random, alike, recipe.batch) for size, first in zip(sizes, firsts, strict=False)]
    samples = chain.from_iterable(zip(*streams, strict=True))
    for step in range(recipe.steps):
        batch = torch.tensor(list(islice(samples, recipe.batch)))
        if step >= start:
            yield batch


def passes(size: int, first: int, random: torch.Generator, alike: int = 1, batch: int = 1) -> Iterator[int]:
    """`first` to `first + size - 1` in random order, and again without end.

    With alike, every so many of them are put in order and cut into batches, which come in random order.
    """
    while True:
        indices = first + torch.randperm(size, generator=random)
        if alike > 1:
            batches = [some for many in indices.split(alike) for some in many.sort().values.split(batch)]
            indices = torch.cat([batches[i] for i in torch.randperm(len(batches), generator=random).tolist()])
        yield from indices.tolist()
