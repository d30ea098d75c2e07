"""Vectorised 32x32 drawing: signed distance fields painted on a batch of float images.

Coordinates run from -1 (left, top) to 1 (right, bottom). Every argument that differs between the images of a batch
is a tensor of N values; `per_image` reshapes it to [N, 1, 1]. Distances are negative inside a shape.
"""

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SIZE = 32
PIXEL = 2.0 / SIZE
Number = Tensor | float  # one per image, [N], or the same for all


def per_image(values: Number) -> Number:
    """[N] -> [N, 1, 1], so that it broadcasts over the pixels; scalars pass through."""
    return values.reshape(-1, 1, 1) if isinstance(values, Tensor) else values


def uniform(count: int, low: float, high: float, rng: torch.Generator) -> Tensor:
    """N draws from [low, high)."""
    return torch.rand(count, generator=rng) * (high - low) + low


def varied(count: int, low: float, high: float, rng: torch.Generator) -> Tensor:
    """N draws from [low, high), [N, 1, 1]."""
    return uniform(count, low, high, rng).reshape(-1, 1, 1)


def chance(count: int, probability: float, rng: torch.Generator) -> Tensor:
    """N booleans, true with the given probability."""
    return torch.rand(count, generator=rng) < probability


def colour(count: int, low: float, high: float, rng: torch.Generator) -> Tensor:
    """N random RGB colours, [N, 3]."""
    return torch.rand(count, 3, generator=rng) * (high - low) + low


def blank(count: int, rgb: Tensor | tuple[float, float, float] | float) -> Tensor:
    """N images of one colour each: a float, a triple or a tensor [N, 3]."""
    fill = torch.as_tensor(rgb, dtype=torch.float32)
    fill = fill.reshape(1, 1).expand(1, 3) if fill.ndim == 0 else fill.reshape(-1, 3)
    return fill[:, :, None, None].expand(count, 3, SIZE, SIZE).clone()


def pixels() -> tuple[Tensor, Tensor]:
    """x and y of every pixel centre, [1, 32, 32] each."""
    axis = (torch.arange(SIZE) + 0.5) * PIXEL - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x[None], y[None]


def place(
    x: Tensor, y: Tensor, dx: Number = 0.0, dy: Number = 0.0, angle: Number = 0.0, scale: Number = 1.0
) -> tuple[Tensor, Tensor]:
    """Coordinates inside an object that is scaled, rotated by `angle` radians and moved by (dx, dy)."""
    x, y = x - per_image(dx), y - per_image(dy)
    angle = torch.as_tensor(angle, dtype=torch.float32)
    cos, sin = per_image(torch.cos(angle)), per_image(torch.sin(angle))
    return (cos * x + sin * y) / per_image(scale), (cos * y - sin * x) / per_image(scale)


def view(
    count: int, shift: tuple[float, float], turn: tuple[float, float] | None, zoom: tuple[float, float],
    rng: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Coordinates of a whole picture: moved by up to `shift`, rotated (None: upright) and scaled within ranges."""
    dx, dy = (uniform(count, -most, most, rng) for most in shift)
    angle = torch.zeros(count) if turn is None else uniform(count, *turn, rng)
    return place(*pixels(), dx, dy, angle, uniform(count, *zoom, rng))


def wave(x: Tensor, period: float) -> Tensor:
    """A triangle wave: the distance to the nearest line of a grating, zero half a period off the origin."""
    return (torch.remainder(x, period) - period / 2).abs()


def both(*distances: Tensor) -> Tensor:
    """Inside of all shapes."""
    return reduce(torch.maximum, distances)


def either(*distances: Tensor) -> Tensor:
    """Inside of any of the shapes."""
    return reduce(torch.minimum, distances)


def disc(x: Tensor, y: Tensor, radius: Number) -> Tensor:
    return torch.sqrt(x * x + y * y + 1e-9) - per_image(radius)


def box(x: Tensor, y: Tensor, half_width: Number, half_height: Number) -> Tensor:
    qx, qy = x.abs() - per_image(half_width), y.abs() - per_image(half_height)
    outside = torch.sqrt(qx.clamp_min(0) ** 2 + qy.clamp_min(0) ** 2 + 1e-12)
    return outside + torch.maximum(qx, qy).clamp_max(0)


def segment(x: Tensor, y: Tensor, ax: Number, ay: Number, bx: Number, by: Number, width: Number) -> Tensor:
    """A stroke of half-width `width` from (ax, ay) to (bx, by)."""
    ax, ay, bx, by = per_image(ax), per_image(ay), per_image(bx), per_image(by)
    dx, dy = bx - ax, by - ay
    t = (((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy + 1e-9)).clamp(0, 1)
    return torch.sqrt((x - ax - t * dx) ** 2 + (y - ay - t * dy) ** 2 + 1e-9) - per_image(width)


def strokes(x: Tensor, y: Tensor, points: Sequence[tuple[float, float]], width: Number) -> Tensor:
    """A polyline through `points`, the same for the whole batch."""
    lines = [segment(x, y, *a, *b, width) for a, b in pairwise(points)]
    return torch.stack(lines).amin(0)


def paint(
    image: Tensor, distance: Tensor, rgb: Tensor | tuple[float, float, float] | float, soft: float = PIXEL
) -> Tensor:
    """Cover the inside of `distance` [N or 1, H, W] with a colour (float, triple, [N, 3] or image [N, 3, H, W])."""
    cover = (0.5 - distance / soft).clamp(0, 1)[:, None]
    ink = torch.as_tensor(rgb, dtype=torch.float32)
    if ink.ndim == 0:
        ink = ink.reshape(1, 1, 1, 1)
    elif ink.ndim < 4:
        ink = ink.reshape(-1, 3, 1, 1)
    return image * (1 - cover) + ink * cover


def layered(image: Tensor, layers: Iterable[tuple[Tensor, Any]]) -> Tensor:
    """Distances with their colours painted one over the other."""
    for distance, rgb in layers:
        image = paint(image, distance, rgb)
    return image


def choose(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Per image: `yes` where the boolean mask [N] is set, else `no`."""
    return torch.where(mask.reshape(-1, *[1] * (yes.ndim - 1)), yes, no)


def noise(count: int, cells: int, rng: torch.Generator) -> Tensor:
    """Smooth value noise in [0, 1] with about `cells` bumps along a side, [N, 32, 32]."""
    grid = torch.rand(count, 1, cells + 1, cells + 1, generator=rng)
    return functional.interpolate(grid, (SIZE, SIZE), mode="bicubic", align_corners=True)[:, 0].clamp(0, 1)


def grain(image: Tensor, amount: Tensor | float, rng: torch.Generator) -> Tensor:
    """Independent Gaussian noise on every value; `amount` is its standard deviation, scalar or [N]."""
    amount = amount.reshape(-1, 1, 1, 1) if isinstance(amount, Tensor) else amount
    return image + torch.randn(image.shape, generator=rng) * amount


def blur(image: Tensor, amount: Number) -> Tensor:
    """Mix with a 3x3 binomial blur; 0 is sharp, 1 is the full blur; scalar or [N]."""
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel[None] / 16).expand(3, 1, 3, 3)
    soft = functional.conv2d(functional.pad(image, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    amount = amount.reshape(-1, 1, 1, 1) if isinstance(amount, Tensor) else amount
    return image + (soft - image) * amount


def tint(image: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """Random gain per colour channel and image in [1 - strength, 1 + strength]."""
    return image * (1 + strength * (2 * torch.rand(len(image), 3, 1, 1, generator=rng) - 1))


def recolour(
    image: Tensor, rows: tuple[tuple[float, float, float], ...], offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> Tensor:
    """A systematic change of palette: every output channel is a fixed mixture of the input channels plus an offset."""
    mixed = torch.einsum("oc,nchw->nohw", torch.tensor(rows), image.clamp(0, 1))
    return mixed + torch.tensor(offset).reshape(1, 3, 1, 1)


def side_light(image: Tensor, rng: torch.Generator) -> Tensor:
    """Light that falls in from any side."""
    along, _ = place(*pixels(), angle=uniform(len(image), 0, 6.3, rng))
    return image * (1 + 0.2 * along)[:, None]


def dispatch(kind: Tensor, painters: Iterable, *fields: Tensor, rng: torch.Generator) -> Tensor:
    """[N, ...]: what `painters[k]` draws for the samples of kind k; every field ([N, ...]) is cut to the same ones."""
    drawn: list[tuple[Tensor, Tensor]] = []
    for index, painter in enumerate(painters):
        rows = torch.nonzero(kind == index)[:, 0]
        if len(rows):
            drawn.append((rows, painter(*(field[rows] for field in fields), rng)))
    return torch.cat([image for _, image in drawn])[torch.cat([rows for rows, _ in drawn]).argsort()]


def trapezoid(x: Tensor, y: Tensor, top, bottom, left_top, right_top, left_bottom, right_bottom) -> Tensor:
    """Two level edges joined by straight sides (a distance up to the slant of the sides)."""
    top, bottom = per_image(top), per_image(bottom)
    t = (y - top) / (bottom - top)
    left = per_image(left_top) * (1 - t) + per_image(left_bottom) * t
    right = per_image(right_top) * (1 - t) + per_image(right_bottom) * t
    return torch.maximum(torch.maximum(left - x, x - right), torch.maximum(top - y, y - bottom))
