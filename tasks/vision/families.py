"""Published CLIP experts: one dataclass per kind of source. What is known of each family is in families.yaml."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache as memoized
from pathlib import Path
from typing import Any, Literal

import yaml

from merging.backbones.base import Backbone
from merging.cache import Cache
from merging.checkpoints import Checkpoint
from merging.checkpoints.key_maps import from_hugging_face, from_image_encoder
from merging.checkpoints.lora import CONFIG, WEIGHTS, open_lora
from merging.checkpoints.opening import open_file
from merging.errors import UserError
from merging.experts import Experts
from merging.identity import WHERE
from merging.preflight import some
from tasks.hub import HubFile, fetch
from tasks.suite import Suite
from tasks.vision.fitting import as_encoder, assembled, there_is, with_projection

FACTS = Path(__file__).with_name("families.yaml")
BASE = "the base"


@dataclass(frozen=True)
class Family:
    """The facts of one family. Templates know {hub}, {folder} (how it spells the backbone), {task} and {suffix}."""

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

    def folders(self, backbone: Backbone) -> list[str]:
        """How its folders may be spelt, its own way first."""
        usual = _published(backbone)["folder"]
        return list(dict.fromkeys((self.spelling.get(backbone.name, usual), usual)))

    def paths(self, backbone: Backbone, tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Where the base and each task's expert may lie; the copies of the base beside all experts are the same."""
        folders = self.folders(backbone)
        base = [path.format(folder=folder, task=task)
                for folder in folders for path in self.pretrained for task in tasks]  # fmt: skip
        experts = {task: tuple(self.expert.format(folder=folder, task=task) for folder in folders) for task in tasks}
        return {BASE: tuple(dict.fromkeys(base)), **{f"the expert for {task}": experts[task] for task in tasks}}


@memoized
def facts() -> Mapping[str, Any]:
    """families.yaml."""
    return yaml.safe_load(FACTS.read_text("utf-8"))


def family(name: str) -> Family:
    """Raises UserError, listing those there are, for an unknown name."""
    families = facts()["families"]
    if name not in families:
        raise UserError(
            f"experts.family={name} is no published family. There are: {', '.join(families)}; for your own choose "
            f"experts=folder."
        )
    return Family(**{"name": name, "tasks": tuple(facts()["tasks"]), **families[name]})


def base_model(backbone: Backbone, revision: str | None = None) -> HubFile:
    """The pretrained CLIP of a published backbone. Raises UserError for another backbone."""
    return HubFile(_published(backbone)["openai"], weight_names(), revision)


def weight_names() -> tuple[str, ...]:
    """The names that a weight file may have in a repository."""
    return tuple(facts()["weights"])


def open_base(backbone: Backbone, cache: Cache, revision: str | None = None) -> Checkpoint:
    """The pretrained CLIP of a published backbone, text tower included, in open_clip's names; downloaded if need be."""
    return from_hugging_face(open_file(fetch(base_model(backbone, revision), cache), cache))


def _published(backbone: Backbone) -> Mapping[str, str]:
    backbones = facts()["backbones"]
    if backbone.name not in backbones:
        raise UserError(f"backbone={backbone.name} has no published base. Those that have: {', '.join(backbones)}.")
    return backbones[backbone.name]


class Published:
    """What both kinds of published experts share."""

    family: str

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a table with these experts must say."""
        return tuple(family(self.family).remarks.values())


@dataclass(frozen=True)
class HubFamily(Published):
    """A repository per expert on the Hub, in Hugging Face's layout: whole vision towers, or LoRA adapters on the base.

    qkv: whether methods see query, key and value as three parameters (as these files have them) or as one.
    revision, base_revision: of the experts' repositories and of the base's; null is their main branch.
    """

    family: str
    qkv: Literal["fused", "separate"] = "separate"
    revision: str | None = field(default=None, metadata=WHERE)
    base_revision: str | None = field(default=None, metadata=WHERE)

    def downloads(self, suite: Suite, backbone: Backbone) -> list[HubFile]:
        """The base, then the files of every expert. Raises UserError for what the family does not have."""
        known = family(self.family)
        known.check(backbone, suite.names)
        middle, suffixes = _published(backbone)["hub"], facts()["tasks"]
        repos = [str(known.repo).format(hub=middle, suffix=suffixes[task]) for task in suite.names]
        names = ((CONFIG,), (WEIGHTS,)) if known.adapter else (weight_names(),)
        experts = [HubFile(repo, either, self.revision) for repo in repos for either in names]
        return [base_model(backbone, self.base_revision), *experts]

    def open(self, suite: Suite, backbone: Backbone, cache: Cache) -> Experts:
        """Downloads what is missing. Raises UserError as `downloads`, and for files that do not fit the backbone."""
        first, *paths = [fetch(file, cache) for file in self.downloads(suite, backbone)]
        stored = open_file(first, cache)
        base = from_hugging_face(stored)
        if family(self.family).adapter:
            experts = [from_hugging_face(open_lora(stored, path.parent, cache, True)) for path in paths[1::2]]
        else:
            experts = [with_projection(from_hugging_face(open_file(path, cache)), base) for path in paths]
        return assembled(base, experts, suite, backbone, cache, self.qkv)


@dataclass(frozen=True)
class EncoderFamily(Published):
    """`ImageEncoder` pickles by path templates, below a local root or in one repository of the Hub.

    root: the folder with ViT-B-32, ViT-B-16, ViT-L-14 in it; needed where the files are on Google Drive only.
    qkv: as methods see query, key and value (these files have them fused). text: merge the text parameters that the
    files still hold, too (never trained, but counted by methods that rank all numbers of a model).
    """

    family: str
    root: str | None = field(default=None, metadata=WHERE)
    qkv: Literal["fused", "separate"] = "fused"
    text: bool = False
    revision: str | None = field(default=None, metadata=WHERE)

    def files(self, suite: Suite, backbone: Backbone) -> dict[str, Path | HubFile]:
        """The base, then every expert: a path below the root, or what comes from the Hub.

        Raises UserError for what the family does not have and for all that is not below the root.
        """
        known = family(self.family)
        known.check(backbone, suite.names)
        paths = known.paths(backbone, suite.names)
        openai = {BASE: base_model(backbone)} if known.openai else {}
        if self.root is not None:
            return {**openai, **self._local(known, paths, optional=openai.keys())}
        if known.repo is None:
            raise UserError(
                f"The experts of the family {known.name} are not on the Hub. Download them ({known.source}) and name "
                f"the folder with {known.folders(backbone)[0]} in it: experts.root=<folder>."
            )
        files = {who: HubFile(known.repo, tuple(known.below + name for name in names), self.revision)
                 for who, names in paths.items()}  # fmt: skip
        return {**files, **openai}

    def _local(self, known: Family, paths: Mapping[str, Sequence[str]], optional: Any) -> dict[str, Path | HubFile]:
        root = Path(str(self.root)).expanduser()
        files = {who: file for who, names in paths.items()
                 if (file := next((root / name for name in names if (root / name).is_file()), None))}  # fmt: skip
        if missing := [who for who in paths if who not in files and who not in optional]:
            raise UserError(
                f"{root} lacks {some(missing)} of the family {known.name}: {missing[0]} should be "
                f"{root / paths[missing[0]][0]}. {there_is(root)} Its files come from "
                f"{known.source or f'the repository {known.repo} of the Hub'}."
            )
        return dict(files)

    def downloads(self, suite: Suite, backbone: Backbone) -> list[HubFile]:
        """What comes from the Hub. Raises UserError as `files`."""
        return [file for file in self.files(suite, backbone).values() if isinstance(file, HubFile)]

    def open(self, suite: Suite, backbone: Backbone, cache: Cache) -> Experts:
        """Reads the pickles inertly. Raises UserError for what is missing or does not fit."""
        files = self.files(suite, backbone)
        paths = [fetch(file, cache) if isinstance(file, HubFile) else file for file in files.values()]
        first, *experts = [open_file(path, cache) for path in paths]
        if files[BASE] == base_model(backbone):
            base = as_encoder(from_hugging_face(first), self.text)
        else:
            base = from_image_encoder(first, self.text)
        towers = [from_image_encoder(expert, self.text) for expert in experts]
        return assembled(base, towers, suite, backbone, cache, self.qkv, self.text)
