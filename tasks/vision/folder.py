"""A user's own experts, or local copies of any others: files by a template path."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from merging.backbones.tower import Backbone
from merging.cache import Cache
from merging.checkpoints import Checkpoint, SafetensorsFile
from merging.checkpoints.key_maps import from_hugging_face, to_hugging_face
from merging.checkpoints.lora import CONFIG, open_lora
from merging.checkpoints.opening import open_file
from merging.errors import UserError
from merging.experts import Experts
from merging.preflight import some
from tasks.heads.text import OwnText, TextHead
from tasks.heads.text_towers import has_text_tower, left_out
from tasks.multitask import TASKS
from tasks.suite import Suite, unread
from tasks.task import LabelledTask
from tasks.vision.catalogue import base_model, weights
from tasks.vision.families import as_encoder, open_base, there_is, with_projection
from tasks.vision.fitting import assembled
from tasks.vision.hub import Wanted
from tasks.vision.reading import in_open_clip

OPENAI = "openai"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Folder:
    """Local experts: safetensors or pickles (read inertly) whatever their ending, Hugging Face and LoRA folders.

    experts: template path with {task}, for the tasks that `paths` does not name one by one. base: a path, or openai
    for the published base of the backbone. family: what rows call these experts; a file that names another family in
    its metadata is refused, and so are experts of different layouts in one merge: they were not made the same way.
    heads: who reads the class names, the suite's text tower or the one in each expert's own file.
    multitask: path of one model trained on all tasks, for method=multitask.
    """

    base: str
    experts: str | None = None
    paths: Mapping[str, str] = field(default_factory=dict)
    family: str = "folder"
    qkv: Literal["fused", "separate"] = "fused"
    text: bool = False
    heads: Literal["suite", "expert"] = "suite"
    multitask: str | None = None
    remarks = ()

    def wanted(self, suite: Suite, backbone: Backbone) -> list[Wanted]:
        """The base, if it comes from the Hub. Raises UserError naming every file that is not there."""
        if others := unread("experts.paths", self.paths, [task.name for task in suite.every]):
            log.info("experts.paths: no task reads %s", some(others))
        base = [] if self.base == OPENAI else [("the base", self._base)]
        found = [*base, *self._found(suite).items()]
        if missing := {who: path for who, path in found if not path.exists()}:
            listed = some([f"{path} ({who})" for who, path in missing.items()], 10)
            first = next(iter(missing.values()))
            raise UserError(
                f"There is no {listed}. {first.parent}: {there_is(first.parent)} Correct experts.experts or "
                f"experts.base, or name the file: +experts.paths.<task>=<path>."
            )
        return [base_model(backbone)] if self.base == OPENAI else []

    def open(self, suite: Suite, backbone: Backbone, cache: Cache) -> Experts:
        """Raises UserError for what is missing, of another family or layout, or does not fit the backbone."""
        base, whole = self._whole(suite, backbone, cache)
        told = {task: self._told(each, base, cache) for task, each in whole.items()}
        experts = [as_encoder(each, self.text, told[task]) for task, each in whole.items()]
        return assembled(as_encoder(base, self.text), experts, suite, backbone, cache, self.qkv, self.text)

    def _told(self, expert: Checkpoint, base: Checkpoint, cache: Cache) -> tuple[str, ...]:
        """What is to be said of the text tower of an expert."""
        return left_out(expert, base, cache) if self.heads == "suite" else ("its own text tower reads the class names",)

    def headed(self, suite: Suite, backbone: Backbone, cache: Cache) -> Suite:
        """The suite with the heads that `heads` names.

        Raises UserError for an expert without a text tower, and for tasks whose heads no text tower makes.
        """
        if self.heads == "suite":
            return suite
        _, whole = self._whole(suite, backbone, cache)
        tasks = []
        for task in suite.tasks:
            if not has_text_tower(whole[task.name]):
                raise UserError(
                    f"experts.heads=expert takes the text tower of every expert, and {whole[task.name].name} of "
                    f"{task.name} has none. Choose experts.heads=suite, or name the file of the whole CLIP."
                )
            if not isinstance(task, LabelledTask) or not isinstance(task.heads, TextHead):
                raise UserError(
                    f"experts.heads=expert needs tasks whose class names are read by a text tower, and the head of "
                    f"{task.name} in suite={suite.name} is given. Choose experts.heads=suite."
                )
            tasks.append(replace(task, heads=replace(task.heads, text=OwnText(whole[task.name]))))
        return replace(suite, tasks=tuple(tasks))

    def _whole(self, suite: Suite, backbone: Backbone, cache: Cache) -> tuple[Checkpoint, dict[str, Checkpoint]]:
        """The base, and by task the experts, with all that their files hold, in open_clip's names."""
        self.wanted(suite, backbone)
        found = self._found(suite)
        base = open_base(backbone, cache) if self.base == OPENAI else self._opened(self._base, cache)[0]
        opened = {task: self._opened(path, cache, base) for task, path in found.items()}
        layouts = {layout: task for task, (_, layout) in opened.items()}
        if len(layouts) > 1:
            told = ", ".join(f"{task} {layout}" for layout, task in layouts.items())
            raise UserError(
                f"These experts are of different families, by the layouts of their files: {told}. They were not tuned "
                f"in the same way from the same base, and a merge of both would be compared with neither. Take all "
                f"from one family."
            )
        return base, {task: checkpoint for task, (checkpoint, _) in opened.items()}

    @property
    def _base(self) -> Path:
        return Path(self.base).expanduser()

    def open_multitask(self, suite: Suite, backbone: Backbone, cache: Cache) -> Checkpoint:
        """Raises UserError where it is missing, was trained on other tasks, or as `open`."""
        if self.multitask is None or not Path(self.multitask).expanduser().exists():
            raise UserError(
                f"There is no {self.multitask or 'experts.multitask'}, the model trained on all tasks together. Train "
                f"it: duet-finetune multitask=true; or name it: experts.multitask=<path>."
            )
        one = Suite(suite.name, suite.tasks[:1])
        alone = replace(self, experts=None, paths={one.names[0]: self.multitask})
        (trained,) = alone.open(one, backbone, cache).checkpoints
        file = open_file(file_in(Path(self.multitask).expanduser()), cache)
        made = json.loads(file.metadata.get("made", "{}")) if isinstance(file, SafetensorsFile) else {}
        if sorted(made.get(TASKS, suite.names)) != sorted(suite.names):
            raise UserError(
                f"{self.multitask} was trained on {', '.join(made[TASKS])}, and the merged tasks are "
                f"{', '.join(suite.names)}. Train one on these: duet-finetune multitask=true folder=<another>."
            )
        return trained

    def _found(self, suite: Suite) -> dict[str, Path]:
        """Paths by task."""
        found = {}
        for task in suite.names:
            if task not in self.paths and (self.experts is None or "{task}" not in self.experts):
                raise UserError(
                    f"experts.experts={self.experts} does not say where the expert for {task} is. Write {{task}} where "
                    f"its name stands, as in experts.experts=checkpoints/{{task}}.safetensors."
                )
            path = self.paths.get(task) or str(self.experts).replace("{task}", task)
            found[task] = Path(path).expanduser()
        return found

    def _opened(self, path: Path, cache: Cache, base: Checkpoint | None = None) -> tuple[Checkpoint, str]:
        """A checkpoint in open_clip's names, and the layout it had. `base` lends what the file lacks."""
        if path.is_dir() and (path / CONFIG).exists():
            if base is None:
                raise UserError(
                    f"{path} is an adapter, which cannot be the base. Name the model that it was tuned from."
                )
            return from_hugging_face(open_lora(to_hugging_face(base), path, cache)), "lora"
        file = open_file(file_in(path), cache)
        self._check_family(file)
        checkpoint, layout = in_open_clip(file)
        if layout == "hugging_face" and base is not None:
            checkpoint = with_projection(checkpoint, base)
        return checkpoint, layout

    def _check_family(self, checkpoint: Checkpoint) -> None:
        named = checkpoint.metadata.get("family") if isinstance(checkpoint, SafetensorsFile) else None
        if named not in (None, self.family):
            raise UserError(
                f"{checkpoint.name} is of the family {named}, and this merge is of {self.family}. Families are not "
                f"mixed: take all experts and the base from one, and say experts.family={named}."
            )


def file_in(path: Path) -> Path:
    """The weight file of a Hugging Face folder; a file is itself."""
    if not path.is_dir():
        return path
    names = [*weights(), *(f"{name}.index.json" for name in weights())]  # the latter of what is in several files
    found = next((path / name for name in names if (path / name).exists()), None)
    if found is None:
        raise UserError(f"{path} has none of {', '.join(weights())} and no {CONFIG}. {there_is(path)} Name the file.")
    return found
