"""Handwritten digits, like MNIST, with real data: the 8 x 8 scans that come with scikit-learn.

Classes: ten digits. "web" is a typeset digit, light or coloured, on a plain dark ground. "task" imitates pen strokes
(elastic warp, slant, thickness) for the small share of this look in pretraining; training and evaluation of the task
itself use `handwriting`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tasks.mini import canvas as c
from tasks.mini import glyphs

CLASSES = tuple(f"digit {name}" for name in glyphs.NAMES)
ORDER_SEED = 1797


def draw(labels: Tensor, style: str, rng: torch.Generator) -> Tensor:
    return typeset(labels, rng) if style == "web" else pen(labels, rng)


def handwriting() -> tuple[Tensor, Tensor]:
    """All 1797 scans as [1797, 3, 32, 32] in [0, 1], white on black, and their labels, in a fixed shuffled order."""
    from sklearn.datasets import load_digits  # only this task needs scikit-learn

    scans: Any = load_digits()
    order = torch.randperm(len(scans.target), generator=torch.Generator().manual_seed(ORDER_SEED))
    small = torch.tensor(scans.images, dtype=torch.float32)[order, None] / 16
    large = functional.interpolate(small, (c.SIZE, c.SIZE), mode="bicubic", align_corners=False)
    return large.clamp(0, 1).repeat(1, 3, 1, 1), torch.tensor(scans.target, dtype=torch.int64)[order]


def typeset(labels: Tensor, rng: torch.Generator) -> Tensor:
    n = len(labels)
    image = c.blank(n, c.colour(n, 0.0, 0.2, rng))
    u, v = c.view(n, (0.1, 0.08), None, (0.85, 1.05), rng)
    digit = glyphs.digits(labels, u, v, (0.08, 0.16), rng)
    white = c.chance(n, 0.5, rng)
    ink = c.choose(white, torch.ones(n, 3), c.colour(n, 0.45, 1.0, rng))
    return c.paint(image, digit, ink, soft=0.08)


def pen(labels: Tensor, rng: torch.Generator) -> Tensor:
    n = len(labels)
    u, v = c.view(n, (0.06, 0.04), None, (0.95, 1.15), rng)
    u = u * c.varied(n, 0.85, 1.2, rng) + v * c.varied(n, -0.2, 0.35, rng)
    u, v = (axis + 0.45 * (c.noise(n, 3, rng) - 0.5) for axis in (u, v))
    digit = glyphs.digits(glyphs.written(labels, 0.5, rng), u, v, (0.08, 0.17), rng)
    # The wide edge is that of an 8 x 8 scan after upsampling.
    return c.paint(c.blank(n, 0.0), digit, 1.0, soft=0.3)
