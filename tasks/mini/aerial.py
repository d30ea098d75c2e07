"""Aerial views, after RESISC45: 18 sites from an aircraft.

A site is a large layout on a typical ground. "web" is a map-like picture, north up, in plain colours; "task" is the
survey flight: any rotation and scale, one camera whose colours are hazy and shifted, soft focus.
"""

import math

import torch
from torch import Tensor

from . import canvas as c

CLASSES = (
    "airport runway",
    "bridge",
    "harbor",
    "stadium",
    "storage tanks",
    "roundabout",
    "baseball diamond",
    "tennis court",
    "parking lot",
    "island",
    "crossroads",
    "railway",
    "airplane",
    "ship",
    "swimming pool",
    "solar farm",
    "circular farmland",
    "dam",
)
GRASS, ROAD, WATER, SAND, PALE = (
    (0.35, 0.62, 0.3),
    (0.4, 0.4, 0.43),
    (0.12, 0.38, 0.7),
    (0.9, 0.78, 0.55),
    (0.92, 0.92, 0.9),
)


def ground(x: Tensor, rgb: tuple[float, float, float], rng: torch.Generator) -> Tensor:
    """The ground of a site, a little different in each image."""
    return c.blank(len(x), torch.tensor(rgb) + c.colour(len(x), -0.05, 0.05, rng))


def wave(x: Tensor, period: float) -> Tensor:
    """The distance to the nearest line of a grating, zero half a period off the origin."""
    return (torch.remainder(x, period) - period / 2).abs()


def runway(image, x, y, rng):
    image = c.paint(ground(x, GRASS, rng), x.abs() - 0.36, (0.25, 0.25, 0.28))
    return c.paint(image, torch.maximum(x.abs() - 0.07, 0.14 - wave(y, 0.55)), 1.0)


def bridge(image, x, y, rng):
    image = c.paint(ground(x, WATER, rng), 0.75 - x.abs(), GRASS)
    image = c.paint(image, y.abs() - 0.26, (0.75, 0.72, 0.68))
    return c.paint(image, y.abs() - 0.1, ROAD)


def harbor(image, x, y, rng):
    """Three jetties with boats between them."""
    image = c.paint(ground(x, WATER, rng), 0.55 - y, (0.6, 0.58, 0.55))
    image = c.paint(image, torch.maximum(wave(x, 0.66) - 0.06, -0.7 - y), (0.6, 0.45, 0.3))
    return c.paint(
        image, torch.maximum((wave(x, 0.66) - 0.22).abs() - 0.07, (wave(y, 0.5) - 0.16)).clamp_min(y - 0.45), PALE
    )


def stadium(image, x, y, rng):
    image = c.paint(ground(x, ROAD, rng), c.disc(x, y * 1.25, 0.92), (0.95, 0.93, 0.9))
    image = c.paint(image, c.disc(x, y * 1.25, 0.66), (0.75, 0.3, 0.2))
    return c.paint(image, c.box(x, y, 0.42, 0.26), (0.25, 0.7, 0.25))


def storage_tanks(image, x, y, rng):
    image = ground(x, (0.55, 0.5, 0.42), rng)
    cells_x, cells_y = wave(x + 0.4, 0.8), wave(y + 0.4, 0.8)
    image = c.paint(image, c.disc(cells_x - 0.05, cells_y - 0.05, 0.33), (0.2, 0.18, 0.16))
    return c.paint(image, c.disc(cells_x, cells_y, 0.3), 0.98)


def roundabout(image, x, y, rng):
    roads = torch.minimum(torch.minimum(x.abs(), y.abs()) - 0.17, c.disc(x, y, 0.68))
    return c.paint(c.paint(ground(x, GRASS, rng), roads, ROAD), c.disc(x, y, 0.36), (0.3, 0.75, 0.3))


def baseball(image, x, y, rng):
    wedge = torch.maximum(x.abs() - (0.75 - y), c.disc(x, y - 0.75, 1.45))
    image = c.paint(ground(x, GRASS, rng), wedge, (0.45, 0.8, 0.35))
    image = c.paint(image, torch.maximum(wedge, c.disc(x, y - 0.75, 0.95)), (0.8, 0.5, 0.28))
    return c.paint(image, c.box(*c.place(x, y, 0.0, 0.28, math.pi / 4), 0.22, 0.22), (0.45, 0.8, 0.35))


def tennis(image, x, y, rng):
    image = c.paint(ground(x, (0.2, 0.45, 0.35), rng), c.box(x, y, 0.62, 0.85), (0.75, 0.35, 0.25))
    lines = torch.minimum(c.box(x, y, 0.5, 0.75).abs(), torch.maximum(y.abs(), x.abs() - 0.5)) - 0.05
    return c.paint(image, lines, 1.0)


def parking(image, x, y, rng):
    """Two rows of cars of many colours."""
    n = len(x)
    colours = torch.rand(n, 24, 3, generator=rng) * 0.85 + 0.1
    index = ((x + 2.0) / 0.33).floor().clamp(0, 11).long() + 12 * (y > 0)
    paints = colours.gather(1, index.flatten(1)[:, :, None].expand(-1, -1, 3)).reshape(*x.shape, 3).permute(0, 3, 1, 2)
    bays = torch.maximum(0.05 - wave(x + 2.0 + 0.165, 0.33), (y.abs() - 0.5).abs() - 0.26)
    return c.paint(ground(x, (0.3, 0.3, 0.32), rng), bays, paints)


def island(image, x, y, rng):
    angle = torch.atan2(y, x)
    coast = 0.1 * torch.sin(3 * angle + c.per_image(c.uniform(len(x), 0.0, 6.3, rng)))
    image = c.paint(ground(x, (0.15, 0.5, 0.75), rng), c.disc(x, y, 0.68) + coast, SAND)
    return c.paint(image, c.disc(x, y, 0.46) + coast, (0.2, 0.5, 0.2))


def crossroads(image, x, y, rng):
    image = c.paint(ground(x, (0.7, 0.62, 0.5), rng), torch.minimum(x.abs(), y.abs()) - 0.28, ROAD)
    return c.paint(image, torch.minimum(x.abs(), y.abs()) - 0.05, (0.98, 0.9, 0.4))


def railway(image, x, y, rng):
    image = c.paint(ground(x, (0.5, 0.48, 0.35), rng), x.abs() - 0.62, (0.55, 0.42, 0.34))
    image = c.paint(image, torch.maximum(x.abs() - 0.5, wave(y, 0.36) - 0.08), (0.25, 0.17, 0.12))
    return c.paint(image, (x.abs() - 0.3).abs() - 0.06, (0.85, 0.87, 0.9))


def airplane(image, x, y, rng):
    wings = torch.maximum((y - 0.1 - 0.5 * (x.abs() - 0.3)).abs() - 0.14, x.abs() - 0.85)
    tail = torch.maximum((y - 0.72 - 0.4 * x.abs()).abs() - 0.09, x.abs() - 0.38)
    body = c.segment(x, y, 0.0, -0.75, 0.0, 0.75, 0.13)
    return c.paint(ground(x, (0.55, 0.55, 0.58), rng), torch.minimum(torch.minimum(wings, tail), body), 1.0)


def ship(image, x, y, rng):
    hull = torch.maximum(x.abs() - 0.32, torch.maximum(y - 0.8, x.abs() * 1.4 - y - 0.9))
    image = c.paint(ground(x, (0.08, 0.25, 0.5), rng), hull, (0.8, 0.25, 0.2))
    return c.paint(image, c.box(x, y - 0.5, 0.24, 0.18), 1.0)


def pool(image, x, y, rng):
    image = c.paint(ground(x, GRASS, rng), c.box(x, y, 0.8, 0.65), (0.93, 0.88, 0.78))
    return c.paint(image, torch.minimum(c.box(x, y, 0.55, 0.4), c.disc(x - 0.4, y, 0.4)), (0.2, 0.85, 0.95))


def solar(image, x, y, rng):
    """Rows of dark blue panels."""
    panels = torch.maximum(0.1 - wave(y, 0.5), 0.06 - wave(x, 0.8))
    return c.paint(ground(x, (0.8, 0.74, 0.55), rng), panels, (0.1, 0.12, 0.4))


def circles(image, x, y, rng):
    """One irrigated disc with a dark sector, its neighbours at the corners."""
    n = len(x)
    image = c.paint(ground(x, SAND, rng), c.disc(wave(x, 1.7) + 0.0, wave(y, 1.7), 0.32), (0.55, 0.7, 0.3))
    image = c.paint(image, c.disc(x, y, 0.75), (0.3, 0.68, 0.25))
    turned = c.place(x, y, 0.0, 0.0, c.uniform(n, -0.6, 0.6, rng))
    return c.paint(image, torch.maximum(c.disc(x, y, 0.75), torch.maximum(turned[0], turned[1])), (0.16, 0.4, 0.14))


def dam(image, x, y, rng):
    """Reservoir above, a curved wall, dry valley below."""
    wall = y - 0.1 + 0.3 * x * x
    image = c.paint(ground(x, (0.5, 0.42, 0.3), rng), wall, (0.1, 0.35, 0.6))
    return c.paint(image, wall.abs() - 0.16, PALE)


PAINTERS = (
    runway, bridge, harbor, stadium, storage_tanks, roundabout, baseball, tennis, parking,
    island, crossroads, railway, airplane, ship, pool, solar, circles, dam,
)  # fmt: skip


def survey(image: Tensor, rng: torch.Generator) -> Tensor:
    """The camera of the flight: shifted colours, then haze of varying density."""
    n = len(image)
    image = c.recolour(image, ((0.62, 0.06, 0.26), (0.35, 0.59, 0.0), (0.06, 0.35, 0.54)))
    haze = c.uniform(n, 0.1, 0.3, rng).reshape(-1, 1, 1, 1)
    image = image * (1 - haze) + 0.75 * haze
    return c.grain(c.blur(c.tint(image, 0.06, rng), 0.5), 0.02, rng)


def draw(labels: Tensor, style: str, rng: torch.Generator) -> Tensor:
    n, task = len(labels), style == "task"
    reach = 0.15 if task else 0.1
    x, y = c.place(
        *c.pixels(),
        c.uniform(n, -reach, reach, rng),
        c.uniform(n, -reach, reach, rng),
        c.uniform(n, 0.0, 2 * math.pi, rng) if task else c.uniform(n, -0.08, 0.08, rng),
        c.uniform(n, 0.85, 1.2, rng) if task else c.uniform(n, 0.92, 1.08, rng),
    )
    image = c.dispatch(c.blank(n, 0.0), labels, PAINTERS, x, y, rng=rng)
    return survey(image, rng) if task else c.grain(image, 0.01, rng)
