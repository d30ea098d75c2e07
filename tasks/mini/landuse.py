"""Land use, after EuroSAT: 10 kinds of ground from above.

The classes differ in the brightness, the grain and the layout of the ground. "web" is a crisp natural-colour picture
with level parcels; "task" is the satellite product: half the resolution, a palette half-way to near-infrared false
colour (plants turn warm), parcels at any angle, and varying illumination.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from . import canvas as c


def ground(count: int, rgb: tuple[float, float, float], bumps: int, depth: float, rng: torch.Generator) -> Tensor:
    """A ground colour mottled by smooth noise."""
    shade = 1 + depth * (2 * c.noise(count, bumps, rng)[:, None] - 1)
    return c.blank(count, torch.tensor(rgb) + c.colour(count, -0.03, 0.03, rng)) * shade


def annual_crop(image, x, y, rng):
    """A patchwork of large straw, earth and ochre parcels."""
    n = len(x)
    tones = torch.tensor([[0.88, 0.76, 0.42], [0.55, 0.38, 0.22], [0.72, 0.6, 0.3], [0.95, 0.88, 0.62]])
    cells = torch.randint(0, 4, (n, 16), generator=rng)
    index = ((x + 1.6) / 0.8).floor().clamp(0, 3).long() * 4 + ((y + 1.6) / 0.8).floor().clamp(0, 3).long()
    return tones[cells.gather(1, index.flatten(1))].reshape(*x.shape, 3).permute(0, 3, 1, 2)


def forest(image, x, y, rng):
    return ground(len(x), (0.06, 0.25, 0.08), 10, 0.5, rng)


def herbaceous(image, x, y, rng):
    """Half scrub, half bare soil, in large blotches."""
    n = len(x)
    return c.paint(ground(n, (0.5, 0.6, 0.3), 6, 0.1, rng), (0.5 - c.noise(n, 5, rng)) * 2, (0.33, 0.4, 0.12), 0.3)


def highway(image, x, y, rng):
    n = len(x)
    image = ground(n, (0.42, 0.52, 0.3), 4, 0.15, rng)
    axis = x + c.per_image(c.uniform(n, -0.25, 0.25, rng)) + c.per_image(c.uniform(n, -0.2, 0.2, rng)) * y * y
    image = c.paint(image, axis.abs() - 0.34, (0.45, 0.45, 0.48))
    return c.paint(image, axis.abs() - 0.07, (0.95, 0.95, 0.9))


def industrial(image, x, y, rng):
    """Four large pale roofs on asphalt."""
    n = len(x)
    image = ground(n, (0.4, 0.4, 0.42), 4, 0.1, rng)
    for cx, cy in ((-0.5, -0.5), (0.5, -0.5), (-0.5, 0.5), (0.5, 0.5)):
        width, height = c.uniform(n, 0.28, 0.42, rng), c.uniform(n, 0.28, 0.42, rng)
        roof = torch.tensor([0.82, 0.86, 0.92]) + c.uniform(n, -0.12, 0.12, rng)[:, None]
        image = c.paint(image, c.box(x - cx, y - cy, width, height), roof)
    return image


def pasture(image, x, y, rng):
    """Smooth bright green, cut by a hedge or two."""
    n = len(x)
    image = ground(n, (0.45, 0.8, 0.3), 2, 0.06, rng)
    image = c.paint(image, (x - c.per_image(c.uniform(n, -0.6, 0.6, rng))).abs() - 0.06, (0.12, 0.35, 0.1))
    return c.paint(image, (y - c.per_image(c.uniform(n, -0.6, 0.6, rng))).abs() - 0.06, (0.12, 0.35, 0.1))


def permanent_crop(image, x, y, rng):
    """Rows of trees on pale soil."""
    n = len(x)
    rows = c.wave(x + c.per_image(c.uniform(n, 0.0, 0.5, rng)), 0.5) - 0.13
    return c.paint(ground(n, (0.8, 0.7, 0.5), 4, 0.08, rng), rows, (0.12, 0.42, 0.12))


def residential(image, x, y, rng):
    """A grid of small tiled roofs among gardens."""
    n = len(x)
    image = ground(n, (0.5, 0.58, 0.42), 6, 0.15, rng)
    x, y = x + c.per_image(c.uniform(n, 0.0, 0.5, rng)), y + c.per_image(c.uniform(n, 0.0, 0.5, rng))
    return c.paint(image, c.both(c.wave(x, 0.5), c.wave(y, 0.5)) - 0.15, (0.85, 0.35, 0.22))


def river(image, x, y, rng):
    n = len(x)
    image = ground(n, (0.36, 0.56, 0.26), 4, 0.15, rng)
    bend = c.per_image(c.uniform(n, 0.15, 0.35, rng)) * torch.sin(3 * y + c.per_image(c.uniform(n, 0.0, 6.3, rng)))
    return c.paint(image, (x + bend).abs() - c.per_image(c.uniform(n, 0.25, 0.36, rng)), (0.12, 0.35, 0.6))


def lake(image, x, y, rng):
    """Water nearly everywhere, a shore on one side."""
    n = len(x)
    image = ground(n, (0.1, 0.32, 0.62), 3, 0.08, rng)
    shore = c.per_image(c.uniform(n, 0.6, 0.9, rng)) + 0.1 * torch.sin(5 * y) - x
    return c.paint(image, shore, (0.6, 0.66, 0.42))


PAINTERS = {
    "annual crop": annual_crop, "forest": forest, "herbaceous vegetation": herbaceous, "highway": highway,
    "industrial": industrial, "pasture": pasture, "permanent crop": permanent_crop, "residential": residential,
    "river": river, "lake": lake,
}  # fmt: skip
CLASSES = tuple(PAINTERS)


def satellite(image: Tensor, rng: torch.Generator) -> Tensor:
    """The sensor: red leans on what is green beyond blue (plants), green on red, blue on green; half resolution."""
    n = len(image)
    image = c.recolour(image, ((0.18, 0.96, -0.34), (0.43, 0.52, 0.0), (0.0, 0.38, 0.57)), (0.06, 0.0, 0.01))
    image = image * c.uniform(n, 0.8, 1.2, rng).reshape(-1, 1, 1, 1)
    image = c.grain(functional.avg_pool2d(c.tint(image, 0.06, rng), 2), 0.02, rng)
    return functional.interpolate(image, scale_factor=2, mode="nearest")


def draw(labels: Tensor, style: str, rng: torch.Generator) -> Tensor:
    product = style == "task"
    view = (0.2, (0.0, 2 * math.pi), (0.85, 1.2)) if product else (0.1, None, (0.95, 1.05))
    x, y = c.view(len(labels), *view, rng)
    image = c.dispatch(c.blank(len(labels), 0.0), labels, tuple(PAINTERS.values()), x, y, rng=rng)
    return satellite(image, rng) if product else c.grain(image, 0.01, rng)
