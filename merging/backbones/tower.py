"""Image towers built from facts (JSON-able values), with the parameter names of open_clip."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor, nn

from merging.backbones.base import ParamInfo, table
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
        known = {each.name for each in fields(CLIPVisionCfg)}
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

    wanted = QuickGELU if quick_gelu else nn.GELU
    found = {name: module for name, module in visual.named_modules() if name.endswith("mlp.gelu")}
    wrong = [f"{name} is {type(module).__name__}" for name, module in found.items() if type(module) is not wanted]
    if not found and quick_gelu:  # timm's towers and ResNets ignore the setting
        wrong = [f"{type(visual).__name__} has none"]
    if wrong:
        raise UserError(
            f"The tower should have {wanted.__name__} activations (quick_gelu={quick_gelu}), but {wrong[0]}. Set "
            f"backbone.quick_gelu as the weights were trained: true for OpenAI's, which open_clip has as *-quickgelu."
        )


@dataclass(frozen=True)
class Backbone:
    """Architecture facts. `mean` and `std` (per channel, of values in [0, 1]) normalise the images."""

    name: str
    embed_dim: int
    vision_cfg: Mapping[str, object]
    quick_gelu: bool = False
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)

    def facts(self) -> dict[str, object]:
        """What `build` needs, for the header of a saved model."""
        return {"embed_dim": self.embed_dim, "vision_cfg": dict(self.vision_cfg), "quick_gelu": self.quick_gelu}

    def identity(self) -> dict[str, object]:
        """All that a result depends on beside the weights, as JSON: `facts` and how images are normalised."""
        return {**self.facts(), "mean": list(self.mean), "std": list(self.std)}

    def build(self) -> ImageTower:
        """The tower with random weights, in evaluation mode."""
        return ImageTower(**self.facts()).eval()  # type: ignore[arg-type]

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> normalised fp32."""
        mean, std = (torch.tensor(each, device=images.device).view(3, 1, 1) for each in (self.mean, self.std))
        return (images.float() - 255 * mean) / (255 * std)

    def param(self, key: str) -> ParamInfo:
        """What a parameter is. Raises UserError for one that open_clip's CLIP does not have."""
        return table("open_clip").param(key)

    @property
    def tokens(self) -> int:
        """Tokens per image, the class token included."""
        size, patch = (int(self.vision_cfg[name]) for name in ("image_size", "patch_size"))  # type: ignore[call-overload]
        return (size // patch) ** 2 + 1

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates for one image, counted by torch's own counter.

        Without memory, on the meta device; on a CPU torch would run attention by a fast path that is not counted.
        """
        from torch.utils.flop_counter import FlopCounterMode

        size = int(self.vision_cfg["image_size"])  # type: ignore[call-overload]
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            self.build()(torch.zeros(1, 3, size, size))
        return counter.get_total_flops() // 2
