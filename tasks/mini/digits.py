"""Handwritten digits, like MNIST, with real data: the 8 x 8 scans that come with scikit-learn.

Classes: ten digits. "web" is a typeset digit, light or coloured, on a plain dark ground. "task" imitates pen strokes
(elastic warp, slant, thickness) for the small share of this look in pretraining; training and evaluation of the task
itself use `handwriting`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tasks.mini import canvas, glyphs

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
    large = functional.interpolate(small, (canvas.SIZE, canvas.SIZE), mode="bicubic", align_corners=False)
    return large.clamp(0, 1).repeat(1, 3, 1, 1), torch.tensor(scans.target, dtype=torch.int64)[order]


def typeset(labels: Tensor, rng: torch.Generator) -> Tensor:
    count = len(labels)
    image = canvas.blank(count, canvas.colour(count, 0.0, 0.2, rng))
    shift = canvas.uniform(count, -0.1, 0.1, rng), canvas.uniform(count, -0.08, 0.08, rng)
    u, v = canvas.place(*canvas.pixels(), *shift, scale=canvas.uniform(count, 0.85, 1.05, rng))
    digit = glyphs.distance(glyphs.DIGITS, labels, u, v) - canvas.per_image(canvas.uniform(count, 0.08, 0.16, rng))
    white = canvas.chance(count, 0.5, rng)
    ink = canvas.choose(white, torch.ones(count, 3), canvas.colour(count, 0.45, 1.0, rng))
    return canvas.paint(image, digit, ink, soft=0.08)


def pen(labels: Tensor, rng: torch.Generator) -> Tensor:
    count = len(labels)
    shift = canvas.uniform(count, -0.06, 0.06, rng), canvas.uniform(count, -0.04, 0.04, rng)
    u, v = canvas.place(*canvas.pixels(), *shift, scale=canvas.uniform(count, 0.95, 1.15, rng))
    u = u * canvas.per_image(canvas.uniform(count, 0.85, 1.2, rng)) + v * canvas.per_image(
        canvas.uniform(count, -0.2, 0.35, rng)
    )
    u, v = (axis + 0.45 * (canvas.noise(count, 3, rng) - 0.5) for axis in (u, v))
    glyph = labels + 10 * canvas.chance(count, 0.5, rng)
    digit = glyphs.distance(glyphs.DIGITS, glyph, u, v) - canvas.per_image(canvas.uniform(count, 0.08, 0.17, rng))
    # The wide edge is that of an 8 x 8 scan after upsampling.
    return canvas.paint(canvas.blank(count, 0.0), digit, 1.0, soft=0.3)
