from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from merging.entries import Entry, entrywise, sweep
from merging.experts import Experts
from merging.merged import Merged
from merging.options import Options, Share, Within

MODEL = ""  # the key of numbers that hold for the whole model


@dataclass(frozen=True)
class Ram(Options):
    """RAM and RAM+, reinforced agent merging: the mean of each entry over the experts that changed it.

    Yuan et al., 2026, the authors' public code. threshold: an expert changed an entry if it moved by more than this;
    0 asks for any change, which suits bf16. factor: 1 is RAM; above, RAM+ strengthens what one expert alone changed, by
    1 + (factor - 1) * min(clip, entries it shares / entries it alone changed), the more of its work is averaged away.
    1.2 is the authors', counted over the whole "model"; mergekit counts per "parameter", with factor 1.1 and clip 0.2.
    There is no coefficient for the whole change.
    """

    threshold: Annotated[float, Within(0.0, 1.0)] = 1e-5
    factor: Annotated[float, Within(1.0, 100.0)] = 1.0
    clip: Share = 1.0
    scope: Literal["model", "parameter"] = "model"
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts) -> Merged:
        factors = self._factors(experts) if self.factor > 1 else {}
        plain = torch.ones(len(experts.tasks), 1)

        def merge(entry: Entry, tau: Tensor) -> Tensor:
            changed = tau.abs() > self.threshold
            count = changed.sum(0)
            kept = tau.mul_(changed)
            alone = kept * factors.get(entry.key if self.scope == "parameter" else MODEL, plain)
            return torch.where(count == 1, alone.sum(0), kept.sum(0) / count.clamp_min(1))

        return experts.merged(entrywise(experts, merge))

    def _factors(self, experts: Experts) -> Mapping[str, Tensor]:
        """What the entries that one expert alone changed are multiplied by, [T, 1] of the model or by parameter."""

        def count(entry: Entry, tau: Tensor) -> tuple[str, Tensor]:
            changed = tau.abs() > self.threshold
            alone = changed & (changed.sum(0) == 1)
            return entry.key, torch.stack([changed.sum(1), alone.sum(1)])

        counts: dict[str, Tensor] = {}
        for key, piece in sweep(experts, count):
            where = key if self.scope == "parameter" else MODEL
            counts[where] = counts.get(where, 0) + piece
        return {key: self._factor(*pair.double()) for key, pair in counts.items()}

    def _factor(self, changed: Tensor, alone: Tensor) -> Tensor:
        ratio = (changed - alone) / alone.clamp_min(1)  # of an expert without entries of its own nothing is multiplied
        return (1 + (self.factor - 1) * ratio.clamp_max(self.clip)).float()[:, None]
