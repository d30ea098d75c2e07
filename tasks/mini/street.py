"""Street numbers, like SVHN: which digit is in the middle of the crop.

Classes: ten numbers. "web" is a catalogue picture of a house number: one light digit on a dark enamel plate. "task"
is a crop of a street photo: neighbouring digits cut off at the sides, dark on light nearly as often as light on dark,
other glyph shapes, uneven light, and the blocky pixels and yellowish colours of a cheap camera.
"""

import torch
from torch import Tensor
from torch.nn import functional

from tasks.mini import canvas as c
from tasks.mini import glyphs

CLASSES = tuple(f"number {name}" for name in glyphs.NAMES)
CAST = torch.tensor([1.0, 0.9, 0.65])  # dull yellow


def draw(labels: Tensor, style: str, rng: torch.Generator) -> Tensor:
    return plate(labels, rng) if style == "web" else crop(labels, rng)


def plate(labels: Tensor, rng: torch.Generator) -> Tensor:
    n = len(labels)
    image = c.blank(n, c.colour(n, 0.55, 0.9, rng))
    edge = c.box(*c.pixels(), c.uniform(n, 0.72, 0.86, rng), c.uniform(n, 0.9, 0.96, rng))
    image = c.paint(image, edge, c.colour(n, 0.0, 0.4, rng))
    u, v = c.view(n, (0.14, 0.1), None, (0.76, 0.95), rng)
    return c.paint(image, glyphs.digits(labels, u, v, (0.1, 0.17), rng), c.colour(n, 0.75, 1.0, rng), soft=0.08)


def crop(labels: Tensor, rng: torch.Generator) -> Tensor:
    n = len(labels)
    ground, ink = tones(n, rng)
    scale = c.uniform(n, 0.8, 0.96, rng)
    shift = c.uniform(n, -0.1, 0.1, rng), c.uniform(n, -0.1, 0.1, rng)
    u, v = c.place(*c.pixels(), *shift, angle=c.uniform(n, -0.08, 0.08, rng), scale=scale)
    image = c.side_light(c.paint(c.blank(n, ground), ensemble(labels, u, v, rng), ink, soft=0.1), rng)
    # Half resolution without interpolation: the same look in every image of the task.
    image = functional.interpolate(functional.avg_pool2d(image, 2), scale_factor=2.0, mode="nearest")
    return c.grain(image, 0.03, rng)


def ensemble(labels: Tensor, u: Tensor, v: Tensor, rng: torch.Generator) -> Tensor:
    """Distance to the middle digit and to the neighbours that reach into the crop, left and right."""
    n = len(labels)
    pen = c.varied(n, 0.11, 0.17, rng)
    distance = glyphs.distance(glyphs.DIGITS, glyphs.written(labels, 0.15, rng), u, v)
    # One look-up serves both neighbours: the left half of the crop shows one, the right half the other.
    gap = c.varied(n, 1.15, 1.35, rng)
    left, right = (glyphs.written(torch.randint(0, 10, (n,), generator=rng), 0.15, rng) for _ in range(2))
    for other, side in ((left, -1), (right, 1)):
        hidden = c.per_image(torch.where(c.chance(n, 0.5, rng), 0.0, 9.0))
        distance = torch.minimum(distance, glyphs.distance(glyphs.DIGITS, other, u - side * gap, v) + hidden)
    return distance - pen


def tones(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ground and ink colours, never close in brightness."""
    dark, light = c.colour(count, 0.05, 0.35, rng) * CAST, c.colour(count, 0.65, 0.95, rng) * CAST
    swap = c.chance(count, 0.4, rng)
    return c.choose(swap, light, dark), c.choose(swap, dark, light)
