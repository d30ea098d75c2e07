"""A user's own experts, or local copies of any others: files by a template path."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from merging.backbones.base import Backbone
from merging.backbones.hugging_face import head_of
from merging.backbones.open_clip import PREFIX
from merging.cache import Cache
from merging.checkpoints import Checkpoint, SafetensorsFile
from merging.checkpoints.key_maps import from_hugging_face, to_hugging_face
from merging.checkpoints.lora import CONFIG, open_lora
from merging.checkpoints.opening import open_file, weights_in
from merging.checkpoints.views import below, completed
from merging.errors import UserError
from merging.experts import Experts
from merging.identity import WHERE
from merging.owned import HEADS as HEADS_ALONE
from merging.preflight import some
from tasks.heads.head import Given, HeadSource, check_class_orders, classes_in
from tasks.heads.probe import Probe
from tasks.heads.text import OwnText, TextHead
from tasks.heads.text_towers import has_text_tower, left_out
from tasks.hub import HubFile
from tasks.multitask import TASKS
from tasks.suite import Suite, unread
from tasks.task import LabelledTask
from tasks.vision.families import EncoderFamily, HubFamily, base_model, open_base, weight_names
from tasks.vision.fitting import (
    as_encoder,
    assembled,
    check_tables,
    check_tower,
    is_clip,
    there_is,
    tower_shapes,
    with_projection,
    with_tables,
)
from tasks.vision.reading import in_module, in_open_clip

OPENAI = "openai"
HEADS = ("suite", "expert", "probe")
log = logging.getLogger(__name__)


class Opened(NamedTuple):
    """One file: the model under the backbone's names, what lies beside it (a head), where it is, and its layout."""

    model: Checkpoint
    beside: Checkpoint | None
    path: Path
    layout: str


@dataclass(frozen=True)
class Folder:
    """Local experts: safetensors or pickles (read inertly) whatever their ending, Hugging Face and LoRA folders.

    experts: template path with {task}, for the tasks that `paths` does not name one by one. base: a path, or openai
    for the published base of the backbone. family: what rows call these experts; a file that names another family in
    its metadata is refused, and so are experts of different layouts in one merge: they were not made the same way.
    heads: suite (the class names, read by the suite's text tower), expert (the classifier or the text tower in each
    expert's own file), probe (fitted on the features of each expert's train split), or a template path of classifiers.
    multitask: path of one model trained on all tasks, for method=multitask. owned: see merging.owned. vocabulary:
    where tokens differ, see checkpoints.vocabulary; the backbone tells how many there may be. other_base: whether
    adapters may name another base than this one.
    """

    base: str = field(metadata=WHERE)
    experts: str | None = field(default=None, metadata=WHERE)
    paths: Mapping[str, str] = field(default_factory=dict, metadata=WHERE)
    family: str = "folder"
    qkv: Literal["fused", "separate"] = "fused"
    text: bool = False
    heads: str = "suite"
    owned: str = HEADS_ALONE
    vocabulary: str = "same"
    other_base: bool = field(default=False, metadata=WHERE)
    multitask: str | None = field(default=None, metadata=WHERE)
    remarks = ()

    def downloads(self, suite: Suite, backbone: Backbone) -> list[HubFile]:
        """The base, if it comes from the Hub. Raises UserError naming every file that is not there."""
        if others := unread("experts.paths", self.paths, [task.name for task in suite.every]):
            log.info("experts.paths: no task reads %s", some(others))
        files = {**({} if self.base == OPENAI else {"the base": self._base}), **self._paths(suite)}
        if missing := {who: path for who, path in files.items() if not path.exists()}:
            listed = some([f"{path} ({who})" for who, path in missing.items()], 10)
            first = next(iter(missing.values()))
            raise UserError(
                f"There is no {listed}. {first.parent}: {there_is(first.parent)} Correct experts.experts or "
                f"experts.base, or name the file: +experts.paths.<task>=<path>."
            )
        return [base_model(backbone)] if self.base == OPENAI else []

    def open(self, suite: Suite, backbone: Backbone, cache: Cache) -> Experts:
        """Raises UserError for what is missing, of another family or layout, or does not fit the backbone."""
        return replace(self._experts(suite, backbone, cache), owned=self.owned)

    def _experts(self, suite: Suite, backbone: Backbone, cache: Cache) -> Experts:
        base, opened = self._opened_all(suite, backbone, cache)
        if not is_clip(backbone):
            shapes = tower_shapes(backbone)
            check_tower(base.model, shapes, backbone)
            for file in opened.values():
                check_tower(file.model, with_tables(shapes, file.model), backbone)
            whole = [file.model if file.beside is None else completed(file.model, file.beside, [*file.beside.specs()])
                     for file in opened.values()]  # fmt: skip
            experts = Experts.open(base.model, whole, suite.names, cache, self.vocabulary, table=backbone.table)
            check_tables(experts.origin, shapes, backbone)
            return experts
        towers = [as_encoder(expert.model, self.text, self._notes(expert, base, cache)) for expert in opened.values()]
        return assembled(as_encoder(base.model, self.text), towers, suite, backbone, cache, self.qkv, self.text)

    def _notes(self, expert: Opened, base: Opened, cache: Cache) -> tuple[str, ...]:
        """What is to be said of the text tower of an expert."""
        if self.heads == "expert" and has_text_tower(expert.model):
            return ("its own text tower reads the class names",)
        return left_out(expert.model, base.model, cache)

    def headed(self, suite: Suite, backbone: Backbone, cache: Cache) -> Suite:
        """The suite with the heads that `heads` names; held-out tasks that have one keep it.

        Raises UserError for an expert without a head, for a head whose classes are in another order than the labels,
        and for tasks whose head cannot be exchanged.
        """
        if self.heads == "suite":
            return suite
        lacking = [task for task in suite.held_out if getattr(task, "heads", None) is None]
        whole = Suite(suite.name, (*suite.tasks, *lacking))
        opened = self._opened_all(whole, backbone, cache)[1] if self.heads in HEADS else self._classifiers(whole, cache)
        heads = {task.name: self._head(task, opened[task.name], backbone, cache) for task in whole.tasks}
        names = {task: classes_in(file.path) for task, file in opened.items()}
        check_class_orders(names, {task.name: task.classes for task in whole.tasks})
        tasks, held_out = (
            tuple(replace(task, heads=heads[task.name]) if task.name in heads else task for task in some)  # type: ignore[type-var]
            for some in (suite.tasks, suite.held_out)
        )
        return replace(suite, tasks=tasks, held_out=held_out)

    def _classifiers(self, suite: Suite, cache: Cache) -> dict[str, Opened]:
        """Heads in files of their own. Raises UserError where `heads` is neither a known word nor a template."""
        if "{task}" not in self.heads:
            raise UserError(
                f"experts.heads={self.heads} is unknown. Choose one of {', '.join(HEADS)}, or name files of heads by a "
                f"path with {{task}} in it."
            )
        paths = {task: Path(self.heads.replace("{task}", task)).expanduser() for task in suite.names}
        files = {task: open_file(file_in(path), cache) for task, path in paths.items()}
        return {task: Opened(file, file, paths[task], "head") for task, file in files.items()}

    def _head(self, task: Any, expert: Opened, backbone: Backbone, cache: Cache) -> HeadSource:
        if not isinstance(task, LabelledTask):
            raise UserError(
                f"experts.heads={self.heads}: the head of {task.name} is given. Choose experts.heads=suite."
            )
        if self.heads == "probe":
            return Probe(expert.model, backbone, task.data, cache)
        if expert.beside is not None and expert.beside.specs():
            return Given(head_of({key: expert.beside.tensor(key).float() for key in expert.beside.specs()}))
        if not has_text_tower(expert.model):
            raise UserError(
                f"experts.heads=expert takes the classifier or the text tower of every expert, and {expert.model.name} "
                f"of {task.name} has none. Choose experts.heads=suite or probe, or name the file of the whole model."
            )
        if not isinstance(task.heads, TextHead):
            raise UserError(
                f"experts.heads=expert needs tasks whose class names are read by a text tower, and the head of "
                f"{task.name} is given. Choose experts.heads=suite."
            )
        return replace(task.heads, text=OwnText(expert.model))

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

    @property
    def _base(self) -> Path:
        return Path(self.base).expanduser()

    def _paths(self, suite: Suite) -> dict[str, Path]:
        """The expert of every task."""
        paths = {}
        for task in suite.names:
            if task not in self.paths and (self.experts is None or "{task}" not in self.experts):
                raise UserError(
                    f"experts.experts={self.experts} does not say where the expert for {task} is. Write {{task}} where "
                    f"its name stands, as in experts.experts=checkpoints/{{task}}.safetensors."
                )
            paths[task] = Path(self.paths.get(task) or str(self.experts).replace("{task}", task)).expanduser()
        return paths

    def _opened_all(self, suite: Suite, backbone: Backbone, cache: Cache) -> tuple[Opened, dict[str, Opened]]:
        """The base, and by task the experts, with all that their files hold."""
        self.downloads(suite, backbone)
        if self.base == OPENAI:
            base = Opened(open_base(backbone, cache), None, self._base, OPENAI)
        else:
            base = self._opened(self._base, backbone, cache)
        opened = {task: self._opened(path, backbone, cache, base) for task, path in self._paths(suite).items()}
        layouts = {expert.layout: task for task, expert in opened.items()}
        if len(layouts) > 1:
            listed = ", ".join(f"{task} {layout}" for layout, task in layouts.items())
            raise UserError(
                f"These experts are of different families, by the layouts of their files: {listed}. They were not "
                f"tuned in the same way from the same base, and a merge of both would be compared with neither. Take "
                f"all from one family."
            )
        return base, opened

    def _opened(self, path: Path, backbone: Backbone, cache: Cache, base: Opened | None = None) -> Opened:
        """A file under the backbone's names. `base` lends what it lacks."""
        if path.is_dir() and (path / CONFIG).exists():
            if base is None:
                raise UserError(
                    f"{path} is an adapter, which cannot be the base. Name the model that it was tuned from."
                )
            clip = is_clip(backbone)
            whole = open_lora(to_hugging_face(base.model) if clip else base.model, path, cache, self.other_base)
            return Opened(from_hugging_face(whole) if clip else whole, None, path, "lora")
        file = open_file(file_in(path), cache)
        named = file.metadata.get("family") if isinstance(file, SafetensorsFile) else None
        if named not in (None, self.family):
            raise UserError(
                f"{file.name} is of the family {named}, and this merge is of {self.family}. Families are not mixed: "
                f"take all experts and the base from one, and say experts.family={named}."
            )
        if not is_clip(backbone):
            in_memory = getattr(backbone, "in_memory", str)
            return Opened(*in_module(file, tower_shapes(backbone), backbone.table, in_memory), path, "module")
        model, layout = in_open_clip(file)
        lends = layout == "hugging_face" and base is not None
        return Opened(with_projection(model, base.model) if lends else model, None, path, layout)  # type: ignore[union-attr]


def file_in(path: Path) -> Path:
    """The weight file of a Hugging Face folder; a file is itself."""
    if not (file := weights_in(path)).is_dir():
        return file
    raise UserError(f"{path} has none of {', '.join(weight_names())} and no {CONFIG}. {there_is(path)} Name the file.")


def pretrained(source: object, suite: Suite, backbone: Backbone, cache: Cache) -> Checkpoint:
    """The model that `experts=...` names as its base, of a CLIP the image tower; of published families OpenAI's.

    Raises UserError for what is missing or does not fit the backbone, and for sources that make their own experts.
    """
    if isinstance(source, Folder) and source.base != OPENAI:
        alone = replace(source, experts=None, paths=dict.fromkeys(suite.names, source.base))
        origin = alone.open(suite, backbone, cache).origin
        return below(origin, PREFIX) if is_clip(backbone) else origin
    if not isinstance(source, Folder | HubFamily | EncoderFamily):
        raise UserError(
            f"experts={getattr(source, 'family', type(source).__name__)} makes its own experts. Say what to start "
            f"from: experts=folder experts.base=<path of a CLIP>, or experts.base=openai."
        )
    base = open_base(backbone, cache, getattr(source, "base_revision", None))
    check_tower(base, tower_shapes(backbone), backbone)
    return below(base, PREFIX)
