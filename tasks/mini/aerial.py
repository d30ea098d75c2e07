"""Aerial views, after RESISC45: 18 sites from an aircraft.

A site is a large layout on a typical ground: a table of its ground and the shapes painted on it, in order. "web" is a
map-like picture, north up, in plain colours; "task" is the survey flight: any rotation and scale, one camera whose
colours are hazy and shifted, soft focus.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import canvas as c
from .canvas import both, box, disc, either, wave

Layer = tuple[Callable[[Tensor, Tensor], Tensor], tuple[float, float, float] | float]  # shape, colour
GRASS, ROAD, WATER, SAND = (0.35, 0.62, 0.3), (0.4, 0.4, 0.43), (0.12, 0.38, 0.7), (0.9, 0.78, 0.55)
PALE, LAWN = (0.92, 0.92, 0.9), (0.45, 0.8, 0.35)


def ground(x: Tensor, rgb: tuple[float, float, float], rng: torch.Generator) -> Tensor:
    """The ground of a site, a little different in each image."""
    return c.blank(len(x), torch.tensor(rgb) + c.colour(len(x), -0.05, 0.05, rng))


def parking(x, y, rng):
    """Two rows of cars of many colours."""
    colours = torch.rand(len(x), 24, 3, generator=rng) * 0.85 + 0.1
    index = ((x + 2.0) / 0.33).floor().clamp(0, 11).long() + 12 * (y > 0)
    paints = colours.gather(1, index.flatten(1)[:, :, None].expand(-1, -1, 3)).reshape(*x.shape, 3).permute(0, 3, 1, 2)
    bays = both(0.05 - wave(x + 2.0 + 0.165, 0.33), (y.abs() - 0.5).abs() - 0.26)
    return c.paint(ground(x, (0.3, 0.3, 0.32), rng), bays, paints)


def island(x, y, rng):
    coast = 0.1 * torch.sin(3 * torch.atan2(y, x) + c.varied(len(x), 0.0, 6.3, rng))
    image = ground(x, (0.15, 0.5, 0.75), rng)
    return c.layered(image, [(disc(x, y, 0.68) + coast, SAND), (disc(x, y, 0.46) + coast, (0.2, 0.5, 0.2))])


def circles(x, y, rng):
    """One irrigated disc with a dark sector, its neighbours at the corners."""
    image = c.paint(ground(x, SAND, rng), disc(wave(x, 1.7) + 0.0, wave(y, 1.7), 0.32), (0.55, 0.7, 0.3))
    image = c.paint(image, disc(x, y, 0.75), (0.3, 0.68, 0.25))
    turned = c.place(x, y, 0.0, 0.0, c.uniform(len(x), -0.6, 0.6, rng))
    return c.paint(image, both(disc(x, y, 0.75), *turned), (0.16, 0.4, 0.14))


def wedge(x, y):
    return both(x.abs() - (0.75 - y), disc(x, y - 0.75, 1.45))


def airplane(x, y):
    wings = both((y - 0.1 - 0.5 * (x.abs() - 0.3)).abs() - 0.14, x.abs() - 0.85)
    tail = both((y - 0.72 - 0.4 * x.abs()).abs() - 0.09, x.abs() - 0.38)
    return either(wings, tail, c.segment(x, y, 0.0, -0.75, 0.0, 0.75, 0.13))


def wall(x, y):
    return y - 0.1 + 0.3 * x * x


# Ground colour and layers, or a painter of its own where a site has draws of its own.
SITES: dict[str, Callable | tuple[tuple[float, float, float], list[Layer]]] = {
    "airport runway": (GRASS, [
        (lambda x, y: x.abs() - 0.36, (0.25, 0.25, 0.28)),
        (lambda x, y: both(x.abs() - 0.07, 0.14 - wave(y, 0.55)), 1.0)]),
    "bridge": (WATER, [
        (lambda x, y: 0.75 - x.abs(), GRASS), (lambda x, y: y.abs() - 0.26, (0.75, 0.72, 0.68)),
        (lambda x, y: y.abs() - 0.1, ROAD)]),
    "harbor": (WATER, [  # three jetties with boats between them
        (lambda x, y: 0.55 - y, (0.6, 0.58, 0.55)),
        (lambda x, y: both(wave(x, 0.66) - 0.06, -0.7 - y), (0.6, 0.45, 0.3)),
        (lambda x, y: both((wave(x, 0.66) - 0.22).abs() - 0.07, wave(y, 0.5) - 0.16).clamp_min(y - 0.45), PALE)]),
    "stadium": (ROAD, [
        (lambda x, y: disc(x, y * 1.25, 0.92), (0.95, 0.93, 0.9)),
        (lambda x, y: disc(x, y * 1.25, 0.66), (0.75, 0.3, 0.2)),
        (lambda x, y: box(x, y, 0.42, 0.26), (0.25, 0.7, 0.25))]),
    "storage tanks": ((0.55, 0.5, 0.42), [
        (lambda x, y: disc(wave(x + 0.4, 0.8) - 0.05, wave(y + 0.4, 0.8) - 0.05, 0.33), (0.2, 0.18, 0.16)),
        (lambda x, y: disc(wave(x + 0.4, 0.8), wave(y + 0.4, 0.8), 0.3), 0.98)]),
    "roundabout": (GRASS, [
        (lambda x, y: either(either(x.abs(), y.abs()) - 0.17, disc(x, y, 0.68)), ROAD),
        (lambda x, y: disc(x, y, 0.36), (0.3, 0.75, 0.3))]),
    "baseball diamond": (GRASS, [
        (wedge, LAWN), (lambda x, y: both(wedge(x, y), disc(x, y - 0.75, 0.95)), (0.8, 0.5, 0.28)),
        (lambda x, y: box(*c.place(x, y, 0.0, 0.28, math.pi / 4), 0.22, 0.22), LAWN)]),
    "tennis court": ((0.2, 0.45, 0.35), [
        (lambda x, y: box(x, y, 0.62, 0.85), (0.75, 0.35, 0.25)),
        (lambda x, y: either(box(x, y, 0.5, 0.75).abs(), both(y.abs(), x.abs() - 0.5)) - 0.05, 1.0)]),
    "parking lot": parking,
    "island": island,
    "crossroads": ((0.7, 0.62, 0.5), [
        (lambda x, y: either(x.abs(), y.abs()) - 0.28, ROAD),
        (lambda x, y: either(x.abs(), y.abs()) - 0.05, (0.98, 0.9, 0.4))]),
    "railway": ((0.5, 0.48, 0.35), [
        (lambda x, y: x.abs() - 0.62, (0.55, 0.42, 0.34)),
        (lambda x, y: both(x.abs() - 0.5, wave(y, 0.36) - 0.08), (0.25, 0.17, 0.12)),
        (lambda x, y: (x.abs() - 0.3).abs() - 0.06, (0.85, 0.87, 0.9))]),
    "airplane": ((0.55, 0.55, 0.58), [(airplane, 1.0)]),
    "ship": ((0.08, 0.25, 0.5), [
        (lambda x, y: both(x.abs() - 0.32, y - 0.8, x.abs() * 1.4 - y - 0.9), (0.8, 0.25, 0.2)),
        (lambda x, y: box(x, y - 0.5, 0.24, 0.18), 1.0)]),
    "swimming pool": (GRASS, [
        (lambda x, y: box(x, y, 0.8, 0.65), (0.93, 0.88, 0.78)),
        (lambda x, y: either(box(x, y, 0.55, 0.4), disc(x - 0.4, y, 0.4)), (0.2, 0.85, 0.95))]),
    "solar farm": ((0.8, 0.74, 0.55), [(lambda x, y: both(0.1 - wave(y, 0.5), 0.06 - wave(x, 0.8)), (0.1, 0.12, 0.4))]),
    "circular farmland": circles,
    "dam": ((0.5, 0.42, 0.3), [(wall, (0.1, 0.35, 0.6)), (lambda x, y: wall(x, y).abs() - 0.16, PALE)]),
}  # fmt: skip
CLASSES = tuple(SITES)


def painter(site: Callable | tuple[tuple[float, float, float], list[Layer]]) -> Callable[..., Tensor]:
    """What draws a site: its own painter, or ground and layers in order."""
    if callable(site):
        return site
    return lambda x, y, rng: c.layered(ground(x, site[0], rng), [(shape(x, y), colour) for shape, colour in site[1]])


PAINTERS = tuple(map(painter, SITES.values()))


def survey(image: Tensor, rng: torch.Generator) -> Tensor:
    """The camera of the flight: shifted colours, then haze of varying density."""
    image = c.recolour(image, ((0.62, 0.06, 0.26), (0.35, 0.59, 0.0), (0.06, 0.35, 0.54)))
    haze = c.varied(len(image), 0.1, 0.3, rng)[:, None]
    image = image * (1 - haze) + 0.75 * haze
    return c.grain(c.blur(c.tint(image, 0.06, rng), 0.5), 0.02, rng)


def draw(labels: Tensor, style: str, rng: torch.Generator) -> Tensor:
    flight = style == "task"
    view = ((0.15, 0.15), (0.0, 2 * math.pi), (0.85, 1.2)) if flight else ((0.1, 0.1), (-0.08, 0.08), (0.92, 1.08))
    x, y = c.view(len(labels), *view, rng)
    image = c.dispatch(labels, PAINTERS, x, y, rng=rng)
    return survey(image, rng) if flight else c.grain(image, 0.01, rng)
