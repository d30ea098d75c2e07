from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from merging.experts import Experts
from merging.inner_products import on_sphere
from merging.merged import Merged
from merging.options import Options, Share

PARALLEL = 0.9995  # cosine from which on the way is straight


@dataclass(frozen=True)
class Slerp(Options):
    """SLERP: spherical interpolation between two experts, one parameter at a time. As mergekit's `slerp`.

    share: of the second expert, on the way along the arc; lengths go along. origin: the arc is around "zero", through
    the weights (mergekit's; experts of one base are so close that it is all but straight), or around the "base",
    through the task vectors. Where the cosine is above 0.9995 or below -0.9995 the way is straight. There is no
    coefficient. Raises UserError for other than two experts.
    """

    share: Share = 0.5
    origin: Literal["zero", "base"] = "zero"
    needs: ClassVar[str] = "nothing"
    takes: ClassVar[range] = range(2, 3)  # experts

    def __call__(self, experts: Experts) -> Merged:
        return experts.merged(on_sphere(experts, self.origin, self._between))

    def _between(self, gram: Tensor) -> Tensor:
        return arc(gram, torch.tensor(self.share, dtype=torch.float64))


def arc(gram: Tensor, share: Tensor) -> Tensor:
    """Coefficients [2] of two vectors at a share [] of the way along their arc, from their products [2, 2] fp64."""
    straight = torch.stack([1 - share, share])
    lengths = gram.diagonal().sqrt()
    cosine = gram[0, 1] / (lengths[0] * lengths[1]) if lengths.min() > 1e-8 else torch.zeros(()).double()
    if cosine.abs() > PARALLEL:
        return straight
    angle = torch.arccos(cosine)
    return torch.sin(straight * angle) / torch.sin(angle)
