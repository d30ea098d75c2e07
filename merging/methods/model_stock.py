from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from merging.experts import Experts
from merging.inner_products import combined_by, products
from merging.merged import Merged
from merging.options import Options


@dataclass(frozen=True)
class ModelStock(Options):
    """Model Stock: of the way from the base to the mean of the experts as much as the angle between them says.

    Jang et al., 2024, arXiv 2403.19522. With c, the mean cosine of two task vectors, the share is T c / (1 + (T - 1) c)
    of every parameter, or of every "row" along its last axis (`unit`). It is kept between 0 and 1: where experts point
    away from each other the base stays. Made for experts of one task, whose changes agree; those of different tasks are
    nearly orthogonal, and little of them is left. The mean of cosines is mergekit's (fusion_bench: of angles; the paper
    has one angle). There is no coefficient. Raises UserError for a single expert.
    """

    unit: Literal["parameter", "row"] = "parameter"
    needs: ClassVar[str] = "nothing"
    takes: ClassVar[range] = range(2, 1 << 20)  # experts

    def __call__(self, experts: Experts) -> Merged:
        gram = products(experts, by_row=self.unit == "row")
        return experts.merged(combined_by(experts, {key: self._coefficients(rows) for key, rows in gram.items()}))

    def _coefficients(self, gram: Tensor) -> Tensor:
        """[rows, 1 + T] of the base and the task vectors, from their products."""
        tau = gram[:, 1:, 1:]
        count, lengths = tau.shape[1], tau.diagonal(dim1=1, dim2=2).sqrt()
        cosine = (tau / (lengths[:, :, None] * lengths[:, None]).clamp_min(1e-300)).clamp(-1, 1)
        first, second = torch.triu_indices(count, count, 1)
        c = cosine[:, first, second].mean(1).clamp_min(0)
        share = count * c / (1 + (count - 1) * c)
        return torch.cat([torch.zeros(len(tau), 1), (share / count)[:, None].expand(-1, count)], 1)
