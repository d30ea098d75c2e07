from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from merging.entries import Entry, entrywise
from merging.experts import Experts
from merging.merged import Merged


@dataclass(frozen=True)
class MagMax:
    """MagMax: every entry takes the change of largest magnitude among the task vectors.

    Marczak et al., 2024, arXiv 2407.06322. scale: 0 is the base; 0.5 is the authors' for eight tasks. Of two changes of
    equal magnitude the positive one is taken, in the published code that of the later task. The paper trains its
    experts one after the other; here they are merged as they come.
    """

    scale: float = 0.5
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts) -> Merged:
        def merge(_: Entry, tau: Tensor) -> Tensor:
            highest, lowest = tau.amax(0), tau.amin(0)
            return torch.where(highest >= -lowest, highest, lowest)

        return experts.merged(entrywise(experts, merge), self.scale)
