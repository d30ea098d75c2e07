"""The mini CLIP in open_clip's own classes, its closed vocabulary, and the pretrained base beside this file."""

import copy
from functools import cache
from pathlib import Path

import torch
from open_clip.model import CLIP
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from tasks.mini.generate import CLASSES

BASE = Path(__file__).with_name("base.safetensors")
TOWER = {
    "embed_dim": 128,
    "vision_cfg": {"layers": 5, "width": 192, "head_width": 32, "patch_size": 8, "image_size": 32},
}

TEMPLATES = ("a photo of a {}", "a picture of the {}", "one image of {}")
CONTEXT = 10  # template words + class words + the end token


@cache
def vocabulary() -> dict[str, int]:
    """Word -> id; 0 pads, and the end token has the highest id because open_clip pools the text at argmax(ids)."""
    sentences = [*TEMPLATES, *(name for names in CLASSES.values() for name in names)]
    words = sorted({word for sentence in sentences for word in sentence.replace("{}", "").split()})
    return {"<pad>": 0, **{word: 1 + i for i, word in enumerate(words)}, "<end>": 1 + len(words)}


def tokenize(captions: list[str]) -> Tensor:
    """int64 ids [len(captions), CONTEXT], zero padded. Raises KeyError for a word outside the vocabulary."""
    ids = torch.zeros(len(captions), CONTEXT, dtype=torch.int64)
    table = vocabulary()
    for row, caption in zip(ids, captions, strict=True):
        tokens = [table[word] for word in caption.split()] + [table["<end>"]]
        row[: len(tokens)] = torch.tensor(tokens)
    return ids


def build() -> CLIP:
    """A fresh mini CLIP (2.3 M image and 0.2 M text parameters), initialised from torch's global generator."""
    text = {"context_length": CONTEXT, "vocab_size": len(vocabulary()), "width": 96, "heads": 3, "layers": 1}
    return CLIP(**TOWER, text_cfg=text)  # type: ignore[arg-type]


def prepare(images: Tensor) -> Tensor:
    """uint8 [N, 3, 32, 32] -> float32 in [-1, 1], what both towers were trained on."""
    return images.float().div_(127.5).sub_(1)


@cache
def load_base() -> CLIP:
    """The shipped base in fp32, in evaluation mode; shared, so do not write into it."""
    model = build()
    model.load_state_dict({key: value.float() for key, value in load_file(BASE).items()})
    return model.eval()


@torch.inference_mode()
def zero_shot_head(task: str, model: CLIP | None = None) -> Tensor:
    """Unit text features of a task's classes averaged over the templates, [classes, 128]."""
    model = load_base() if model is None else model
    per_template = [
        functional.normalize(model.encode_text(tokenize([template.format(name) for name in CLASSES[task]])), dim=-1)
        for template in TEMPLATES
    ]
    return functional.normalize(torch.stack(per_template).mean(0), dim=-1)


@cache
def head(task: str) -> Tensor:
    """The frozen zero-shot head of the shipped base, scaled by its temperature, [classes, 128] fp32.

    Computed in double precision, so that its bits do not depend on the number of threads.
    """
    base = copy.deepcopy(load_base()).double()
    return (zero_shot_head(task, base).clone() * base.logit_scale.exp().detach()).float()
