"""Zero-shot heads: the class names of a task, written into prompts and read by CLIP's text tower."""

import hashlib
import html
import json
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from merging.cache import Cache, code, key_of
from merging.checkpoints import Checkpoint
from merging.checkpoints.opening import open_file
from merging.errors import UserError
from tasks.heads.head import ZeroShot
from tasks.hub import HubFile, fetch
from tasks.vision.families import facts, weight_names
from tasks.vision.reading import in_open_clip

HEAD_WIDTH = 64  # of every CLIP by OpenAI
PROMPTS = 64  # read at once
BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")
OUTSIDE = ("token_embedding.", "positional_embedding", "ln_final.", "text_projection", "transformer.")
_ONE_AT_A_TIME = threading.Lock()  # a text tower in double precision takes 0.5 GB and all cores
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Text:
    """The file that holds the text tower: in a repository of the Hub, or a local path without `repo`."""

    filename: str = "model.safetensors"
    repo: str | None = None
    revision: str | None = None

    def open(self, cache: Cache) -> Checkpoint:
        """In open_clip's names, downloaded if need be. Raises UserError where the file is missing or of no CLIP."""
        path = Path(self.filename).expanduser()
        if self.repo is not None:
            names = weight_names() if self.filename in weight_names() else (self.filename,)
            path = fetch(HubFile(self.repo, names, self.revision), cache)
        return in_open_clip(open_file(path, cache))[0]


@dataclass(frozen=True)
class OwnText:
    """The text tower in the file of a task's own expert."""

    checkpoint: Checkpoint  # in open_clip's names
    repo = None

    def open(self, cache: Cache) -> Checkpoint:
        return self.checkpoint


@dataclass(frozen=True)
class TextHead:
    """The zero-shot head of a task whose class names a text tower reads.

    text: see `text_of`. templates: prompts with {} for the class name. cache: folder that keeps heads.
    """

    text: str | Mapping[str, str | None] | OwnText
    templates: tuple[str, ...]
    quick_gelu: bool
    cache: str

    def open(self, task: str, classes: Sequence[str]) -> ZeroShot:
        check_prompts(task, classes)
        cache = Cache(self.cache)
        return ZeroShot(zero_shot_head(self.tower.open(cache), classes, self.templates, self.quick_gelu, cache))

    def content(self, task: str, classes: Sequence[str]) -> str:
        text = self.tower.open(Cache(self.cache))
        made = json.dumps([text.id, list(classes), list(self.templates), self.quick_gelu])
        return hashlib.sha256(made.encode()).hexdigest()[:16]

    @property
    def tower(self) -> Text | OwnText:
        """The file of the text tower. Raises UserError where there is none."""
        return self.text if isinstance(self.text, OwnText) else text_of(self.text)


def text_of(text: str | Mapping[str, str | None]) -> Text:
    """The text tower of a published backbone by its name, in a repository, or in a file by its path.

    Raises UserError for a name that has none and for unknown keys.
    """
    backbones = facts()["backbones"]
    where: Mapping[str, Any] = {"filename": text} if isinstance(text, str) else text
    if isinstance(text, str) and text in backbones:
        where = {"repo": backbones[text]["openai"]}
    if extra := sorted(set(where) - {field.name for field in fields(Text)}):
        raise UserError(f"suite.text has {', '.join(extra)}. Give filename and, on the Hub, repo and revision.")
    tower = Text(**where)
    if tower.repo is None and not Path(tower.filename).expanduser().is_file():
        raise UserError(
            f"There is no text tower for {tower.filename!r}. This suite needs a CLIP: choose backbone="
            f"{', '.join(backbones)}, or name the file: suite.text=<path to a CLIP in safetensors>."
        )
    return tower


def check_prompts(task: str, classes: Sequence[str]) -> None:
    """Raises UserError where two class names are one prompt to the tokenizer, which knows no case, or differ by `_`."""
    first: dict[str, tuple[int, str]] = {}
    for index, name in enumerate(classes):
        prompt = " ".join(html.unescape(name).replace("_", " ").lower().split())
        other, before = first.setdefault(prompt, (index, name))
        if other != index:
            raise UserError(
                f"The classes {before!r} (number {other}) and {name!r} (number {index}) of {task} give one prompt, "
                f"{prompt!r}, so that no image could be told to be one or the other. Rename one, or name all classes "
                f"in their order: suite.sources.{task}.classes=[...]."
            )


def zero_shot_head(
    text: Checkpoint, classes: Sequence[str], templates: Sequence[str], quick_gelu: bool, cache: Cache
) -> Tensor:
    """[classes, D] fp32: per class the mean of its prompts' unit features at unit length, times exp(logit_scale).

    Computed in double precision, so that its bits do not depend on the number of threads; cached by content. Raises
    UserError for templates without {} and weights that are no text tower.
    """
    if not templates or any("{}" not in template for template in templates):
        raise UserError(f"The templates {list(templates)} need one entry or more, each with {{}} for the class name.")
    made_by = code((__name__,), ("open_clip_torch",))
    key = key_of("zero-shot head", made_by, text.id, list(classes), list(templates), quick_gelu)

    def make() -> dict[str, Tensor]:
        with _ONE_AT_A_TIME:
            prompts = [template.replace("{}", name) for name in classes for template in templates]
            log.info("zero-shot head: %d prompts for %d classes", len(prompts), len(classes))
            features = read_prompts(build_tower(text, quick_gelu), prompts).unflatten(0, (len(classes), -1))
            scale = text.tensor("logit_scale").double().exp()
            return {"head": (scale * functional.normalize(features.mean(1), dim=-1)).float()}

    return cache.tensors(key, make)["head"]


@torch.inference_mode()
def read_prompts(tower: nn.Module, prompts: Sequence[str]) -> Tensor:
    """Unit features [N, D] of prompts. The padding behind the longest of a batch is left out: no token looks ahead."""
    from open_clip import get_tokenizer

    context = len(tower.positional_embedding)  # type: ignore[arg-type]
    tokens, mask = get_tokenizer("ViT-B-32", context_length=context)(list(prompts)), tower.attn_mask
    features = []
    for some in tokens.split(PROMPTS):
        length = int((some != 0).sum(1).max())
        tower.attn_mask = mask[:length, :length]  # type: ignore[index]
        features.append(functional.normalize(tower(some[:, :length]), dim=-1))
    tower.attn_mask = mask
    return torch.cat(features)


def build_tower(text: Checkpoint, quick_gelu: bool) -> nn.Module:
    """open_clip's text tower with these weights in double precision, its size read off them."""
    from open_clip.model import _build_text_tower

    specs = {key: spec for key, spec in text.specs().items() if key.startswith(OUTSIDE)}
    try:
        context, width = specs["positional_embedding"].shape
        embed_dim = specs["text_projection"].shape[1]
        shape = {
            "context_length": context, "vocab_size": specs["token_embedding.weight"].shape[0], "width": width,
            "heads": max(1, width // HEAD_WIDTH),
            "layers": 1 + max(int(match[1]) for key in specs if (match := BLOCK.match(key))),
        }  # fmt: skip
        tower = _build_text_tower(embed_dim, shape, quick_gelu)  # type: ignore[arg-type]
        tower.load_state_dict({key: text.tensor(key) for key in specs})
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{text.name} holds no text tower of a CLIP ({error}). Name a whole CLIP: suite.text=<safetensors file>."
        ) from error
    text.release()
    return tower.double().eval()
