from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from merging.errors import UserError
from merging.experts import Experts
from merging.merged import Merged
from merging.naming import KINDS
from merging.preflight import check_range


@dataclass(frozen=True)
class TaskArithmetic:
    """Task Arithmetic: the base plus a multiple of the summed task vectors. Ilharco et al., 2023, arXiv 2212.04089.

    scale: 0 is the base, 1/T is plain averaging, 1 adds every task vector in full; 0.3 is published for eight tasks.
    kinds: coefficients of their own for kinds of parameters (ffn, attention, norm, other), which a search for the scale
    leaves alone; {norm: 0} keeps the norms of the base.
    """

    scale: float = 0.3
    kinds: Mapping[str, float] = field(default_factory=dict)
    needs: ClassVar[str] = "nothing"

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise UserError(f"task_arithmetic: kinds has {kind!r}. Kinds are {', '.join(KINDS)}.")
            check_range(f"task_arithmetic: kinds.{kind}", self.kinds[kind], -100.0, 100.0)

    def __call__(self, experts: Experts) -> Merged:
        total = experts.map(lambda key, tau: tau.sum(0))
        own = {key: self.kinds[kind] for key in total if (kind := experts.naming.kind(key)) in self.kinds}
        shared = {key: change for key, change in total.items() if key not in own}
        return experts.merged(shared, self.scale, fixed={key: scale * total[key] for key, scale in own.items()})
