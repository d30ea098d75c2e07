"""Traffic signs, like GTSRB: a shape that carries its colour, times the symbol on it.

Classes: 26 combinations of five shapes and six symbols. "web" is the clean drawing from a rule book: nearly
centred and upright, pure colours on plain paper, pale or dark. "task" is the crop from a moving car at dusk: darker
and bluish, tilted, blurred, sometimes partly hidden, in front of a mottled background.
"""

import torch
from torch import Tensor

from tasks.mini import canvas as c
from tasks.mini import glyphs

SYMBOLS: dict[str, glyphs.Glyph] = {
    "left arrow": (((0.6, 0.0), (-0.6, 0.0)), ((0.0, -0.55), (-0.6, 0.0), (0.0, 0.55))),
    "right arrow": (((-0.6, 0.0), (0.6, 0.0)), ((0.0, -0.55), (0.6, 0.0), (0.0, 0.55))),
    "up arrow": (((0.0, 0.6), (0.0, -0.6)), ((-0.55, 0.0), (0.0, -0.6), (0.55, 0.0))),
    "bar": (((-0.65, 0.12), (0.65, 0.12)), ((-0.65, -0.12), (0.65, -0.12))),
    "cross": (((-0.5, -0.5), (0.5, 0.5)), ((-0.5, 0.5), (0.5, -0.5))),
    "ring": (glyphs.arc(0, 0, 0.48, 0.48, 0, 360, 16),),
}
TABLE = tuple(SYMBOLS.values())

# Border, face and symbol colour of each shape.
SHAPES: dict[str, tuple[tuple[float, float, float], ...]] = {
    "red circle": ((0.85, 0.05, 0.1), (0.97, 0.97, 0.97), (0.05, 0.05, 0.05)),
    "blue circle": ((0.95, 0.95, 0.95), (0.05, 0.25, 0.8), (1.0, 1.0, 1.0)),
    "triangle": ((0.85, 0.05, 0.1), (0.97, 0.97, 0.97), (0.05, 0.05, 0.05)),
    "diamond": ((0.05, 0.05, 0.05), (0.98, 0.8, 0.05), (0.05, 0.05, 0.05)),
    "octagon": ((0.95, 0.95, 0.95), (0.8, 0.05, 0.1), (1.0, 1.0, 1.0)),
}
COLOURS = torch.tensor(list(SHAPES.values()))

# No traffic code has all 30: these leave 26.
MISSING = {("triangle", "ring"), ("diamond", "bar"), ("octagon", "left arrow"), ("octagon", "right arrow")}
PAIRS = [(i, j) for i, shape in enumerate(SHAPES) for j, symbol in enumerate(SYMBOLS) if (shape, symbol) not in MISSING]
CLASSES = tuple(f"{list(SHAPES)[i]} with {list(SYMBOLS)[j]}" for i, j in PAIRS)


def draw(labels: Tensor, style: str, rng: torch.Generator) -> Tensor:
    return rule_book(labels, rng) if style == "web" else drive(labels, rng)


def rule_book(labels: Tensor, rng: torch.Generator) -> Tensor:
    n = len(labels)
    # Half of the catalogue is printed on dark paper: brightness alone must not break recognition.
    paper = torch.where(c.chance(n, 0.5, rng), 1.0, 0.3)
    image = c.blank(n, c.colour(n, 0.7, 0.95, rng) * paper[:, None])
    x, y = c.view(n, (0.12, 0.12), (-0.06, 0.06), (0.78, 0.98), rng)
    return c.tint(sign(image, labels, x, y), 0.15, rng)


def drive(labels: Tensor, rng: torch.Generator) -> Tensor:
    n = len(labels)
    image = c.blank(n, c.colour(n, 0.2, 0.5, rng)) * (0.7 + 0.6 * c.noise(n, 5, rng)[:, None])
    u, v = c.view(n, (0.14, 0.14), (-0.12, 0.12), (0.8, 0.98), rng)
    image = sign(image, labels, u * c.varied(n, 1.0, 1.12, rng), v)
    image = occlude(image, *c.pixels(), rng)
    # Dusk: little light, most of it blue, the same for the whole task; the strength varies.
    image = image * torch.tensor([0.65, 0.7, 0.9])[:, None, None] * c.varied(n, 0.65, 0.95, rng)[:, None]
    return c.grain(c.blur(image, c.uniform(n, 0.5, 1.0, rng)), 0.02, rng)


def sign(image: Tensor, labels: Tensor, x: Tensor, y: Tensor) -> Tensor:
    pairs = torch.tensor(PAIRS)[labels]
    shape, symbol = pairs[:, 0], pairs[:, 1]
    border, face, ink = COLOURS[shape].unbind(1)
    outline = shape_distance(shape, x, y)
    image = c.paint(image, outline, border)
    image = c.paint(image, outline + 0.14, face)
    # A triangle and a diamond leave less room; the triangle's lies low.
    room = torch.tensor([0.8, 0.88, 0.62, 0.74, 0.88])[shape]
    u, v = c.place(x, y, 0.0, torch.where(shape == 2, 0.24, 0.0), scale=room)
    return c.paint(image, glyphs.distance(TABLE, symbol, u, v) - 0.15, ink, soft=0.09)


def shape_distance(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    triangle = torch.maximum(0.87 * x.abs() - 0.5 * y - 0.45, y - 0.8)
    diamond = (x.abs() + y.abs() - 1.05) * 0.71
    octagon = torch.maximum(torch.maximum(x.abs(), y.abs()), (x.abs() + y.abs()) * 0.71) - 0.88
    round_ = c.disc(x, y, 0.92)
    kinds = shape.reshape(-1, 1, 1)
    return torch.where(kinds < 2, round_, torch.where(kinds == 2, triangle, torch.where(kinds == 3, diamond, octagon)))


def occlude(image: Tensor, x: Tensor, y: Tensor, rng: torch.Generator) -> Tensor:
    """A branch or pole over an edge of every third image."""
    n = len(image)
    side = c.uniform(n, 0.75, 0.95, rng) + torch.where(c.chance(n, 0.33, rng), 0.0, 9.0)
    u, v = c.place(x, y, angle=c.uniform(n, 0, 6.3, rng))
    return c.paint(image, c.box(u - c.per_image(side), v, 0.25, 3.0), c.colour(n, 0.05, 0.35, rng))
