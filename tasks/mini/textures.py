"""Texture words, like DTD: what pattern covers the image.

Classes: 18 adjectives, each one pattern about ten pixels in period. "web" is a flat swatch: dark pattern on a light
ground, upright, one period. "task" is a photo of a surface: rotated, scaled, warped, lit from one side, and mostly a
light pattern on a dark, earthy ground.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tasks.mini import canvas as c

Pattern = Callable[[Tensor, Tensor, torch.Generator], Tensor]
EARTH = torch.tensor([1.0, 0.8, 0.55])
EDGE = 0.12  # width of the soft edge of a pattern, in periods: about a pixel


def draw(labels: Tensor, style: str, rng: torch.Generator) -> Tensor:
    return swatch(labels, rng) if style == "web" else surface(labels, rng)


def swatch(labels: Tensor, rng: torch.Generator) -> Tensor:
    n = len(labels)
    u, v = c.view(n, (0.25, 0.25), None, (0.58, 0.68), rng)
    ground, ink = c.blank(n, c.colour(n, 0.65, 1.0, rng)), c.colour(n, 0.0, 0.35, rng)
    return mix(ground, ink, cover(labels, u, v, rng))


def surface(labels: Tensor, rng: torch.Generator) -> Tensor:
    n = len(labels)
    u, v = c.view(n, (0.3, 0.3), (-0.4, 0.4), (0.55, 0.75), rng)
    u, v = (axis + 0.3 * (c.noise(n, 2, rng) - 0.5) for axis in (u, v))
    dark, light = c.colour(n, 0.05, 0.3, rng) * EARTH, c.colour(n, 0.7, 1.0, rng) * EARTH
    swap = c.chance(n, 0.75, rng)
    ground, ink = c.blank(n, c.choose(swap, dark, light)), c.choose(swap, light, dark)
    return c.grain(c.side_light(mix(ground, ink, cover(labels, u, v, rng)), rng), 0.03, rng)


def mix(ground: Tensor, ink: Tensor, share: Tensor) -> Tensor:
    return ground + (ink[:, :, None, None] - ground) * share[:, None]


def cover(labels: Tensor, u: Tensor, v: Tensor, rng: torch.Generator) -> Tensor:
    """Share of ink in every pixel, [N, 32, 32]; u and v count periods."""
    return c.dispatch(labels, PATTERNS.values(), u, v, rng=rng)


def ink(distance: Tensor) -> Tensor:
    return (0.5 - distance / EDGE).clamp(0, 1)


def cell(u: Tensor) -> Tensor:
    """Position inside a period, -0.5 to 0.5."""
    return u - torch.floor(u) - 0.5


def honeycomb(u: Tensor, v: Tensor, _: torch.Generator) -> Tensor:
    tall = math.sqrt(3)
    first = cell(u), cell(v / tall) * tall
    second = cell(u - 0.5), cell(v / tall - 0.5) * tall
    nearer = first[0] ** 2 + first[1] ** 2 < second[0] ** 2 + second[1] ** 2
    a, b = (torch.where(nearer, p, q).abs() for p, q in zip(first, second, strict=True))
    return ink(0.38 - torch.maximum(a, a / 2 + b * tall / 2))


def scattered(count: int, points: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random points around the image, in periods, one per cell of a jittered lattice so that none crowd."""
    side = math.isqrt(points)
    base = (torch.arange(side) + 0.5) / side * 4.4 - 2.2
    jitter = (torch.rand(2, count, side, side, generator=rng) - 0.5) * (0.8 * 4.4 / side)
    return (base[None, :, None] + jitter[0]).flatten(1), (base[None, None, :] + jitter[1]).flatten(1)


def gaps(u: Tensor, v: Tensor, px: Tensor, py: Tensor) -> Tensor:
    """Distances to the points [N, P], [N, P, 32, 32]."""
    return torch.sqrt((u[:, None] - px[:, :, None, None]) ** 2 + (v[:, None] - py[:, :, None, None]) ** 2)


def cracked(u: Tensor, v: Tensor, rng: torch.Generator) -> Tensor:
    nearest, second = gaps(u, v, *scattered(len(u), 9, rng)).topk(2, dim=1, largest=False).values.unbind(1)
    return ink((second - nearest) / 2 - 0.1)


def bubbly(u: Tensor, v: Tensor, rng: torch.Generator) -> Tensor:
    px, py = scattered(len(u), 9, rng)
    radius = torch.rand(px.shape, generator=rng) * 0.2 + 0.4
    return ink((gaps(u, v, px, py) - radius[:, :, None, None]).abs().amin(1) - 0.13)


def bricked(u: Tensor, v: Tensor, _: torch.Generator) -> Tensor:
    row = torch.floor(v * 1.5)
    return ink(torch.minimum(cell(v * 1.5).abs() * -0.67 + 0.33, 0.7 - cell(u / 1.4 + row / 2).abs() * 1.4) - 0.09)


def scaly(u: Tensor, v: Tensor, _: torch.Generator) -> Tensor:
    row = torch.floor(v * 1.4)
    return ink((c.disc(cell(u + row / 2), (v - row / 1.4) * 0.8, 0.45)).abs() - 0.1)


def woven(u: Tensor, v: Tensor, _: torch.Generator) -> Tensor:
    across = (torch.floor(u) + torch.floor(v)) % 2 == 0
    return ink(cell(2 * torch.where(across, u, v)).abs() / 2 - 0.13)


def marbled(u: Tensor, v: Tensor, rng: torch.Generator) -> Tensor:
    drift = c.noise(len(u), 4, rng) * 2.2
    return (1 - 1.6 * torch.sin(math.pi * (0.5 * u + 0.3 * v + drift)).abs()).clamp(0, 1)


PATTERNS: dict[str, Pattern] = {
    "banded": lambda u, v, _: ink(cell(v * 0.8).abs() - 0.25),
    "lined": lambda u, v, _: 0.5 + 0.5 * torch.cos(2 * math.pi * v * 2.4),
    "zigzagged": lambda u, v, _: ink(cell(v + 1.1 * cell(u * 0.8).abs()).abs() - 0.22),
    "dotted": lambda u, v, _: ink(c.disc(cell(u), cell(v), 0.3)),
    "chequered": lambda u, v, _: (0.5 + 4 * torch.sin(math.pi * u) * torch.sin(math.pi * v)).clamp(0, 1),
    "grid": lambda u, v, _: ink(torch.minimum(cell(u).abs(), cell(v).abs()) - 0.12),
    "honeycomb": honeycomb,
    "woven": woven,
    "bricked": bricked,
    "scaly": scaly,
    "ringed": lambda u, v, _: ink(cell(c.disc(u, v, 0.0) * 1.1).abs() - 0.25),
    "spiralled": lambda u, v, _: ink(cell(c.disc(u, v, 0.0) * 0.8 + torch.atan2(v, u) / math.pi).abs() - 0.25),
    "rayed": lambda u, v, _: (0.5 + 2.5 * torch.cos(6 * torch.atan2(v, u))).clamp(0, 1),
    "cracked": cracked,
    "bubbly": bubbly,
    "marbled": marbled,
    "blotchy": lambda u, v, rng: ((c.noise(len(u), 4, rng) - 0.5) * 5 + 0.5).clamp(0, 1),
    "speckled": lambda u, v, rng: ((c.noise(len(u), 15, rng) - 0.55) * 5 + 0.5).clamp(0, 1),
}
CLASSES = tuple(f"{name} texture" for name in PATTERNS)
