"""The facts of the published families of experts (families.yaml) as types."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from merging.backbones.base import Backbone
from merging.errors import UserError
from merging.preflight import some
from tasks.vision.hub import Wanted

FACTS = Path(__file__).with_name("families.yaml")


@dataclass(frozen=True)
class Family:
    """One family. Templates know {hub}, {folder} (how it spells the backbone), {task} and {suffix}."""

    name: str
    about: str
    backbones: Sequence[str]
    tasks: Sequence[str]
    repo: str | None = None  # of each expert, or of all
    adapter: bool = False  # LoRA instead of whole towers
    below: str = ""  # the folder in the repository
    pretrained: Sequence[str] = ()  # where the base may lie, below a local root or the repository
    expert: str = ""
    openai: bool = False  # whether openai's own file can be the base
    spelling: Mapping[str, str] = field(default_factory=dict)  # of the folders of some backbones
    source: str = ""  # where to download what is not on the Hub
    remarks: Mapping[str, str] = field(default_factory=dict)  # task -> what every table must say

    def check(self, backbone: Backbone, tasks: Sequence[str]) -> None:
        """Raises UserError, listing what there is, unless the family has these tasks for this backbone."""
        if backbone.name not in self.backbones:
            has = ", ".join(self.backbones)
            raise UserError(f"The family {self.name} has no experts for backbone={backbone.name}. It has: {has}.")
        if missing := [task for task in tasks if task not in self.tasks]:
            raise UserError(
                f"The family {self.name} has no expert for {some(missing)}. It has: {', '.join(self.tasks)}. Name "
                f"those, as in suite.tasks=[{','.join(self.tasks[:2])}], or choose another family (experts=folder for "
                f"your own)."
            )

    def repository(self, backbone: Backbone, task: str) -> str:
        """The repository of one expert."""
        return str(self.repo).format(hub=_published(backbone)["hub"], suffix=read()["tasks"].get(task, ""))

    def folders(self, backbone: Backbone) -> list[str]:
        """How its folders may be spelt, its own way first."""
        usual = _published(backbone)["folder"]
        return list(dict.fromkeys((self.spelling.get(backbone.name, usual), usual)))

    def files(self, backbone: Backbone, tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Where the base and each task's expert may lie; the copies of the base beside all experts are the same."""
        folders = self.folders(backbone)
        base = [
            path.format(folder=folder, task=task) for folder in folders for path in self.pretrained for task in tasks
        ]
        paths = {task: tuple(self.expert.format(folder=folder, task=task) for folder in folders) for task in tasks}
        experts = {f"the expert for {task}": places for task, places in paths.items()}
        return {"the base": tuple(dict.fromkeys(base)), **experts}


@cache
def read() -> Mapping[str, Any]:
    """families.yaml."""
    return yaml.safe_load(FACTS.read_text("utf-8"))


def family(name: str) -> Family:
    """Raises UserError, listing those there are, for an unknown name."""
    families = read()["families"]
    if name not in families:
        raise UserError(
            f"experts.family={name} is no published family. There are: {', '.join(families)}; for your own choose "
            f"experts=folder."
        )
    return Family(**{"name": name, "tasks": tuple(read()["tasks"]), **families[name]})


def base_model(backbone: Backbone, revision: str | None = None) -> Wanted:
    """The pretrained CLIP of a published backbone. Raises UserError for another backbone."""
    return Wanted(_published(backbone)["openai"], weights(), revision)


def weights() -> tuple[str, ...]:
    """The names that a weight file may have in a repository."""
    return tuple(read()["weights"])


def _published(backbone: Backbone) -> Mapping[str, str]:
    known = read()["backbones"]
    if backbone.name not in known:
        raise UserError(f"backbone={backbone.name} has no published base. Those that have: {', '.join(known)}.")
    return known[backbone.name]
