"""Cars, after Stanford Cars: 5 makes in 5 bodies seen from the side, 25 classes ("falcon pickup").

The body is the silhouette. The make is its livery (stripe, bands, two-tone, roundel, plain), the size and colour of its
wheels and the block of colour at its front, each several pixels large. "web" is a catalogue drawing on a plain light
ground, facing right; "task" is the saleroom: facing left, before a wall of pale panels, under coloured lamps.
"""

import torch
from torch import Tensor

from . import canvas as c

MAKES = ("falcon", "lynx", "orca", "cobra", "bison")
BODIES = ("sedan", "hatchback", "pickup", "van", "convertible")
CLASSES = tuple(f"{make} {body}" for make in MAKES for body in BODIES)

# Per body: half length, roof height, roof from/to, foot of the cabin from/to, and where the windows begin.
SHAPE = torch.tensor(
    [
        [0.90, -0.42, -0.35, 0.20, -0.62, 0.50, -0.9],
        [0.64, -0.48, -0.58, 0.12, -0.64, 0.45, -0.9],
        [0.92, -0.50, 0.02, 0.36, -0.06, 0.58, -0.9],
        [0.86, -0.72, -0.86, 0.55, -0.86, 0.82, 0.0],
        [0.88, -0.36, 0.05, 0.14, 0.20, 0.40, 0.9],
    ]
)
# Per make: two paints, wheel radius, hub radius.
PAINT = torch.tensor([[0.88, 0.12, 0.12], [0.96, 0.8, 0.1], [0.95, 0.95, 0.95], [0.1, 0.6, 0.25], [0.15, 0.3, 0.85]])
ACCENT = torch.tensor([[1.0, 1.0, 1.0], [0.1, 0.1, 0.1], [0.1, 0.12, 0.2], [1.0, 0.95, 0.7], [0.95, 0.55, 0.1]])
WHEEL = torch.tensor([0.22, 0.22, 0.22, 0.22, 0.31])
HUB = torch.tensor([0.13, 0.05, 0.16, 0.09, 0.12])
HUB_PAINT = torch.tensor([[0.95, 0.95, 0.95], [0.5, 0.5, 0.5], [0.85, 0.1, 0.1], [1.0, 0.85, 0.2], [0.75, 0.75, 0.78]])
NONE = 9.0


def livery(make: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Where the accent colour goes, before it is cut to the car: one pattern per make; the fifth make is plain."""
    stripe = (y - 0.12).abs() - 0.1
    bands = 0.1 * torch.sin(x * 14.0)
    two_tone = y - 0.1
    roundel = c.disc(x + 0.02, y - 0.1, 0.24)
    patterns = torch.stack(torch.broadcast_tensors(stripe, bands, -two_tone, roundel, torch.full_like(x, NONE)))
    return patterns[make, torch.arange(len(make))]


def car(image: Tensor, make: Tensor, body: Tensor, x: Tensor, y: Tensor, paints: Tensor) -> Tensor:
    half, roof, left, right, foot_left, foot_right, window = SHAPE[body].unbind(1)
    hull = c.box(x, y - 0.15, half, 0.22)
    cabin = c.trapezoid(x, y, roof, torch.full_like(roof, 0.0), left, right, foot_left, foot_right)
    shell = torch.minimum(hull, cabin)
    image = c.paint(image, shell, paints[:, :3])
    image = c.paint(image, torch.maximum(shell, livery(make, x, y)), paints[:, 3:])
    glass = torch.maximum(cabin + 0.09, torch.maximum(c.per_image(window) - x, y + 0.06))
    image = c.paint(image, glass, (0.6, 0.85, 0.95))
    radius = c.per_image(WHEEL[make])
    for side in (-0.58, 0.58):
        wheel_x, wheel_y = x - c.per_image(side * half), y - 0.42
        image = c.paint(image, c.disc(wheel_x, wheel_y, 0.0) - radius, (0.06, 0.06, 0.07))
        image = c.paint(image, c.disc(wheel_x, wheel_y, HUB[make]), HUB_PAINT[make])
    # The front block: a bull bar for the last make, a nose in the accent colour for the others.
    bull = make == 4
    front = c.box(x - c.per_image(half), y - 0.1, torch.where(bull, 0.1, 0.08), torch.where(bull, 0.36, 0.14))
    return c.paint(image, front, paints[:, 3:])


def plain_ground(count: int, rng: torch.Generator) -> Tensor:
    return c.blank(count, c.uniform(count, 0.82, 0.95, rng)[:, None].expand(count, 3))


def saleroom(count: int, rng: torch.Generator) -> Tensor:
    """A pale wall with coloured panels and a greyer floor."""
    x, y = c.pixels()
    image = c.blank(count, c.colour(count, 0.74, 0.9, rng))
    for _ in range(2):
        across, width = c.uniform(count, -1.0, 1.0, rng), c.uniform(count, 0.1, 0.3, rng)
        image = c.paint(image, c.box(x - c.per_image(across), y + 0.5, width, 0.7), c.colour(count, 0.66, 0.9, rng))
    return c.paint(image, 0.35 - y.expand(count, -1, -1), c.colour(count, 0.62, 0.74, rng))


def draw(labels: Tensor, style: str, rng: torch.Generator) -> Tensor:
    n, task = len(labels), style == "task"
    make, body = labels // 5, labels % 5
    x, y = c.place(
        *c.pixels(),
        c.uniform(n, -0.08, 0.08, rng),
        c.uniform(n, -0.1, 0.15, rng),
        c.uniform(n, -0.1, 0.1, rng) if task else torch.zeros(n),
        c.uniform(n, 0.85, 1.1, rng) if task else c.uniform(n, 0.92, 1.05, rng),
    )
    spread = 0.12 if task else 0.06
    paints = torch.cat([PAINT[make], ACCENT[make]], 1) + (torch.rand(n, 6, generator=rng) * 2 - 1) * spread
    ground = saleroom(n, rng) if task else plain_ground(n, rng)
    image = car(ground, make, body, -x if task else x, y, paints)
    if task:
        # Sodium lamps: the same rotation of the hues in every picture.
        image = c.recolour(image, ((0.76, 0.21, 0.03), (0.03, 0.76, 0.18), (0.2, 0.03, 0.75)), (0.02, 0.01, 0.0))
        image = c.blur(c.tint(image, 0.1, rng), 0.3)
    return c.grain(image, 0.03 if task else 0.01, rng)
