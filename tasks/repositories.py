"""Experts on the Hub that are whole models or adapters of Hugging Face: a repository, or a folder of one, per task."""

from dataclasses import dataclass, field

from merging.backbones.base import Backbone
from merging.cache import Cache
from merging.checkpoints.lora import CONFIG, WEIGHTS
from merging.experts import Experts
from merging.identity import WHERE
from merging.owned import HEADS
from tasks.hub import HubFile, fetch
from tasks.suite import Suite
from tasks.vision.families import weight_names
from tasks.vision.folder import Folder


@dataclass(frozen=True)
class Repositories:
    """Experts by templates with {task} in them; their files are fetched and then read as a local folder's are.

    base: repository of the pretrained model. experts: repository of an expert. below: its folder in there. adapter:
    LoRA instead of whole models. heads, owned: see Folder. revision, base_revision: null is the main branch.
    """

    family: str
    base: str
    experts: str
    below: str = ""
    adapter: bool = False
    heads: str = "expert"
    owned: str = HEADS
    revision: str | None = field(default=None, metadata=WHERE)
    base_revision: str | None = field(default=None, metadata=WHERE)
    remarks = ()

    def downloads(self, suite: Suite, backbone: Backbone) -> list[HubFile]:
        """The base, then what every expert has, its weights last."""
        files = [self._base]
        for task in suite.every:
            files += self._expert(task.name)
        return files

    def open(self, suite: Suite, backbone: Backbone, cache: Cache) -> Experts:
        """Downloads what is missing. Raises UserError for that, and as Folder.open."""
        return self._local(suite, cache).open(suite, backbone, cache)

    def headed(self, suite: Suite, backbone: Backbone, cache: Cache) -> Suite:
        """The suite with the heads of the experts, see Folder.headed."""
        return self._local(suite, cache).headed(suite, backbone, cache)

    def _local(self, suite: Suite, cache: Cache) -> Folder:
        paths = {}
        for task in suite.every:
            *_, weights = [fetch(file, cache) for file in self._expert(task.name)]
            paths[task.name] = str(weights.parent)
        base = str(fetch(self._base, cache))
        return Folder(base, None, paths, self.family, heads=self.heads, owned=self.owned, other_base=True)

    @property
    def _base(self) -> HubFile:
        return HubFile(self.base, weight_names(), self.base_revision)

    def _expert(self, task: str) -> list[HubFile]:
        repo, below = (text.replace("{task}", task) for text in (self.experts, self.below))
        files = ((CONFIG,), (WEIGHTS,)) if self.adapter else (("config.json",), weight_names())
        start = f"{below}/" if below else ""
        return [HubFile(repo, tuple(start + name for name in names), self.revision) for names in files]
