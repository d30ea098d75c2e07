"""The eight drawn tasks by name, rendered to uint8; the room where a ninth task would be added."""

import torch
from torch import Tensor

from tasks.mini import aerial, cars, digits, landuse, scenes, signs, street, textures

MODULES = {
    module.__name__.rsplit(".", 1)[1]: module
    for module in (scenes, cars, aerial, landuse, street, signs, digits, textures)
}
CLASSES: dict[str, tuple[str, ...]] = {name: module.CLASSES for name, module in MODULES.items()}


def to_bytes(images: Tensor) -> Tensor:
    """Floats in [0, 1] (clamped) -> uint8."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def render(task: str, count: int, style: str, rng: torch.Generator, chunk: int = 1000) -> tuple[Tensor, Tensor]:
    """`count` shuffled class-balanced images: uint8 [count, 3, 32, 32] and int64 labels [count]."""
    labels = torch.arange(count) % len(CLASSES[task])
    labels = labels[torch.randperm(count, generator=rng)]
    images = [to_bytes(MODULES[task].draw(part, style, rng)) for part in labels.split(chunk)]
    return torch.cat(images), labels
