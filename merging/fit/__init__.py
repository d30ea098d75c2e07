"""Everything that learns: gates, coefficients, masks. `descend` minimises weighted objectives on them."""

from merging.fit.descent import Descent, Learnable, descend
from merging.fit.objectives import (
    CrossEntropy,
    Entropy,
    FeatureDistillation,
    FeatureL1,
    LogitDistillation,
    MarginalEntropy,
)

__all__ = ["CrossEntropy", "Descent", "Entropy", "FeatureDistillation", "FeatureL1", "Learnable", "LogitDistillation",
           "MarginalEntropy", "descend"]  # fmt: skip
