from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from merging.experts import Experts
from merging.inner_products import on_sphere
from merging.merged import Merged
from merging.options import Index, Options

CLOSE = 1e-5  # lengths and angles that count as zero, mergekit's


@dataclass(frozen=True)
class Karcher(Options):
    """Karcher mean of the experts' directions on a sphere, times their mean length. As mergekit's `karcher`.

    The mean minimises the summed squares of the angles to all directions, all of one weight; a step goes along the mean
    of the logarithms. iterations: 0 is the normalised mean of the directions, and with origin="base" mergekit's
    `multislerp`, whose own step is zero because it starts from that mean. origin: of the sphere, "zero" (of weights) or
    "base" (of task vectors). Each parameter has a mean of its own. Parameters of zeros have no direction and count by
    their length; a direction opposite to the mean has no logarithm and is left out of a step. Where directions cancel
    the experts are averaged (mergekit: of two alone, for more `multislerp` fails). There is no coefficient. Of models
    of one task trained on shares of its data (suite=shares) `multislerp` is the merge of BOOM, bagging-based model
    merging (hengran/Bagging-Based-Model-Merging); its authors do not say around which origin: `boom` is around zero,
    `multi_slerp` around the base.
    """

    iterations: Index = 10
    origin: Literal["zero", "base"] = "zero"
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts) -> Merged:
        return experts.merged(on_sphere(experts, self.origin, self._mean))

    def _mean(self, gram: Tensor) -> Tensor:
        """Coefficients [T] of the vectors, from their products [T, T]: the sphere is never left for their entries."""
        count, lengths = len(gram), gram.diagonal().sqrt()
        there = lengths > CLOSE * lengths.max()
        if not there.any():
            return torch.zeros(count, dtype=torch.float64)
        inverse = torch.where(there, 1 / lengths.clamp_min(1e-300), 0.0)
        cosines = gram * inverse * inverse[:, None]
        mean, weight = there.double() / there.sum(), 1 / there.sum()
        length = _length(cosines, mean)
        if length < CLOSE:
            return torch.full((count,), 1 / count, dtype=torch.float64)
        mean = mean / length
        for _ in range(self.iterations):
            cosine = (cosines @ mean).clamp(-1, 1)
            angle = torch.arccos(cosine)
            factor = torch.where(there & (angle > CLOSE) & (angle < torch.pi - CLOSE), angle / torch.sin(angle), 0.0)
            step = weight * (factor - (factor * cosine).sum() * mean)
            if (size := _length(cosines, step)) < CLOSE:
                break
            mean = torch.cos(size) * mean + torch.sin(size) / size * step
            mean = mean / _length(cosines, mean)
        return lengths.mean() * mean * inverse


def _length(cosines: Tensor, mix: Tensor) -> Tensor:
    """Of a mix [T] of unit vectors."""
    return (mix @ cosines @ mix).clamp_min(0).sqrt()
