"""Scenes, after SUN397: 8 places under 4 conditions of light and weather, 32 classes ("beach at sunset").

The place is a structure of about half the image (parasol, peak, skyline ...), the condition is the palette of
everything. "web" is a clean upright drawing; "task" looks like an old holiday print: cross-processed colours, lifted
blacks, a tilted and zoomed frame, vignette and film grain.
"""

import torch
from torch import Tensor

from . import canvas as c

PLACES = ("beach", "mountain", "forest", "desert", "city", "castle", "farm", "waterfall")
CONDITIONS = ("by day", "at sunset", "at night", "in snow")
CLASSES = tuple(f"{place} {condition}" for place in PLACES for condition in CONDITIONS)

# One row per condition: colours of the sky (top, horizon), of its light (sun or moon), and the gain of the ground.
SKY_TOP = torch.tensor([[0.25, 0.55, 0.95], [0.45, 0.2, 0.5], [0.02, 0.03, 0.12], [0.68, 0.72, 0.78]])
SKY_LOW = torch.tensor([[0.7, 0.88, 1.0], [1.0, 0.6, 0.2], [0.08, 0.1, 0.3], [0.88, 0.9, 0.93]])
ORB = torch.tensor([[1.0, 0.95, 0.4], [1.0, 0.85, 0.3], [0.95, 0.95, 0.85], [0.92, 0.93, 0.95]])
GAIN = torch.tensor([[1.0, 1.0, 1.0], [0.95, 0.55, 0.42], [0.3, 0.34, 0.5], [0.95, 0.97, 1.0]])
WHITE = torch.tensor([0.0, 0.0, 0.0, 0.62])


def lit(light: Tensor, red: float, green: float, blue: float) -> Tensor:
    """A surface colour under the light of each image: [N, 4] holds the gain per channel and the share of snow cover."""
    colour = torch.tensor([red, green, blue]) * light[:, :3]
    return colour + (0.97 - colour) * light[:, 3:]


def peak(x: Tensor, y: Tensor, dx, top, slope: float) -> Tensor:
    """The inside of an upright wedge below its tip."""
    return ((x - c.per_image(dx)).abs() * slope - (y - c.per_image(top))) / (1 + slope * slope) ** 0.5


def beach(x, y, light, rng):
    side = c.varied(len(x), -0.45, 0.45, rng)
    return [
        (0.0 - y, (0.1, 0.5, 0.75)),
        (0.36 + 0.06 * torch.sin(4 * x + side * 9) - y, (0.95, 0.85, 0.55)),
        (c.segment(x - side, y, 0.0, 0.1, 0.0, 0.75, 0.045), (0.45, 0.3, 0.2)),
        (torch.maximum(c.disc(x - side, y - 0.25, 0.45), y - 0.2), (0.95, 0.2, 0.25)),
    ]


def mountain(x, y, light, rng):
    dx, top = c.uniform(len(x), -0.35, 0.35, rng), c.uniform(len(x), -0.75, -0.55, rng)
    body = peak(x, y, dx, top, 1.3)
    return [
        (peak(x, y, -1.6 * dx, top + 0.4, 1.2), (0.4, 0.42, 0.5)),
        (body, (0.5, 0.48, 0.5)),
        (torch.maximum(body, y - c.per_image(top) - 0.38), (1.0, 1.0, 1.0)),
        (0.6 - y, (0.35, 0.6, 0.3)),
    ]


def forest(x, y, light, rng):
    phase = c.varied(len(x), 0.0, 0.5, rng)
    trees = [(torch.maximum(peak(torch.remainder(x + phase + shift, 0.5) - 0.25, y, 0.0, top, 4.5), y - 0.65),
              (0.05, green, 0.12)) for shift, top, green in ((0.25, -0.6, 0.3), (0.0, -0.35, 0.45))]  # fmt: skip
    return [(0.45 - y, (0.3, 0.4, 0.15)), *trees]


def desert(x, y, light, rng):
    phase, side = c.varied(len(x), 0.0, 6.3, rng), c.varied(len(x), -0.45, 0.45, rng)
    plant = c.segment(x - side, y, 0.0, -0.4, 0.0, 0.6, 0.1)
    arms = c.strokes(x - side, y, [(-0.34, -0.2), (-0.34, 0.1), (0.34, 0.1), (0.34, -0.3)], 0.075)
    return [
        (0.1 + 0.14 * torch.sin(3 * x + phase) - y, (0.85, 0.55, 0.25)),
        (0.5 + 0.1 * torch.sin(2.5 * x - phase) - y, (0.98, 0.72, 0.38)),
        (torch.minimum(plant, arms), (0.1, 0.5, 0.2)),
    ]


def city(x, y, light, rng):
    heights = torch.rand(len(x), 16, generator=rng) * 0.75 - 0.75
    column = ((x + 1.9) / 0.3).floor().clamp(0, 15).long()
    houses = heights.gather(1, column.flatten(1)).reshape(x.shape) - y
    windows = torch.maximum(torch.sin(21 * x + 0.8) + 0.2, torch.sin(21 * y)) * -0.05
    lamp = torch.tensor([1.0, 0.9, 0.5]) * (0.55 + 0.4 * (light[:, :1] < 0.5))
    return [
        (houses, (0.42, 0.44, 0.5)),
        (torch.maximum(torch.maximum(0.02 + windows, houses + 0.1), y - 0.5), lamp),
        (0.6 - y, (0.3, 0.3, 0.32)),
    ]


def castle(x, y, light, rng):
    x = x - c.varied(len(x), -0.2, 0.2, rng)
    merlons, mirrored = 0.08 * torch.sign(torch.sin(24 * x)), x.abs()
    return [
        (0.45 + 0.1 * x * x - y, (0.4, 0.65, 0.3)),
        (torch.maximum(c.box(x, y - 0.2, 0.6, 0.4), -0.1 + merlons - y), (0.68, 0.6, 0.52)),
        (c.box(mirrored - 0.58, y - 0.1, 0.2, 0.5), (0.6, 0.52, 0.45)),
        (torch.maximum(peak(mirrored, y, 0.58, -0.85, 1.9), y + 0.35), (0.3, 0.25, 0.65)),
        (torch.minimum(c.box(x, y - 0.45, 0.16, 0.16), c.disc(x, y - 0.3, 0.16)), (0.2, 0.13, 0.1)),
    ]


def farm(x, y, light, rng):
    side = c.per_image(torch.where(c.chance(len(x), 0.5, rng), 0.4, -0.4) + c.uniform(len(x), -0.1, 0.1, rng))
    furrows = torch.sin(14 * x / (y + 0.4).clamp_min(0.3))
    x = x - side
    return [
        (0.1 - y, (0.85, 0.8, 0.3)),
        (torch.maximum(0.12 - y, furrows * 0.1), (0.4, 0.55, 0.15)),
        (c.box(x, y - 0.05, 0.4, 0.3), (0.8, 0.12, 0.1)),
        (torch.maximum(peak(x, y, 0.0, -0.6, 0.75), y + 0.2), (0.45, 0.1, 0.1)),
        (c.box(x, y - 0.18, 0.13, 0.17), (0.98, 0.95, 0.9)),
    ]


def waterfall(x, y, light, rng):
    side = c.varied(len(x), -0.25, 0.25, rng)
    rough = 0.12 * torch.sin(9 * x + side * 20)
    water = torch.maximum((x - side).abs() - 0.25 - 0.08 * y, -0.5 - y)
    return [
        (-0.5 + rough - y, (0.42, 0.33, 0.25)),
        (torch.maximum(rough - 0.1 - y, 0.5 - (x - side).abs()), (0.3, 0.24, 0.18)),
        (0.6 - y, (0.15, 0.5, 0.65)),
        (torch.maximum(water, y - 0.75), (0.85, 0.95, 1.0)),
    ]


def painter(scene):
    """What draws a place: its layers, a surface colour under the light of each image (a tensor is a light itself)."""

    def paint(image, x, y, light, rng):
        layers = scene(x, y, light, rng)
        return c.layered(image, [(d, rgb if isinstance(rgb, Tensor) else lit(light, *rgb)) for d, rgb in layers])

    return paint


PAINTERS = tuple(map(painter, (beach, mountain, forest, desert, city, castle, farm, waterfall)))


def sky(condition: Tensor, x: Tensor, y: Tensor, rng: torch.Generator) -> Tensor:
    """Gradient plus sun or moon; the sunset's sun is large and low."""
    n = len(condition)
    ramp = ((y + 1) / 1.1).clamp(0, 1)[:, None]
    image = SKY_TOP[condition][:, :, None, None] * (1 - ramp) + SKY_LOW[condition][:, :, None, None] * ramp
    side = torch.where(c.chance(n, 0.5, rng), 0.6, -0.6) + c.uniform(n, -0.15, 0.15, rng)
    low = condition == 1
    up = torch.where(low, -0.15, -0.68) + c.uniform(n, -0.08, 0.08, rng)
    radius = torch.where(low, 0.36, 0.2)
    return c.paint(image, c.disc(x - c.per_image(side), y - c.per_image(up), radius), ORB[condition])


def snowfall(image: Tensor, snowing: Tensor, rng: torch.Generator) -> Tensor:
    flakes = (torch.rand(len(image), 1, c.SIZE, c.SIZE, generator=rng) < 0.06) & snowing[:, None, None, None]
    return torch.where(flakes, 1.0, image)


def old_print(image: Tensor, x: Tensor, y: Tensor, rng: torch.Generator) -> Tensor:
    """The systematic look of the task: cross-processed film with lifted blacks and dark corners."""
    image = c.recolour(image, ((0.58, 0.23, 0.05), (0.05, 0.6, 0.21), (0.28, 0.05, 0.53)), (0.09, 0.07, 0.06))
    image = image * (1.1 - 0.22 * (x * x + y * y))[:, None]
    return c.grain(c.blur(c.tint(image, 0.08, rng), 0.6), 0.03, rng)


def draw(labels: Tensor, style: str, rng: torch.Generator) -> Tensor:
    n, printed = len(labels), style == "task"
    where, condition = labels // 4, labels % 4
    x, y = c.view(n, *(((0.2, 0.2), (-0.2, 0.2), (0.85, 1.35)) if printed else ((0.08, 0.08), None, (0.92, 1.08))), rng)
    light = torch.cat([GAIN[condition] * c.uniform(n, 0.9, 1.05, rng)[:, None], WHITE[condition][:, None]], 1)
    image = c.dispatch(where, PAINTERS, sky(condition, x, y, rng), x, y, light, rng=rng)
    image = snowfall(image, condition == 3, rng)
    return old_print(image, *c.pixels(), rng) if printed else c.grain(image, 0.01, rng)
