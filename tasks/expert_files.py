"""Fine-tunes experts into a folder, one file per task or one for all, with provenance; resumable at any moment."""

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from merging.backbones.base import Backbone
from merging.checkpoints import Checkpoint, SafetensorsFile, Spec
from merging.checkpoints.lora import CONFIG, WEIGHTS
from merging.checkpoints.safetensors_file import write_safetensors
from merging.errors import UserError
from merging.files import write_text
from tasks.engine import Engine
from tasks.evaluate import outcome
from tasks.multitask import TASKS, Together
from tasks.progress import Progress
from tasks.recipes import Recipe
from tasks.task import Task, head_id
from tasks.training import HEAD, Job, State, Training

SNAPSHOTS = 6  # in sizes of an expert: weights and two moments, the old one and the new
FREE = ("recipe.accumulate", "precision", "torch")  # noted, but no reason to call an expert another one
HASHES = {"base": "another base", "train": "other training samples", "head": "another zero-shot head"}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Made:
    """An expert on disk. `before` and `after`: accuracy on validation of base and expert; fresh: made just now."""

    task: str
    path: Path
    before: float
    after: float
    fresh: bool


@dataclass(frozen=True)
class Bench:
    """Where and how experts are made. every: seconds between two snapshots; redo: make an expert again."""

    base: Checkpoint  # an image tower
    backbone: Backbone
    recipe: Recipe
    seed: int
    folder: Path
    engine: Engine
    family: str = "folder"  # what rows will call the experts
    every: float = 300.0
    redo: bool = False

    def path(self, name: str) -> Path:
        """The file of a task's expert; of an adapter it is in a folder, as peft has it."""
        return self.folder / (f"{name}.safetensors" if self.recipe.adapter is None else f"{name}/{WEIGHTS}")

    def unfinished(self, name: str) -> Path:
        """The snapshot of a task's training, removed when its expert is written."""
        return self.folder / ".training" / f"{name}.safetensors"

    @cached_property
    def _state(self) -> State:
        return {key: self.base.tensor(key).float() for key in self.base.specs()}

    def facts(self, name: str, recipe: Recipe) -> dict[str, Any]:
        """What decides an expert and is known before a sample is read."""
        options = {f"recipe.{key}": value for key, value in asdict(recipe).items()}
        options |= {f"backbone.{key}": value for key, value in self.backbone.identity().items()}
        return {**options, "task": name, "seed": self.seed, "backbone": self.backbone.name, "base": self.base.id,
                "precision": self.engine.precision, "torch": torch.__version__}  # fmt: skip

    def check(self, name: str) -> None:
        """Raises UserError where an expert lies that was made in another way, seen from its header."""
        facts = self.facts(name, self.recipe)
        if self.recipe.for_samples(1) is not self.recipe:  # epochs: the steps are not known yet
            facts = {key: value for key, value in facts.items() if key not in ("recipe.steps", "recipe.epochs")}
        if not self.redo and self.path(name).exists():
            check_same(self.path(name), SafetensorsFile(self.path(name)).metadata, facts)

    def check_space(self, names: Sequence[str]) -> None:
        """Raises UserError unless the disk has room for the experts that are missing and for two snapshots."""
        missing = [name for name in names if self.redo or not self.path(name).exists()]
        size = sum(4 * spec.shape.numel() for spec in self.base.specs().values())
        needed, free = size * (len(missing) + SNAPSHOTS) if missing else 0, shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"{len(missing)} experts and a snapshot of the training need {needed / 1e9:.1f} GB in {self.folder}, "
                f"where {free / 1e9:.1f} GB are free. Free some space or name another folder=<folder>."
            )

    def for_tasks(self, count: int) -> "Bench":
        """The bench for one model of that many tasks."""
        return replace(self, recipe=self.recipe.for_tasks(count))

    def make(self, task: Task | Together) -> Made:
        """The expert, from its file, or trained now, going on where a killed run was.

        Raises UserError for no training samples, for a file or a snapshot made in another way, and as Training.
        """
        split = task.split("train")
        if len(split) == 0:
            raise UserError(f"{task.name} has no training samples. Give it some, or leave it out of suite.tasks.")
        recipe, path = self.recipe.for_samples(len(split)), self.path(task.name)
        together = {TASKS: [one.name for one in task.tasks]} if isinstance(task, Together) else {}
        facts = {**self.facts(task.name, recipe), **together, "train": split.id, "head": head_id(task)}
        if path.exists() and not self.redo:
            stored = SafetensorsFile(path).metadata
            check_same(path, stored, facts)
            self.unfinished(task.name).unlink(missing_ok=True)  # a kill may have left it behind
            return Made(task.name, path, *json.loads(stored["val"]), fresh=False)
        job = Job(self._state, self.backbone, task, recipe, self.seed, split, "")
        return self._train(job, facts)

    def _resumed(self, training: Training, facts: Mapping[str, Any]) -> float:
        """Go on from a snapshot of the same training, if there is one; the score on validation before all training.

        Raises UserError for the snapshot of another one, unless with redo.
        """
        path = self.unfinished(training.job.task.name)
        if path.exists():
            snapshot = SafetensorsFile(path)
            if not self.redo:
                check_same(path, snapshot.metadata, facts)
            if not differing(snapshot.metadata, facts):
                stored = {key: snapshot.tensor(key) for key in snapshot.specs()}
                training.resume(int(snapshot.metadata["step"]), stored)
                return json.loads(snapshot.metadata["before"])
        return self._score(training)

    def _train(self, job: Job, facts: Mapping[str, Any]) -> Made:
        name, training = job.task.name, Training(job, self.engine)
        before = self._resumed(training, facts)
        self._steps(training, facts, before, f"{len(job.split)} samples, {100 * before:.1f} % right on val before")
        after = self._score(training)
        metadata = {"family": self.family, "made": json.dumps(facts), "val": json.dumps([before, after])}
        _write(self.path(name), training.weights(), metadata)
        if job.recipe.adapter is not None:
            write_text(
                self.path(name).with_name(CONFIG), json.dumps(job.recipe.adapter.config() | {"modules_to_save": [HEAD]})
            )
        self.unfinished(name).unlink(missing_ok=True)
        log.info("%s: %.1f %% -> %.1f %% on val, %s", name, 100 * before, 100 * after, self.path(name))
        return Made(name, self.path(name), before, after, fresh=True)

    def _steps(self, training: Training, facts: Mapping[str, Any], before: float, detail: str) -> None:
        """Train to the end, with a snapshot from time to time and one at the end."""
        name, steps = training.job.task.name, training.job.recipe.steps
        resumed, written = training.step, time.monotonic()
        if resumed:
            detail = f"going on behind step {resumed}, {detail}"

        def note() -> None:
            nonlocal written
            progress.advance()
            if time.monotonic() - written >= self.every or training.step == steps:
                metadata = {"made": json.dumps(facts), "before": json.dumps(before), "step": str(training.step)}
                _write(self.unfinished(name), training.snapshot(), metadata)
                written = time.monotonic()

        what = f"fine-tuning on {name}, {steps} steps of {training.job.recipe.batch}"
        with Progress(what, steps, detail) as progress:
            progress.at(resumed)
            training.run(note)

    def _score(self, training: Training) -> float:
        """The score on validation, mean over tasks."""
        task, tower = training.job.task, training.tower.eval()
        tasks = task.tasks if isinstance(task, Together) else (task,)
        try:
            return fmean(outcome(tower, self.backbone, task, "val", self.engine).score.value for task in tasks)
        finally:
            tower.train()


def check_same(path: Path, metadata: Mapping[str, str], facts: Mapping[str, Any]) -> None:
    """Raises UserError naming the option, where a file was made with another value of one of the facts."""
    if "made" not in metadata:
        raise UserError(
            f"{path} is there already and was not made by duet-finetune. Choose another folder=<folder>, or overwrite "
            f"it with redo=true."
        )
    for key, (before, now) in differing(metadata, facts).items():
        raise UserError(
            f"{path} is there already, made with {HASHES.get(key) or f'{key}={before}, now {now}'}. Repeat that, "
            f"choose another folder=<folder>, or make it again with redo=true."
        )


def differing(metadata: Mapping[str, str], facts: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The facts that were others when a file was made: then and now."""
    facts = json.loads(json.dumps(facts))
    unsaid = ("backbone.", "recipe.head_lr", "recipe.group_by_length", "recipe.adapter")  # older files do not say
    stored = {key: facts[key] for key in facts if key.startswith(unsaid)}
    stored |= json.loads(metadata["made"])
    return {key: (stored.get(key), facts[key]) for key in facts if key not in FREE and stored.get(key) != facts[key]}


def _write(path: Path, tensors: State, metadata: Mapping[str, str]) -> None:
    specs = {key: Spec(tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
    write_safetensors(path, specs, tensors.items(), metadata)
