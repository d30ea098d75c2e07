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


def annual_crop(x, y, rng):
    """A patchwork of large straw, earth and ochre parcels."""
    tones = torch.tensor([[0.88, 0.76, 0.42], [0.55, 0.38, 0.22], [0.72, 0.6, 0.3], [0.95, 0.88, 0.62]])
    cells = torch.randint(0, 4, (len(x), 16), generator=rng)
    column, row = (((axis + 1.6) / 0.8).floor().clamp(0, 3).long() for axis in (x, y))
    return tones[cells.gather(1, (column * 4 + row).flatten(1))].reshape(*x.shape, 3).permute(0, 3, 1, 2)


def herbaceous(x, y, rng):
    """Half scrub, half bare soil, in large blotches."""
    n = len(x)
    return c.paint(ground(n, (0.5, 0.6, 0.3), 6, 0.1, rng), (0.5 - c.noise(n, 5, rng)) * 2, (0.33, 0.4, 0.12), 0.3)


def highway(x, y, rng):
    n = len(x)
    image = ground(n, (0.42, 0.52, 0.3), 4, 0.15, rng)
    axis = x + c.varied(n, -0.25, 0.25, rng) + c.varied(n, -0.2, 0.2, rng) * y * y
    return c.layered(image, [(axis.abs() - 0.34, (0.45, 0.45, 0.48)), (axis.abs() - 0.07, (0.95, 0.95, 0.9))])


def industrial(x, y, rng):
    """Four large pale roofs on asphalt."""
    n = len(x)
    image = ground(n, (0.4, 0.4, 0.42), 4, 0.1, rng)
    for cx, cy in ((-0.5, -0.5), (0.5, -0.5), (-0.5, 0.5), (0.5, 0.5)):
        width, height = c.uniform(n, 0.28, 0.42, rng), c.uniform(n, 0.28, 0.42, rng)
        roof = torch.tensor([0.82, 0.86, 0.92]) + c.uniform(n, -0.12, 0.12, rng)[:, None]
        image = c.paint(image, c.box(x - cx, y - cy, width, height), roof)
    return image


def pasture(x, y, rng):
    """Smooth bright green, cut by a hedge or two."""
    image = ground(len(x), (0.45, 0.8, 0.3), 2, 0.06, rng)
    hedges = [(axis - c.varied(len(x), -0.6, 0.6, rng)).abs() - 0.06 for axis in (x, y)]
    return c.layered(image, [(hedge, (0.12, 0.35, 0.1)) for hedge in hedges])


def permanent_crop(x, y, rng):
    """Rows of trees on pale soil."""
    rows = c.wave(x + c.varied(len(x), 0.0, 0.5, rng), 0.5) - 0.13
    return c.paint(ground(len(x), (0.8, 0.7, 0.5), 4, 0.08, rng), rows, (0.12, 0.42, 0.12))


def residential(x, y, rng):
    """A grid of small tiled roofs among gardens."""
    image = ground(len(x), (0.5, 0.58, 0.42), 6, 0.15, rng)
    x, y = (axis + c.varied(len(x), 0.0, 0.5, rng) for axis in (x, y))
    return c.paint(image, c.both(c.wave(x, 0.5), c.wave(y, 0.5)) - 0.15, (0.85, 0.35, 0.22))


def river(x, y, rng):
    n = len(x)
    image = ground(n, (0.36, 0.56, 0.26), 4, 0.15, rng)
    bend = c.varied(n, 0.15, 0.35, rng) * torch.sin(3 * y + c.varied(n, 0.0, 6.3, rng))
    return c.paint(image, (x + bend).abs() - c.varied(n, 0.25, 0.36, rng), (0.12, 0.35, 0.6))


def lake(x, y, rng):
    """Water nearly everywhere, a shore on one side."""
    image = ground(len(x), (0.1, 0.32, 0.62), 3, 0.08, rng)
    return c.paint(image, c.varied(len(x), 0.6, 0.9, rng) + 0.1 * torch.sin(5 * y) - x, (0.6, 0.66, 0.42))


PAINTERS = {
    "annual crop": annual_crop,
    "forest": lambda x, y, rng: ground(len(x), (0.06, 0.25, 0.08), 10, 0.5, rng),
    "herbaceous vegetation": herbaceous, "highway": highway, "industrial": industrial, "pasture": pasture,
    "permanent crop": permanent_crop, "residential": residential, "river": river, "lake": lake,
}  # fmt: skip
CLASSES = tuple(PAINTERS)


def satellite(image: Tensor, rng: torch.Generator) -> Tensor:
    """The sensor: red leans on what is green beyond blue (plants), green on red, blue on green; half resolution."""
    image = c.recolour(image, ((0.18, 0.96, -0.34), (0.43, 0.52, 0.0), (0.0, 0.38, 0.57)), (0.06, 0.0, 0.01))
    image = image * c.varied(len(image), 0.8, 1.2, rng)[:, None]
    image = c.grain(functional.avg_pool2d(c.tint(image, 0.06, rng), 2), 0.02, rng)
    return functional.interpolate(image, scale_factor=2, mode="nearest")


def draw(labels: Tensor, style: str, rng: torch.Generator) -> Tensor:
    product = style == "task"
    view = ((0.2, 0.2), (0.0, 2 * math.pi), (0.85, 1.2)) if product else ((0.1, 0.1), None, (0.95, 1.05))
    x, y = c.view(len(labels), *view, rng)
    image = c.dispatch(labels, PAINTERS.values(), x, y, rng=rng)
    return satellite(image, rng) if product else c.grain(image, 0.01, rng)
