"""Which hidden neurons of an FFN an expert lives on, and what is left of a change when only they are kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from merging.cache import code, key_of
from merging.context import Context
from merging.errors import UserError
from merging.experts import Experts
from merging.options import Count, Fraction, Options
from merging.statistics import activations

Masks = Mapping[str, Tensor]  # name of the block -> boolean [T, hidden]
CODE, LIBRARIES = ("merging.statistics", "merging.backbones"), ("open_clip_torch",)  # what activations were made by


@dataclass(frozen=True)
class Neurons(Options):
    """The share `ratio` of hidden neurons that are most active in expert t on its own unlabelled images.

    ratio: 1 keeps all neurons. scope: "layer", the share of every block; "model", of all blocks together; "mass", in
    every block the fewest neurons that hold the share of its summed statistic. images: per task, measured. scale: what
    a kept entry is multiplied by, "inverse_density" (1 / kept share, as DARE), "energy" (restores the norm of the
    whole), "density", "none", or "learned" (of all tasks together, the factors whose average leaves the least of the
    changes; least squares, without data). statistic: "mean_abs", "mean" (signed), "positive" (share above zero) or
    "rms"; over "all" tokens, or the "class" token alone; at the "output" of the activation function or at its "input".
    source: "expert" t, or the "base" on the images of task t.
    """

    ratio: Fraction = 0.1
    scope: Literal["layer", "model", "mass"] = "layer"
    images: Count = 512
    scale: Literal["inverse_density", "energy", "density", "none", "learned"] = "inverse_density"
    statistic: Literal["mean_abs", "mean", "positive", "rms"] = "mean_abs"
    tokens: Literal["all", "class"] = "all"
    at: Literal["output", "input"] = "output"
    source: Literal["expert", "base"] = "expert"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope == "mass" and self.statistic == "mean":
            raise UserError("neurons: scope=mass adds up activity, and statistic=mean has signs. Use mean_abs or rms.")

    @property
    def joint(self) -> bool:
        """Whether the scale of one task depends on the changes of all."""
        return self.scale == "learned"

    def masks(self, experts: Experts, context: Context) -> Masks:
        """Boolean [T, hidden] per block. Raises UserError where a mask would be empty."""
        activity = self.measured(experts, context)
        if self.scope == "model":
            together = largest_share(torch.cat(list(activity.values()), 1), self.ratio)
            masks = dict(
                zip(activity, together.split([values.shape[1] for values in activity.values()], 1), strict=True)
            )
        else:
            choose = largest_mass if self.scope == "mass" else largest_share
            masks = {block: choose(values, self.ratio) for block, values in activity.items()}
        for block, mask in masks.items():
            if not mask.any(1).all():
                task = experts.tasks[int((~mask.any(1)).nonzero()[0])]
                raise UserError(
                    f"neurons: ratio={self.ratio} keeps none of the {mask.shape[1]} hidden neurons of block {block} "
                    f"for {task}. Raise it to at least {1 / mask.shape[1]:.4f}, or use scope=layer."
                )
        return masks

    def measured(self, experts: Experts, context: Context) -> dict[str, Tensor]:
        """How active the hidden neurons of every FFN are, [T, hidden] by block; measured once per content."""
        calibration, specs = context.unlabelled(), experts.origin.specs()
        kinds, side = (("ffn_out",), "input") if self.at == "output" else (("ffn_in", "ffn_gate"), "output")
        matrices = (key for key in experts.keys("ffn") if len(specs[key].shape) == 2)
        names = tuple(key for key in matrices if experts.param(key).kind in kinds)
        models = experts.checkpoints if self.source == "expert" else (experts.origin,) * len(experts.tasks)

        def make() -> dict[str, Tensor]:
            return activations(calibration, models, names, self.images, self.statistic, self.tokens, side)

        if experts.cache is None:
            activity = make()
        else:
            weights, images = [model.id for model in models], (calibration.ids, self.images, calibration.backbone)
            how = (names, self.statistic, self.tokens, side, calibration.device.type)
            key = key_of("activations", code(CODE, LIBRARIES), weights, *images, *how)
            activity = experts.cache.tensors(key, make)
        return {str(experts.param(name).block): activity[name] for name in names}

    def apply(self, change: Tensor, mask: Tensor, axis: int) -> Tensor:
        """Changes [T, ...] with the neurons outside mask [T, hidden] set to zero along `axis`, and scaled."""
        kept = selected(change, mask, axis)
        return kept * self._factor(change, kept, mask).view(-1, *[1] * (change.ndim - 1))

    def _factor(self, change: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
        density = mask.float().mean(1)
        if self.scale == "learned":
            return least_left(change, kept)
        if self.scale == "energy":
            left = kept.flatten(1).norm(dim=1)
            return torch.where(left > 0, change.flatten(1).norm(dim=1) / left.clamp_min(1e-30), 1.0)
        return {"inverse_density": 1 / density, "density": density, "none": torch.ones_like(density)}[self.scale]


def selected(change: Tensor, mask: Tensor, axis: int) -> Tensor:
    """Changes [T, ...] with the neurons outside mask [T, hidden] set to zero along `axis` of each."""
    shape = [1] * (change.ndim - 1)
    shape[axis] = mask.shape[1]
    return change * mask.view(len(mask), *shape)


def largest_share(values: Tensor, ratio: float) -> Tensor:
    """Boolean [T, n]: the round(ratio n) largest of each row; of equals the first."""
    count = round(ratio * values.shape[1])
    order = values.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, order, True)


def largest_mass(values: Tensor, share: float) -> Tensor:
    """Boolean [T, n]: the fewest of the largest of each row of [T, n] >= 0 whose sum is at least the share of all."""
    ordered, order = values.double().sort(dim=1, descending=True, stable=True)
    before = ordered.cumsum(1) - ordered
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, order, before < share * ordered.sum(1, keepdim=True))


def least_left(changes: Tensor, kept: Tensor) -> Tensor:
    """Factors s [T] for which C = mean_t s_t kept_t minimises sum_t ||changes_t - C||^2; of equals the smallest."""
    flat = kept.flatten(1).double()
    target = flat @ changes.sum(0).flatten().double()
    return torch.linalg.lstsq(flat @ flat.T, target[:, None], driver="gelsd").solution[:, 0].float()


def jaccard(mask: Tensor) -> Tensor:
    """Neurons that two tasks share over those that either keeps, [T, T] from boolean [T, hidden]; 1 for two of none.

    Masks drawn at random would have `chance(ratio)`: only what differs from it says anything about the tasks.
    """
    kept = mask.double()
    both = kept @ kept.T
    either = kept.sum(1)[:, None] + kept.sum(1) - both
    return torch.where(either > 0, both / either.clamp_min(1), 1.0)


def chance(ratio: float) -> float:
    """The Jaccard index to be expected of two random masks that keep that share: 0.053 at 10 %, 0.176 at 30 %."""
    return ratio / (2 - ratio)
