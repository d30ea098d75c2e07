"""Published CLIP experts: one dataclass per kind of source. The facts of each family are in families.yaml."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from merging.backbones.base import Backbone
from merging.backbones.open_clip import PREFIX
from merging.cache import Cache
from merging.checkpoints import Checkpoint
from merging.checkpoints.key_maps import from_hugging_face, from_image_encoder
from merging.checkpoints.lora import CONFIG, WEIGHTS, open_lora
from merging.checkpoints.opening import open_file
from merging.checkpoints.views import Made, Overlay, View
from merging.errors import UserError
from merging.experts import Experts
from merging.identity import WHERE
from merging.preflight import some
from tasks.suite import Suite
from tasks.vision.expert_registry import base_model, family, weights
from tasks.vision.fitting import TEXT, assembled
from tasks.vision.hub import Wanted, fetch_first

PROJECTION = PREFIX + "proj"


def open_base(backbone: Backbone, cache: Cache, revision: str | None = None) -> Checkpoint:
    """The pretrained CLIP of a published backbone, text tower included, in open_clip's names; downloaded if need be."""
    return from_hugging_face(open_file(fetch_first(base_model(backbone, revision), cache), cache))


@dataclass(frozen=True)
class HubFamily:
    """A repository per expert on the Hub, in Hugging Face's layout: whole vision towers, or LoRA adapters on the base.

    qkv: whether methods see query, key and value as three parameters (as these files have them) or as one.
    revision, base_revision: of the experts' repositories and of the base's; null is their main branch.
    """

    family: str
    qkv: Literal["fused", "separate"] = "separate"
    revision: str | None = field(default=None, metadata=WHERE)
    base_revision: str | None = field(default=None, metadata=WHERE)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a table with these experts must say."""
        return tuple(family(self.family).remarks.values())

    def wanted(self, suite: Suite, backbone: Backbone) -> list[Wanted]:
        """The base, then the files of every expert. Raises UserError for what the family does not have."""
        facts = family(self.family)
        facts.check(backbone, suite.names)
        files = ((CONFIG,), (WEIGHTS,)) if facts.adapter else (weights(),)
        repos = [facts.repository(backbone, task) for task in suite.names]
        experts = [Wanted(repo, names, self.revision) for repo in repos for names in files]
        return [base_model(backbone, self.base_revision), *experts]

    def open(self, suite: Suite, backbone: Backbone, cache: Cache) -> Experts:
        """Downloads what is missing. Raises UserError as `wanted`, and for files that do not fit the backbone."""
        first, *paths = [fetch_first(each, cache) for each in self.wanted(suite, backbone)]
        stored = open_file(first, cache)
        base = from_hugging_face(stored)
        if family(self.family).adapter:
            experts = [from_hugging_face(open_lora(stored, path.parent, cache)) for path in paths[1::2]]
        else:
            experts = [with_projection(from_hugging_face(open_file(path, cache)), base) for path in paths]
        return assembled(base, experts, suite, backbone, cache, self.qkv)


def with_projection(tower: Checkpoint, base: Checkpoint) -> Checkpoint:
    """Hugging Face's vision models end before the projection, which is then that of the base."""
    return Overlay(tower, base, [PROJECTION])


@dataclass(frozen=True)
class EncoderFamily:
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

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a table with these experts must say."""
        return tuple(family(self.family).remarks.values())

    def wanted(self, suite: Suite, backbone: Backbone) -> list[Wanted]:
        """What comes from the Hub: the base, then every expert; with a local root the base alone, or nothing.

        Raises UserError for what the family does not have and what is not below the root.
        """
        facts = family(self.family)
        facts.check(backbone, suite.names)
        if self.root is not None:
            return [] if "the base" in self._local(suite, backbone) else [base_model(backbone)]
        if facts.repo is None:
            raise UserError(
                f"The experts of the family {facts.name} are not on the Hub. Download them ({facts.source}) and name "
                f"the folder with {facts.folders(backbone)[0]} in it: experts.root=<folder>."
            )
        base, *experts = facts.files(backbone, suite.names).values()
        first, *rest = [
            Wanted(facts.repo, tuple(facts.below + name for name in names), self.revision) for names in (base, *experts)
        ]
        return [base_model(backbone) if facts.openai else first, *rest]

    def open(self, suite: Suite, backbone: Backbone, cache: Cache) -> Experts:
        """Reads the pickles inertly. Raises UserError for what is missing or does not fit."""
        facts, files = family(self.family), [fetch_first(each, cache) for each in self.wanted(suite, backbone)]
        if self.root is not None:
            files = [*files, *self._local(suite, backbone).values()]
        published = facts.openai and (self.root is None or len(files) > len(self._local(suite, backbone)))
        first, *experts = [open_file(path, cache) for path in files]
        base = as_encoder(from_hugging_face(first), self.text) if published else from_image_encoder(first, self.text)
        experts = [from_image_encoder(expert, self.text) for expert in experts]
        return assembled(base, experts, suite, backbone, cache, self.qkv, self.text)

    def _local(self, suite: Suite, backbone: Backbone) -> dict[str, Path]:
        """The base, unless it is openai's own, and the experts below the root; UserError naming what is not there."""
        facts, root = family(self.family), Path(str(self.root)).expanduser()
        places = facts.files(backbone, suite.names)
        paths = {who: next((root / each for each in names if (root / each).is_file()), None)
                 for who, names in places.items()}  # fmt: skip
        missing = [who for who, path in paths.items() if path is None and not (who == "the base" and facts.openai)]
        if missing:
            raise UserError(
                f"{root} lacks {some(missing)} of the family {facts.name}: {missing[0]} should be "
                f"{root / places[missing[0]][0]}. {there_is(root)} Its files come from "
                f"{facts.source or f'the repository {facts.repo} of the Hub'}."
            )
        return {who: path for who, path in paths.items() if path is not None}


def as_encoder(whole: Checkpoint, text: bool, remarks: tuple[str, ...] = ()) -> Checkpoint:
    """Of a whole CLIP what an ImageEncoder holds: the image tower, and with `text` the leftovers of the text side."""
    kept = (key for key in whole.specs() if key.startswith(PREFIX) or (text and key in TEXT))
    return View(whole, {key: Made((key,)) for key in kept}, remarks)


def there_is(folder: Path) -> str:
    """A sentence on what a folder holds."""
    if not folder.is_dir():
        return "There is no such folder."
    held: Sequence[str] = sorted(path.name for path in folder.iterdir())
    return f"It holds {some(held, 10)}." if held else "It is empty."
