"""Published CLIP experts: one dataclass per kind of source. The facts of each family are in families.yaml."""

from collections.abc import Sequence
from dataclasses import dataclass
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
from merging.preflight import some
from tasks.suite import Suite
from tasks.vision.catalogue import Family, base_model, family, weights
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
    revision: str | None = None
    base_revision: str | None = None

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a table with these experts must say."""
        return tuple(family(self.family).remarks.values())

    def wanted(self, suite: Suite, backbone: Backbone) -> list[Wanted]:
        """The base, then the files of every expert. Raises UserError for what the family does not have."""
        said = family(self.family)
        said.check(backbone, suite.names)
        files = ((CONFIG,), (WEIGHTS,)) if said.adapter else (weights(),)
        repos = [said.repository(backbone, task) for task in suite.names]
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
    root: str | None = None
    qkv: Literal["fused", "separate"] = "fused"
    text: bool = False
    revision: str | None = None

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a table with these experts must say."""
        return tuple(family(self.family).remarks.values())

    def wanted(self, suite: Suite, backbone: Backbone) -> list[Wanted]:
        """What comes from the Hub: the base, then every expert; with a local root the base alone, or nothing.

        Raises UserError for what the family does not have and what is not below the root.
        """
        said = family(self.family)
        said.check(backbone, suite.names)
        if self.root is not None:
            base, _ = self._local(said, suite, backbone)
            return [base_model(backbone)] if base is None else []
        if said.repo is None:
            raise UserError(
                f"The experts of the family {said.name} are not on the Hub. Download them ({said.source}) and name the "
                f"folder with {said.folders(backbone)[0]} in it: experts.root=<folder>."
            )
        groups = [] if said.openai else [said.base_paths(backbone, suite.names)]
        groups += [said.expert_paths(backbone, task) for task in suite.names]
        files = [Wanted(said.repo, tuple(said.below + each for each in names), self.revision) for names in groups]
        return [base_model(backbone), *files] if said.openai else files

    def open(self, suite: Suite, backbone: Backbone, cache: Cache) -> Experts:
        """Reads the pickles inertly. Raises UserError for what is missing or does not fit."""
        fetched = [fetch_first(each, cache) for each in self.wanted(suite, backbone)]
        said, paths, first = family(self.family), fetched[1:], None
        if self.root is not None:
            first, paths = self._local(said, suite, backbone)
        elif not said.openai:
            first = fetched[0]
        experts = [from_image_encoder(open_file(path, cache), self.text) for path in paths]
        if first is not None:
            base = from_image_encoder(open_file(first, cache), self.text)
        else:
            base = as_encoder(from_hugging_face(open_file(fetched[0], cache)), self.text)
        return assembled(base, experts, suite, backbone, cache, self.qkv, self.text)

    def _local(self, said: Family, suite: Suite, backbone: Backbone) -> tuple[Path | None, list[Path]]:
        """The base (None: openai's own) and the experts below the root. Raises UserError naming what is not there."""
        root = Path(str(self.root)).expanduser()
        groups = {"the base": said.base_paths(backbone, suite.names)}
        groups |= {f"the expert for {task}": said.expert_paths(backbone, task) for task in suite.names}
        found = {who: next((root / each for each in names if (root / each).is_file()), None)
                 for who, names in groups.items()}  # fmt: skip
        missing = [who for who, path in found.items() if path is None and not (who == "the base" and said.openai)]
        if missing:
            raise UserError(
                f"{root} lacks {some(missing)} of the family {said.name}: {missing[0]} should be "
                f"{root / groups[missing[0]][0]}. {there_is(root)} Its files come from "
                f"{said.source or f'the repository {said.repo} of the Hub'}."
            )
        first, *experts = found.values()
        return first, [path for path in experts if path is not None]


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
