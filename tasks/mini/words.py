"""Captions of the mini suite and their word-level token ids (no BPE file: the class names are a closed vocabulary)."""

from functools import cache

import torch
from torch import Tensor

from tasks.mini.generate import CLASSES

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
