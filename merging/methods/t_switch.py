from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from merging.deltas import Delta, Dense, Ternary
from merging.experts import Experts
from merging.merged import Merged, Routing
from merging.ops import rows
from merging.options import Fraction, Options
from merging.residual import energy_kept
from merging.threads import each


@dataclass(frozen=True)
class TSwitch(Options):
    """T-Switch: the large entries of every task vector as 1 or -1, times one number per parameter, by the true task id.

    Qi et al., 2025, arXiv 2412.00054. Of a parameter's positive entries the int(density * count) largest stay, or all
    where that is none, and so of its negative ones; equals of the last stay too. The number keeps the norm of what
    stays. What is a single number is kept as it is. density: published 0.4 for CLIP, 0.3 for RoBERTa, 0.6 for LoRA,
    whose factors the authors binarise one by one (here their product). routed: a router weighs the tasks' changes in
    place of the true task; with router=retrieval that is Auto-Switch, which needs no training.

    Stored in two bits an entry; the authors' groups of four take 1.5 at density 0.4. FlexSwitch learns what stays.
    """

    density: Fraction = 0.4
    routed: bool = False
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts) -> Merged:
        deltas: dict[str, Delta] = {}
        energy: dict[str, list[float]] = {}
        for key, tau in experts.stream():
            deltas[key] = self._delta(tau)
            energy[key] = energy_kept(tau, deltas[key])
        routing = Routing("learned" if self.routed else "oracle")
        return experts.merged({}, deltas=deltas, routing=routing, energy=energy)

    def _delta(self, tau: Tensor) -> Delta:
        """Of task vectors [T, *shape]."""
        if tau.ndim == 1 or not tau.numel():
            return Dense(tau.clone())
        masks, scales = zip(*each(self._switched, rows(tau)), strict=True)
        return Ternary.of(torch.cat(masks).view(-1, *tau.shape[1:]), torch.stack(scales))

    def _switched(self, change: Tensor) -> tuple[Tensor, Tensor]:
        """Where entries [n] become 1 and where -1, boolean [2, n], and what these are multiplied by."""
        masks = torch.stack([self._largest(change), self._largest(-change)])
        count = max(1, int(np.count_nonzero(masks.numpy())))
        return masks, ((change * (masks[0] | masks[1])).square().sum() / count).sqrt()

    def _largest(self, values: Tensor) -> Tensor:
        """Where values [n] are positive and among the largest."""
        positive = values > 0
        last = len(values) - int(self.density * int(np.count_nonzero(positive.numpy())))
        return positive if last == len(values) else values >= np.partition(values.numpy(), last)[last].item()
