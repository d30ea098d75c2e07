"""Line-drawn symbols as look-up tables of distances, and the ten digits that `street` and `digits` share.

A glyph is a tuple of polylines in a box of about [-0.5, 0.5] x [-0.8, 0.8], y downwards. A batch mixes glyphs, so
their distance fields are tabulated once on a fine grid; drawing a glyph under any warp is then a single look-up.
"""

import math
from functools import cache

import torch
from torch import Tensor

from tasks.mini import canvas as c

Polyline = tuple[tuple[float, float], ...]
Glyph = tuple[Polyline, ...]

REACH = 1.5  # the tables cover [-REACH, REACH]; beyond that the value at the border stands in
CELLS = 128  # a cell is 0.023 wide, under half a pixel at every scale in use


def arc(cx: float, cy: float, rx: float, ry: float, start: float, stop: float, parts: int = 10) -> Polyline:
    """Part of an ellipse; degrees, 0 is right and 90 is down."""
    angles = [math.radians(start + (stop - start) * i / parts) for i in range(parts + 1)]
    return tuple((cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles)


PRINTED: tuple[Glyph, ...] = (
    (arc(0, 0, 0.46, 0.8, 0, 360, 16),),
    (((-0.28, -0.5), (0.05, -0.8), (0.05, 0.8)),),
    ((*arc(0, -0.38, 0.44, 0.42, -170, 35), (-0.46, 0.8), (0.48, 0.8)),),
    (arc(-0.02, -0.4, 0.42, 0.4, -150, 90), arc(-0.02, 0.4, 0.46, 0.4, -90, 150)),
    (((0.24, 0.8), (0.24, -0.8), (-0.5, 0.3), (0.52, 0.3)),),
    (((0.42, -0.8), (-0.36, -0.8), (-0.4, -0.12), *arc(0, 0.3, 0.46, 0.5, -130, 150)),),
    (((0.34, -0.8), *arc(0.1, 0.3, 0.56, 0.9, -120, -180, 5)), arc(0, 0.36, 0.45, 0.44, 0, 360, 14)),
    (((-0.48, -0.8), (0.48, -0.8), (-0.12, 0.8)),),
    (arc(0, -0.41, 0.38, 0.39, 0, 360, 14), arc(0, 0.39, 0.46, 0.41, 0, 360, 14)),
    (arc(0, -0.36, 0.45, 0.44, 0, 360, 14), ((-0.34, 0.8), *arc(-0.1, -0.3, 0.56, 0.9, 60, 0, 5))),
)

# Other ways to write the same digits: only the "task" styles use them.
WRITTEN: tuple[Glyph, ...] = (
    (arc(0, 0, 0.36, 0.8, -60, 300, 16),),
    (((0.05, -0.8), (-0.05, 0.8)), ((-0.3, 0.8), (0.25, 0.8))),
    (((-0.4, -0.62), (0.05, -0.8), (0.42, -0.45), (0.1, 0.2), (-0.45, 0.75)), ((-0.45, 0.7), (0.5, 0.8))),
    (((-0.42, -0.8), (0.42, -0.8), (-0.05, -0.15)), arc(-0.04, 0.34, 0.48, 0.48, -95, 150)),
    (((-0.3, -0.8), (-0.46, 0.1), (0.46, 0.1)), ((0.32, -0.5), (0.2, 0.8))),
    (((0.5, -0.74), (-0.26, -0.8), (-0.36, -0.15), (0.2, -0.1), (0.42, 0.3), (0.1, 0.75), (-0.42, 0.75)),),
    (((0.2, -0.8), (-0.3, -0.1), (-0.38, 0.4), *arc(0, 0.42, 0.38, 0.38, 180, -180, 12)),),
    (((-0.45, -0.7), (0.45, -0.8), (0.0, 0.8)), ((-0.2, 0.05), (0.4, 0.0))),
    (((0.4, -0.7), (-0.3, -0.6), (0.38, 0.45), (0.0, 0.8), (-0.38, 0.45), (0.4, -0.7)),),
    (arc(-0.04, -0.4, 0.36, 0.38, 0, 360, 12), ((0.34, -0.6), (0.2, 0.8))),
)

DIGITS = PRINTED + WRITTEN
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@cache
def table(glyphs: tuple[Glyph, ...]) -> Tensor:
    """Distance to the lines of every glyph, [glyphs, CELLS, CELLS]."""
    axis = ((torch.arange(CELLS) + 0.5) / CELLS * 2 - 1) * REACH
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    lines = [torch.stack([c.strokes(x, y, list(line), 0.0) for line in glyph]).amin(0) for glyph in glyphs]
    return torch.stack([line.reshape(CELLS, CELLS) for line in lines])


def distance(glyphs: tuple[Glyph, ...], index: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Distance of the points x, y [N, H, W] to the lines of glyph `index[n]`; subtract the half-width of the pen."""
    column, row = (((axis / REACH + 1) * (CELLS / 2)).long().clamp_(0, CELLS - 1) for axis in (x, y))
    cell = (index[:, None, None] * CELLS + row) * CELLS + column
    return table(glyphs).flatten()[cell]


def digits(index: Tensor, x: Tensor, y: Tensor, pen: tuple[float, float], rng: torch.Generator) -> Tensor:
    """Distance to digits drawn with a pen whose half-width is drawn from a range."""
    return distance(DIGITS, index, x, y) - c.varied(len(index), *pen, rng)


def written(labels: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """The glyphs of digits, a share of them in the other way of writing."""
    return labels + 10 * c.chance(len(labels), share, rng)
