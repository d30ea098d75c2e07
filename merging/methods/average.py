from dataclasses import dataclass
from typing import ClassVar

from merging.entries import combined
from merging.experts import Experts
from merging.merged import Merged


@dataclass(frozen=True)
class Average:
    """Weight averaging: the mean of the experts. Wortsman et al., 2022, arXiv 2203.05482."""

    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts) -> Merged:
        return experts.merged(combined(experts, lambda tau: tau.mean(0), 1 / len(experts.tasks)))
