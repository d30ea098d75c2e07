"""Image towers built from facts (JSON-able values), with the parameter names of open_clip."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn

from merging.backbones.base import Backbone, normalised
from merging.errors import UserError

PREFIX = "visual."  # of the tower's parameters in a whole CLIP


class ImageTower(nn.Module):
    """An open_clip image encoder under the name `visual`: normalised float images [N, 3, H, W] -> features [N, D].

    Raises UserError for facts that open_clip does not know, and where its activations are not those that `quick_gelu`
    asks for: weights do not tell.
    """

    def __init__(self, embed_dim: int, vision_cfg: Mapping[str, object], quick_gelu: bool = False):
        from open_clip.model import CLIPVisionCfg, _build_vision_tower  # here, because importing it takes seconds

        super().__init__()
        known = {option.name for option in fields(CLIPVisionCfg)}
        if unknown := sorted(set(vision_cfg) - known):
            raise UserError(
                f"backbone.vision_cfg has {', '.join(unknown)}, which no tower of open_clip reads. Known are "
                f"{', '.join(sorted(known))}."
            )
        self.visual = _build_vision_tower(embed_dim, dict(vision_cfg), quick_gelu)  # type: ignore[arg-type]
        check_activations(self.visual, quick_gelu)

    def forward(self, images: Tensor) -> Tensor:
        return self.visual(images)


def check_activations(visual: nn.Module, quick_gelu: bool) -> None:
    """Raises UserError unless every block's activation is of the type that `quick_gelu` asks for."""
    from open_clip.transformer import QuickGELU

    expected = QuickGELU if quick_gelu else nn.GELU
    activations = {name: type(module) for name, module in visual.named_modules() if name.endswith("mlp.gelu")}
    wrong = [f"{name} is {kind.__name__}" for name, kind in activations.items() if kind is not expected]
    if not activations and quick_gelu:  # timm's towers and ResNets ignore the setting
        wrong = [f"{type(visual).__name__} has none"]
    if wrong:
        raise UserError(
            f"The tower should have {expected.__name__} activations (quick_gelu={quick_gelu}), but {wrong[0]}. Set "
            f"backbone.quick_gelu as the weights were trained: true for OpenAI's, which open_clip has as *-quickgelu."
        )


@dataclass(frozen=True)
class OpenClip(Backbone):
    """An image tower of open_clip. `mean` and `std` (per channel, of values in [0, 1]) normalise the images."""

    name: str
    embed_dim: int
    vision_cfg: Mapping[str, object]
    quick_gelu: bool = False
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)
    table: ClassVar[str] = "open_clip"  # type: ignore[misc]

    def facts(self) -> dict[str, object]:
        """What `build` needs, for the header of a saved model."""
        return {"embed_dim": self.embed_dim, "vision_cfg": dict(self.vision_cfg), "quick_gelu": self.quick_gelu}

    def identity(self) -> dict[str, object]:
        return {**self.facts(), "mean": list(self.mean), "std": list(self.std)}

    def build(self) -> ImageTower:
        return ImageTower(**self.facts()).eval()  # type: ignore[arg-type]

    def example(self, count: int) -> Tensor:
        size = int(self.vision_cfg["image_size"])  # type: ignore[call-overload]
        return torch.zeros(count, 3, size, size, dtype=torch.uint8)

    def prepare(self, batch: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> normalised fp32."""
        return normalised(batch, self.mean, self.std)

    def features(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Image features before they are scaled to unit length."""
        return module(inputs)

    def outputs(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """The features: a tower has no head of its own."""
        return module(inputs)

    @property
    def tokens(self) -> int:
        """Tokens per image, the class token included."""
        size, patch = (int(self.vision_cfg[name]) for name in ("image_size", "patch_size"))  # type: ignore[call-overload]
        return (size // patch) ** 2 + 1
