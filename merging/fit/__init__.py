"""Everything that learns: gates, coefficients, masks. `descend` minimises weighted objectives on them."""

from merging.fit.descent import Descent, descend
from merging.fit.learnable import Learnable
from merging.fit.objectives import (
    CrossEntropy,
    Entropy,
    FeatureDistillation,
    LogitDistillation,
    MarginalEntropy,
    Objective,
)

__all__ = [
    "CrossEntropy",
    "Descent",
    "Entropy",
    "FeatureDistillation",
    "Learnable",
    "LogitDistillation",
    "MarginalEntropy",
    "Objective",
    "descend",
]
