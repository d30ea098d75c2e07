"""Street numbers, like SVHN: which digit is in the middle of the crop.

Classes: ten numbers. "web" is a catalogue picture of a house number: one light digit on a dark enamel plate. "task"
is a crop of a street photo: neighbouring digits cut off at the sides, dark on light nearly as often as light on dark,
other glyph shapes, uneven light, and the blocky pixels and yellowish colours of a cheap camera.
"""

import torch
from torch import Tensor
from torch.nn import functional

from tasks.mini import canvas, glyphs

CLASSES = tuple(f"number {name}" for name in glyphs.NAMES)


def draw(labels: Tensor, style: str, rng: torch.Generator) -> Tensor:
    return plate(labels, rng) if style == "web" else crop(labels, rng)


def plate(labels: Tensor, rng: torch.Generator) -> Tensor:
    count = len(labels)
    x, y = canvas.pixels()
    image = canvas.blank(count, canvas.colour(count, 0.55, 0.9, rng))
    edge = canvas.box(x, y, canvas.uniform(count, 0.72, 0.86, rng), canvas.uniform(count, 0.9, 0.96, rng))
    image = canvas.paint(image, edge, canvas.colour(count, 0.0, 0.4, rng))
    shift = canvas.uniform(count, -0.14, 0.14, rng), canvas.uniform(count, -0.1, 0.1, rng)
    u, v = canvas.place(x, y, *shift, scale=canvas.uniform(count, 0.76, 0.95, rng))
    digit = glyphs.distance(glyphs.DIGITS, labels, u, v) - canvas.per_image(canvas.uniform(count, 0.1, 0.17, rng))
    return canvas.paint(image, digit, canvas.colour(count, 0.75, 1.0, rng), soft=0.08)


def crop(labels: Tensor, rng: torch.Generator) -> Tensor:
    count = len(labels)
    ground, ink = tones(count, rng)
    image = canvas.blank(count, ground)
    x, y = canvas.pixels()
    scale = canvas.uniform(count, 0.8, 0.96, rng)
    shift = canvas.uniform(count, -0.1, 0.1, rng), canvas.uniform(count, -0.1, 0.1, rng)
    u, v = canvas.place(x, y, *shift, angle=canvas.uniform(count, -0.08, 0.08, rng), scale=scale)
    image = canvas.paint(image, ensemble(labels, u, v, rng), ink, soft=0.1)
    light = canvas.place(x, y, angle=canvas.uniform(count, 0, 6.3, rng))[0]
    image = image * (1 + 0.2 * light)[:, None]
    # Half resolution without interpolation: the same look in every image of the task.
    image = functional.interpolate(functional.avg_pool2d(image, 2), scale_factor=2.0, mode="nearest")
    return canvas.grain(image, 0.03, rng)


def ensemble(labels: Tensor, u: Tensor, v: Tensor, rng: torch.Generator) -> Tensor:
    """Distance to the middle digit and to the neighbours that reach into the crop, left and right."""
    count = len(labels)
    pen = canvas.per_image(canvas.uniform(count, 0.11, 0.17, rng))
    distance = glyphs.distance(glyphs.DIGITS, variant(labels, rng), u, v)
    # One look-up serves both neighbours: the left half of the crop shows one, the right half the other.
    gap = canvas.per_image(canvas.uniform(count, 1.15, 1.35, rng))
    left, right = (variant(torch.randint(0, 10, (count,), generator=rng), rng) for _ in range(2))
    for other, side in ((left, -1), (right, 1)):
        there = canvas.chance(count, 0.5, rng)
        hidden = canvas.per_image(torch.where(there, 0.0, 9.0))
        distance = torch.minimum(distance, glyphs.distance(glyphs.DIGITS, other, u - side * gap, v) + hidden)
    return distance - pen


def variant(labels: Tensor, rng: torch.Generator) -> Tensor:
    return labels + 10 * canvas.chance(len(labels), 0.15, rng)


def tones(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ground and ink colours, never close in brightness; a dull yellow camera cast on both."""
    cast = torch.tensor([1.0, 0.9, 0.65])
    dark, light = canvas.colour(count, 0.05, 0.35, rng) * cast, canvas.colour(count, 0.65, 0.95, rng) * cast
    swap = canvas.chance(count, 0.4, rng)
    return canvas.choose(swap, light, dark), canvas.choose(swap, dark, light)
