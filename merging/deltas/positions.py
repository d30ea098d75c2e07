"""Changes of low rank whose factors are the points of a small affine space, one for every row and every column."""

import torch
from torch import Tensor

from merging.deltas.base import Whole


class Positions(Whole):
    """delta_g = up_g down_g; row i of up_g [m, r] is mean_i + basis_i weights_i,g, and so is column j of down_g [r, n].

    means [m + n, r], bases [m + n, r, p] and weights [m + n, p, G] hold the rows of up, then the columns of down.
    """

    def __init__(self, means: Tensor, bases: Tensor, weights: Tensor, shape: torch.Size):
        super().__init__()
        for name, tensor in (("means", means), ("bases", bases), ("weights", weights)):
            self.register_buffer(name, tensor)
        self.means: Tensor
        self.bases: Tensor
        self.weights: Tensor
        self.parts, self.shape = weights.shape[2], torch.Size(shape)

    @classmethod
    def of(cls, ups: Tensor, downs: Tensor, count: int) -> "Positions":
        """The nearest ones of `count` directions to factors ups [G, m, r] and downs [G, r, n]."""
        rows = torch.cat([ups, downs.mT], 1).permute(1, 2, 0).double()  # [m + n, r, G]
        means = rows.mean(2, keepdim=True)
        bases, sizes, weights = torch.linalg.svd(rows - means, full_matrices=False)
        kept = bases[..., :count], sizes[:, :count, None] * weights[:, :count]
        return cls(means[..., 0].to(ups), *(part.to(ups).contiguous() for part in kept),
                   shape=torch.Size((ups.shape[1], downs.shape[2])))  # fmt: skip

    def factors(self, index: int) -> tuple[Tensor, Tensor]:
        """up_index [m, r] and down_index [r, n]."""
        rows = self.means + (self.bases @ self.weights[..., index, None])[..., 0]
        up, down = rows.split(list(self.shape))
        return up, down.T

    def part(self, index: int) -> Tensor:
        up, down = self.factors(index)
        return up @ down

    def transposed(self) -> "Positions":
        m, n = self.shape
        turned = (torch.cat(tensor.split([m, n])[::-1]) for tensor in (self.means, self.bases, self.weights))
        return Positions(*turned, shape=torch.Size((n, m)))
